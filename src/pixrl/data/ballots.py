"""Groups of pictures that wait for a vote, and the votes, in SQLite with a write-ahead log.

A vote is a rank for each picture of a group, 0 the best; equal ranks are ties. Best of n ranks one picture 0 and the
others 1, a pair is a group of two, an order has as many ranks as pictures. The first vote on a group counts, so that
the same group in a second tab is never counted twice; it can be taken back until training has learned from it.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pixrl.errors import CheckpointError, InputError, RunError

PATIENCE = 30.0
"""Seconds that a writer waits for the others."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS ballots (
  number INTEGER PRIMARY KEY, step INTEGER NOT NULL, place INTEGER NOT NULL, prompt TEXT NOT NULL,
  pictures TEXT NOT NULL, learned INTEGER NOT NULL DEFAULT 0, UNIQUE (step, place)
);
CREATE TABLE IF NOT EXISTS votes (
  ballot INTEGER PRIMARY KEY REFERENCES ballots(number), ranks TEXT NOT NULL, at REAL NOT NULL
);
"""


@dataclass(frozen=True)
class Ballot:
    """A group of pictures of one prompt."""

    number: int
    step: int
    place: int
    """Which of the step's groups."""
    prompt: str
    pictures: tuple[Mapping[str, object], ...]
    """Each picture's `file`, relative to the file of votes, with what belongs to it: `seed`, `variant`."""
    ranks: tuple[int, ...] | None = None
    """The vote; None: there is none yet."""


class Ballots:
    """A connection to a file of votes, for several threads; several processes may have one each."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            CheckpointError: it is no file of votes, or damaged.
            RunError: it cannot be written.
        """
        self.path = path
        self._lock = threading.Lock()
        self._base = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=FULL")  # a power cut takes no vote that was answered
            self._base.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            self._base.close()
            raise _unwritable(path, error) from None
        except sqlite3.DatabaseError as error:
            self._base.close()
            raise CheckpointError(f"{path} is no file of votes, or damaged ({error}). Put it back.") from None

    def __enter__(self) -> "Ballots":
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
                    raise _unwritable(self.path, error) from None
                raise

    def add(self, step: int, groups: Sequence[tuple[str, Sequence[Mapping[str, object]]]]) -> None:
        """Add a step's groups, each a prompt and its pictures; those of a step that is drawn again stay as they are."""
        rows = [(step, place, text, json.dumps(list(shown))) for place, (text, shown) in enumerate(groups)]
        with self._writing() as base:
            base.executemany(
                "INSERT INTO ballots (step, place, prompt, pictures) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                rows,
            )

    def all(self, step: int | None = None) -> list[Ballot]:
        """Return the groups of a step, or of all, in order, with their votes."""
        with self._lock:
            rows = self._base.execute(
                "SELECT number, step, place, prompt, pictures, ranks FROM ballots LEFT JOIN votes ON ballot = number "
                "WHERE ? IS NULL OR step = ? ORDER BY step, place",
                (step, step),
            ).fetchall()
        return [
            Ballot(*row[:4], tuple(json.loads(row[4])), None if row[5] is None else tuple(json.loads(row[5])))
            for row in rows
        ]

    def vote(self, number: int, ranks: Sequence[int]) -> bool:
        """Keep a vote, on the disk when this returns. False: the group has one already, which stays.

        Raises:
            InputError: no such group, or ranks that are not one for each of its pictures, 0 the best.
            RunError: it could not be written; all earlier votes are kept.
        """
        with self._writing() as base:
            row = base.execute("SELECT pictures FROM ballots WHERE number = ?", (number,)).fetchone()
            if row is None:
                raise InputError("That group is not one of this run. Reload the page.")
            count = len(json.loads(row[0]))
            if len(ranks) != count or min(ranks) != 0 or max(ranks) >= count:
                raise InputError(
                    f"A vote has one rank for each of the {count} pictures, 0 the best: {list(ranks)}."
                )
            done = base.execute(
                "INSERT INTO votes VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (number, json.dumps(list(ranks)), time.time()),
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

    def learn(self, step: int) -> list[Ballot]:
        """Return a step's groups with their votes, which from now on nobody can take back."""
        with self._writing() as base:
            base.execute("UPDATE ballots SET learned = 1 WHERE step = ?", (step,))
        return self.all(step)


def rewards_of(ranks: Sequence[int]) -> list[float]:
    """Return each picture's reward in its group: the pictures it beats less those that beat it, over all others.

    In [-1, 1]; the rewards of a group add up to 0.
    """
    others = len(ranks) - 1
    return [sum((one < rank) - (one > rank) for rank in ranks) * 1.0 / others for one in ranks]


def preferred(ballots: Sequence[Ballot]) -> list[dict[str, object]]:
    """Return every preference that the votes state, as rows of a file of pairs (`pixrl.data.preferences`)."""
    return [
        {"prompt": ballot.prompt, **_side(ballot, one, "winner"), **_side(ballot, other, "loser")}
        for ballot in ballots
        for one, rank in enumerate(ballot.ranks or ())
        for other, below in enumerate(ballot.ranks or ())
        if rank < below
    ]


def _side(ballot: Ballot, place: int, side: str) -> dict[str, object]:
    """Return a picture's columns: `winner`, `winner_seed`, `winner_variant`, or those of the loser."""
    picture = dict(ballot.pictures[place])
    return {side: picture.pop("file"), **{f"{side}_{key}": value for key, value in picture.items()}}


def _unwritable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} cannot be written ({error}); all earlier votes are kept. Make room on the disk, then vote again."
    )
