"""The votes, in SQLite with a write-ahead log: many servers and readers at once, and an answered vote is on the disk.

A vote is named by participant, comparison and criterion, so that one that is sent again, as after a lost answer or in a
second tab, takes its own place and is never counted twice.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pixrl.errors import RunError
from pixrl.human_study.study import TIE, Comparison, Folder, Study, plan
from pixrl.rewards.votes.groups import VoteFile

TOKEN_BYTES = 24
"""Random bytes of a participant's token: 192 bits."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS participants (number INTEGER PRIMARY KEY, token TEXT UNIQUE NOT NULL, plan TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS votes (
  participant INTEGER NOT NULL REFERENCES participants(number), task INTEGER NOT NULL, criterion TEXT NOT NULL,
  choice TEXT NOT NULL, seconds REAL, at REAL NOT NULL, PRIMARY KEY (participant, task, criterion)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Participant:
    """A person with a link."""

    number: int
    token: str
    tasks: tuple[Comparison, ...]


@dataclass(frozen=True)
class Vote:
    """One answer."""

    task: int
    """Which of the participant's comparisons."""
    criterion: str
    choice: str
    """A picture's opaque name, or `tie`."""
    seconds: float | None = None
    """How long the comparison was looked at."""
    at: float | None = None
    """When, in seconds since 1970; None: now."""


class VoteRefused(RunError):
    """Error of a vote that fits no comparison of the participant."""


class Votes(VoteFile):
    """A connection to the file of votes, for several threads."""

    schema = _SCHEMA
    tables = "votes, participants"

    def add_participants(self, study: Study, count: int) -> int:
        """Add participants until there are `count`, and return how many were added."""
        with self._writing() as base:
            have = int(base.execute("SELECT COUNT(*) FROM participants").fetchone()[0])
            for number in range(have, count):
                tasks = json.dumps([task.model_dump(mode="json") for task in plan(study, number)])
                token = secrets.token_urlsafe(TOKEN_BYTES)
                base.execute("INSERT INTO participants VALUES (?, ?, ?)", (number, token, tasks))
        return max(0, count - have)

    def participants(self) -> list[Participant]:
        """Return all participants in order."""
        return [_participant(row) for row in self._read("SELECT * FROM participants ORDER BY number")]

    def by_token(self, token: str) -> Participant | None:
        """Return whose link holds a token; None: nobody's."""
        rows = self._read("SELECT * FROM participants WHERE token = ?", token)
        return _participant(rows[0]) if rows else None

    def of(self, participant: int) -> list[Vote]:
        """Return a participant's votes."""
        rows = self._read(
            "SELECT task, criterion, choice, seconds, at FROM votes WHERE participant = ?", participant
        )
        return [Vote(*row) for row in rows]  # type: ignore[arg-type]

    def save(self, participant: int, votes: Sequence[Vote]) -> None:
        """Write votes, all or none; one that is there already gives way to a later one."""
        now = time.time()
        rows = [(participant, v.task, v.criterion, v.choice, v.seconds, v.at or now) for v in votes]
        with self._writing() as base:
            base.executemany(
                "INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET choice = excluded.choice, "
                "seconds = excluded.seconds, at = excluded.at WHERE excluded.at >= votes.at",
                rows,
            )

    def undo(self, participant: int, task: int, criterion: str) -> None:
        """Take a vote back."""
        with self._writing() as base:
            base.execute(
                "DELETE FROM votes WHERE participant = ? AND task = ? AND criterion = ?",
                (participant, task, criterion),
            )


def _participant(row: tuple[object, ...]) -> Participant:
    number, token, tasks = row
    assert isinstance(number, int)
    return Participant(
        number, str(token), tuple(Comparison.model_validate(task) for task in json.loads(str(tasks)))
    )


def check_vote(folder: Folder, participant: Participant, vote: Vote) -> None:
    """Raise VoteRefused where a vote answers no question that the participant was asked, or a picture is gone."""
    if not 0 <= vote.task < len(participant.tasks):
        raise VoteRefused(
            f"There is no comparison {vote.task + 1}: yours are 1 to {len(participant.tasks)}. Reload the page."
        )
    settings = folder.study.settings
    if vote.criterion not in [one.name for one in settings.criteria]:
        raise VoteRefused("This study does not ask that. Reload the page.")
    task = participant.tasks[vote.task]
    if vote.choice == TIE and settings.ties:
        return
    if vote.choice not in task.pictures:
        raise VoteRefused("That picture is not one of this comparison. Reload the page.")
    if not folder.file_of(vote.choice).is_file():
        raise VoteRefused(
            "That picture is gone, so the vote was not kept; all earlier ones are. Please tell who invited you."
        )
