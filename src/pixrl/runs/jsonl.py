"""Append-only JSON lines that survive a crash.

Each line ends in a checksum of itself, `"crc": "1a2b3c4d"`. A last line that is torn (the machine stopped in the
middle of writing it) is dropped; a bad line with more behind it is corruption and raises.
"""

import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixrl.errors import CheckpointError, RunError
from pixrl.runs.files import disk_guard, fsync_folder, write_all
from pixrl.untrusted import parse_json


@dataclass(frozen=True)
class Scan:
    """What a file holds: the good rows from the start, the offset behind each, and where it goes wrong."""

    rows: list[dict[str, Any]]
    ends: list[int]
    bad_line: int | None
    """1-based number of the first bad line, when it is not merely a torn last line."""
    torn: bool = False
    """Whether the last line is."""

    @property
    def good_bytes(self) -> int:
        return self.ends[-1] if self.ends else 0


class JsonLines:
    """One such file. `repair` makes a corrupted file end at its last good line instead of raising."""

    def __init__(self, path: Path, run: Path, *, repair: str = "pixrl resume {run} --repair") -> None:
        """`repair`: the command that goes on from the last good line, for the message about a damaged one."""
        self.path = path
        self._repair = repair.format(run=run)
        self._size: int | None = None
        """Bytes that the file should have, as far as this writer knows; None before it looked."""

    def read(self) -> list[dict[str, Any]]:
        """All rows, without their checksums."""
        return self._scan().rows

    def inspect(self) -> Scan:
        """What the file holds, damaged or not."""
        return self._scan(strict=False)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; when it returns they are on the disk. On a full disk none of them is kept.

        RunError when another process has written since: two that resume one run would spoil it.
        """
        if self._size is None:
            self._cut(self._scan().good_bytes)
        content = "".join(_to_line(row) for row in rows).encode()
        is_new = not self.path.exists()
        with disk_guard(self.path, len(content)):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._append(descriptor, content)
            finally:
                os.close(descriptor)
            if is_new:
                fsync_folder(self.path.parent)

    def keep(self, count: int) -> None:
        """Keeps the first `count` rows."""
        ends = self._scan().ends
        if count > len(ends):
            raise CheckpointError(f"{self.path} has {len(ends)} rows, not {count}.")
        self._cut(ends[count - 1] if count else 0)

    def repair(self) -> int:
        """Cuts the file behind its last good line; returns the number of good lines."""
        scan = self._scan(strict=False)
        self._cut(scan.good_bytes)
        return len(scan.rows)

    def _append(self, descriptor: int, content: bytes) -> None:
        before = os.fstat(descriptor).st_size
        if before != self._size:
            raise RunError(
                f"{self.path} was changed by another process, so this one stops. Let one finish the run."
            )
        done = False
        try:
            write_all(descriptor, content)
            os.fsync(descriptor)
            self._size = before + len(content)
            done = True
        finally:
            if not done:
                os.ftruncate(descriptor, before)

    def _cut(self, size: int) -> None:
        self._size = size
        if not self.path.exists() or self.path.stat().st_size == size:
            return
        with self.path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def _scan(self, strict: bool = True) -> Scan:
        scan = _scan_bytes(self.path.read_bytes() if self.path.exists() else b"")
        if strict and scan.bad_line is not None:
            good = (
                f"Lines 1 to {scan.bad_line - 1} are good"
                if scan.bad_line > 1
                else "No line before it is left"
            )
            raise CheckpointError(
                f"{self.path}, line {scan.bad_line}: does not match its checksum. {good}; to go on from there, "
                f"type: {self._repair}"
            )
        return scan


def _scan_bytes(content: bytes) -> Scan:
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    lines = io.BytesIO(content).readlines()
    end = 0
    for number, line in enumerate(lines, 1):
        row = _from_line(line)
        if row is None:
            torn = number == len(lines)
            return Scan(rows, ends, None if torn else number, torn)
        end += len(line)
        rows.append(row)
        ends.append(end)
    return Scan(rows, ends, None)


def _to_line(row: Mapping[str, Any]) -> str:
    body = json.dumps(row, ensure_ascii=False, allow_nan=False)[:-1]
    return f'{body}, "crc": "{zlib.crc32(body.encode()):08x}"}}\n'


def _from_line(line: bytes) -> dict[str, Any] | None:
    """The row of a whole line, or None when it does not match its checksum."""
    body, mark, tail = line.rpartition(b', "crc": "')
    if not mark or tail != b'%08x"}\n' % zlib.crc32(body):
        return None
    try:
        return dict(parse_json(body + b"}"))
    except (ValueError, TypeError):
        return None
