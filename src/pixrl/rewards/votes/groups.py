"""Groups of pictures that wait for a vote, and the votes, in a file of SQLite with a write-ahead log.

A vote is a rank for each picture of a group, 0 the best; equal ranks are ties. Best of n ranks one picture 0 and the
others 1, a pair is a group of two, an order has as many ranks as pictures. The first vote on a group counts, so that
the same group in a second tab is never counted twice; it can be taken back until training has learned from it.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pixrl.errors import CheckpointError, InputError, RunError

PATIENCE = 30.0
"""Seconds that a writer waits for the others."""


class VoteFile:
    """A connection to a file of votes.

    Args:
        path: the file.
        make: whether to make its tables where they are missing.

    Raises:
        CheckpointError: it is no file of votes, or damaged.
        RunError: it cannot be written.
    """

    schema: ClassVar[str]
    """The statements that make its tables where they are missing."""
    tables: ClassVar[str]
    """The names of its tables, with commas."""

    def __init__(self, path: Path, *, make: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(
                path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from None
        try:
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=FULL")  # a power cut takes no vote that was answered
            if make:
                self._base.executescript(self.schema)
            self._base.execute(f"SELECT 1 FROM {self.tables} LIMIT 1")
        except sqlite3.DatabaseError as error:
            self._base.close()
            if make and isinstance(error, sqlite3.OperationalError):
                raise self._unwritable(error) from None
            raise CheckpointError(f"{path} is no file of votes, or damaged ({error}). Put it back.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that is written whole or not at all."""
        with self._lock:
            try:
                self._base.execute("BEGIN IMMEDIATE")
                yield self._base
                self._base.execute("COMMIT")
            except BaseException as error:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise self._unwritable(error) from None
                raise

    def _read(self, query: str, *given: object) -> list[tuple[object, ...]]:
        with self._lock:
            return self._base.execute(query, given).fetchall()

    def _unwritable(self, error: Exception) -> RunError:
        return RunError(
            f"{self.path} cannot be written ({error}); all earlier votes are kept. Make room on the disk, then vote "
            "again."
        )


FOLDER = "votes"
"""The folder of a run that holds the pictures that are voted on, and the files below."""
VOTES = "votes.sqlite"
PAIRS = "pairs.jsonl"
"""Every preference that was voted, as `loss: {kind: dpo}` learns from."""
NO_GROUP = "That group is not one of this run. Reload the page."
_SCHEMA = """
CREATE TABLE IF NOT EXISTS ballots (
  number INTEGER PRIMARY KEY, step INTEGER NOT NULL, place INTEGER NOT NULL, prompt TEXT NOT NULL,
  pictures TEXT NOT NULL, learned INTEGER NOT NULL DEFAULT 0, UNIQUE (step, place)
);
CREATE TABLE IF NOT EXISTS votes (
  ballot INTEGER PRIMARY KEY REFERENCES ballots(number), ranks TEXT NOT NULL, at REAL NOT NULL
);
"""
_COLUMNS = "number, step, place, prompt, pictures, learned, ranks, at"


@dataclass(frozen=True)
class VotedPicture:
    """One picture of a group."""

    file: str
    """The name of its file, beside the file of votes; it tells nothing of how the picture was drawn."""
    seed: int
    variant: int


@dataclass(frozen=True)
class VotedGroup:
    """A group of pictures of one prompt."""

    number: int
    step: int
    place: int
    """The group's number in the step."""
    prompt: str
    pictures: tuple[VotedPicture, ...]
    learned: bool
    """Whether training has learned from it."""
    ranks: tuple[int, ...] | None = None
    """The vote; None: there is none yet."""
    at: float | None = None
    """When it was given, in seconds since 1970."""


