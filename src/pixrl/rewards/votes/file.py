"""A file of votes: SQLite with a write-ahead log, so that a vote that was answered is on the disk.

Several threads share one connection and several processes may have one each; a writer waits for the others.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

from pixrl.errors import CheckpointError, RunError

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
