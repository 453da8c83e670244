"""Which process trains a run, and how another one asks it to stop.

While a run trains, `process.json` in its folder names the process: host, pid and the moment at which it started, since
a pid alone is given to a stranger later on. Nobody is ever killed: who wants the run to end writes `stop.json`,
addressed to that process, and the loop ends after the step in hand as it does at Ctrl-C.
"""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pixrl.errors import RunError
from pixrl.runs.files import write_atomic
from pixrl.runs.place import PROCESS, STOP

CLOCK = 2.0
"""Seconds by which two readings of when a process started may differ, as clocks are set."""


@dataclass(frozen=True)
class RunProcess:
    """A process that trains a run."""

    host: str
    pid: int
    started: float
    """Seconds since 1970."""

    @staticmethod
    def own() -> "RunProcess":
        """Return this process."""
        return RunProcess(platform.node(), os.getpid(), psutil.Process().create_time())

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine."""
        return self.host == platform.node()

    def is_alive(self) -> bool:
        """Return whether the process is there; one of another machine is taken to be."""
        if not self.is_here:
            return True
        try:
            found = psutil.Process(self.pid)
            ended = found.status() == psutil.STATUS_ZOMBIE
            return not ended and abs(found.create_time() - self.started) < CLOCK
        except psutil.Error:
            return False


class Attendance:
    """The process of a run as its loop sees it: has anybody asked it to stop?"""

    def __init__(self, run: Path, own: RunProcess) -> None:
        self.run = run
        self.own = own

    def stop_is_wanted(self) -> bool:
        """Return whether this process was asked to stop; what was asked of an earlier one does not count."""
        return _read(self.run / STOP) == self.own


@contextlib.contextmanager
def attending(run: Path) -> Iterator[Attendance]:
    """Name this process in a run's folder for the length of the block.

    Raises:
        RunError: the disk is full.
    """
    own = RunProcess.own()
    write_atomic(run / PROCESS, json.dumps(asdict(own)).encode() + b"\n")
    try:
        yield Attendance(run, own)
    finally:
        if _read(run / PROCESS) == own:  # and not one that resumed the run meanwhile
            (run / PROCESS).unlink(missing_ok=True)
            (run / STOP).unlink(missing_ok=True)


def process_of(run: Path) -> RunProcess | None:
    """Return the process that trains a run; None where none does, or where it was killed."""
    found = _read(run / PROCESS)
    return found if found is not None and found.is_alive() else None


def is_stopping(run: Path) -> bool:
    """Return whether the process that trains a run was asked to stop."""
    found = process_of(run)
    return found is not None and _read(run / STOP) == found


def forget_the_dead(run: Path) -> None:
    """Remove what a process left that was killed as it removed its name."""
    if process_of(run) is None:
        (run / PROCESS).unlink(missing_ok=True)
        (run / STOP).unlink(missing_ok=True)


def ask_to_stop(run: Path) -> RunProcess:
    """Ask the process that trains a run to stop after the step in hand, and return it.

    Raises:
        RunError: no process trains it.
    """
    found = process_of(run)
    if found is None:
        raise RunError(
            f"No process trains {run.name}: it was stopped or killed. Go on with it: pixrl resume {run}"
        )
    write_atomic(run / STOP, json.dumps(asdict(found)).encode() + b"\n")
    return found


def _read(file: Path) -> RunProcess | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return RunProcess(str(found["host"]), int(found["pid"]), float(found["started"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
