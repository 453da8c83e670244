"""What the studio starts beside itself: `pixrl resume`, `export` and `fuse`, each as a process of its own.

A run that was resumed here goes on when the studio is closed.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pixrl.errors import RunError
from pixrl.runs.process import process_of
from pixrl.studio.folders import plain

TAIL = 2000
"""Bytes of a process's last words that are read."""


@dataclass(frozen=True)
class Begun:
    """A process that was started for a run, and where its messages go: a file without a name."""

    command: str
    process: subprocess.Popen[bytes]
    said: IO[bytes]


class Processes:
    """The processes that the studio started, one a run at a time."""

    def __init__(self, program: Sequence[str] = (sys.executable, "-m", "pixrl")) -> None:
        """Start processes of `program`, to which a command and a run's folder are added."""
        self._program = program
        self._begun: dict[Path, Begun] = {}
        self._lock = threading.Lock()

    def begin(self, command: str, run: Path, given: Sequence[str] = ()) -> None:
        """Start `pixrl COMMAND GIVEN RUN`.

        Raises:
            RunError: the run is trained by a process, or the studio has started one that is not done.
        """
        with self._lock:
            if command == "resume" and process_of(run) is not None:
                raise RunError(f"{run.name} is running already.")
            if self._is_busy(run):
                raise RunError(
                    f"{run.name}: {self._begun[run].command} was started here and is not done yet."
                )
            said = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process is done)
            process = subprocess.Popen(
                [*self._program, command, *given, str(run)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # Ctrl-C in the studio's terminal is not meant for it
            )
            self._begun[run] = Begun(command, process, said)

    def busy_with(self, run: Path) -> str | None:
        """Return the command that the studio has started for a run and that is not done; None where there is none."""
        return self._begun[run].command if self._is_busy(run) else None

    def outcome(self, run: Path) -> str:
        """Return the last words of the process that was started for a run once it is done, else an empty text."""
        begun = self._begun.get(run)
        if begun is None or begun.process.poll() is None:
            return ""
        begun.said.seek(0, 2)
        begun.said.seek(max(0, begun.said.tell() - TAIL))
        lines = [line for line in begun.said.read().decode(errors="replace").splitlines() if line.strip()]
        failed = [line for line in lines if line.startswith("Error: ")]
        last = (failed or lines or [""])[-1].removeprefix("Error: ")
        return plain(
            f"{begun.command} failed: {last}" if begun.process.returncode not in (0, 130) else last, run
        )

    def _is_busy(self, run: Path) -> bool:
        begun = self._begun.get(run)
        return begun is not None and begun.process.poll() is None