class GroupVotes(VoteFile):
    """A connection to a run's file of groups and votes."""

    schema = _SCHEMA
    tables = "votes, ballots"

    def add(self, step: int, groups: Mapping[int, tuple[str, Sequence[VotedPicture]]]) -> None:
        """Add a step's groups by their place, each a prompt and its pictures.

        A group that is there already keeps its vote where its pictures are the same; others are asked about again.
        """
        with self._writing() as base:
            for place, (prompt, shown) in groups.items():
                pictures = json.dumps([[one.file, one.seed, one.variant] for one in shown])
                key = (step, place, prompt, pictures)
                base.execute(
                    "DELETE FROM votes WHERE ballot = (SELECT number FROM ballots WHERE step = ? AND place = ? "
                    "AND (prompt <> ? OR pictures <> ?))",
                    key,
                )
                base.execute(
                    "INSERT INTO ballots (step, place, prompt, pictures) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
                    "SET prompt = excluded.prompt, pictures = excluded.pictures, learned = 0 "
                    "WHERE prompt <> excluded.prompt OR pictures <> excluded.pictures",
                    key,
                )

    def all(self, step: int | None = None) -> list[VotedGroup]:
        """Return the groups of a step, or of all, in order, with their votes."""
        return self._groups("? IS NULL OR step = ?", step, step)

    def waiting(self) -> list[VotedGroup]:
        """Return the groups that training has not learned from yet, in order, with their votes."""
        return self._groups("learned = 0")

    def count(self) -> int:
        """Return the number of votes."""
        ((count,),) = self._read("SELECT COUNT(*) FROM votes")
        assert isinstance(count, int)
        return count

    def of(self, number: int) -> VotedGroup:
        """Return a group.

        Raises:
            InputError: there is none of that number.
        """
        found = self._groups("number = ?", number)
        if not found:
            raise InputError(NO_GROUP)
        return found[0]

    def _groups(self, where: str, *given: object) -> list[VotedGroup]:
        rows = self._read(
            f"SELECT {_COLUMNS} FROM ballots LEFT JOIN votes ON ballot = number WHERE {where} ORDER BY step, place",
            *given,
        )
        return [_ballot(*row) for row in rows]

    def vote(self, number: int, best: Sequence[str]) -> bool:
        """Keep a vote, on the disk when this returns. False: the group has one already, which stays.

        Args:
            number: the group's.
            best: the names of its best pictures in order; all others tie behind them. None at all: all tie.

        Raises:
            InputError: no such group, or a name that is not one of its pictures', or stands there twice.
            RunError: it could not be written; all earlier votes are kept.
        """
        with self._writing() as base:
            row = base.execute("SELECT pictures FROM ballots WHERE number = ?", (number,)).fetchone()
            if row is None:
                raise InputError(NO_GROUP)
            names = [name for name, *_ in json.loads(row[0])]
            if len(set(best)) != len(best) or not set(best) <= set(names):
                raise InputError("That picture is not one of this group. Reload the page.")
            ranks = [best.index(name) if name in best else len(best) for name in names]
            done = base.execute(
                "INSERT INTO votes VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (number, json.dumps(ranks), time.time()),
            )
            return done.rowcount == 1

    def undo(self, number: int) -> bool:
        """Take a vote back. False: there is none, or training has learned from it already."""
        with self._writing() as base:
            done = base.execute(
                "DELETE FROM votes WHERE ballot = ? AND (SELECT learned FROM ballots WHERE number = ballot) = 0",
                (number,),
            )
            return done.rowcount == 1

    def learn(self, step: int, places: Iterable[int], settled: float) -> list[VotedGroup] | None:
        """Return a step's groups of these places with their votes, which from now on nobody can take back.

        None: one of them has no vote yet, or one that was given less than `settled` seconds ago.
        """
        wanted = set(places)
        with self._writing() as base:
            rows = base.execute(
                f"SELECT {_COLUMNS} FROM ballots LEFT JOIN votes ON ballot = number WHERE step = ? ORDER BY place",
                (step,),
            ).fetchall()
            found = [one for row in rows if (one := _ballot(*row)).place in wanted]
            latest = time.time() - settled
            if any(one.at is None or (one.at > latest and not one.learned) for one in found):
                return None
            base.executemany("UPDATE ballots SET learned = 1 WHERE number = ?", [(b.number,) for b in found])
        return found


def _ballot(*row: object) -> VotedGroup:
    number, step, place, prompt, pictures, learned, ranks, at = row
    assert isinstance(number, int) and isinstance(step, int) and isinstance(place, int)
    assert at is None or isinstance(at, float)
    shown = tuple(VotedPicture(*one) for one in json.loads(str(pictures)))
    voted = None if ranks is None else tuple(json.loads(str(ranks)))
    return VotedGroup(number, step, place, str(prompt), shown, bool(learned), voted, at)


def rewards_of(ranks: Sequence[int]) -> list[float]:
    """Return each picture's reward in its group: the pictures it beats less those that beat it, over all others.

    In [-1, 1]; the rewards of a group add up to 0.
    """
    others = max(len(ranks) - 1, 1)
    return [sum((one < rank) - (one > rank) for rank in ranks) / others for one in ranks]


def preferred(ballots: Sequence[VotedGroup]) -> list[dict[str, object]]:
    """Return every preference that the votes state, as rows of a file of pairs (`pixrl.data.preferences`)."""
    return [
        {
            "prompt": ballot.prompt,
            "winner": winner.file,
            "loser": loser.file,
            "winner_seed": winner.seed,
            "loser_seed": loser.seed,
            "winner_variant": winner.variant,
            "loser_variant": loser.variant,
            "step": ballot.step,
        }
        for ballot in ballots
        for winner, rank in zip(ballot.pictures, ballot.ranks or (), strict=False)
        for loser, below in zip(ballot.pictures, ballot.ranks or (), strict=False)
        if rank < below
    ]


def write_pairs(ballots: GroupVotes) -> Path:
    """Write the file of pairs beside the file of votes anew, and return its path."""
    file = ballots.path.parent / PAIRS
    beside = file.with_suffix(".tmp")
    rows = preferred([one for one in ballots.all() if one.learned])
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    beside.replace(file)
    return file
