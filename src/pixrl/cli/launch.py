"""`--processes N`: the same command in several processes of this machine, which share each training step.

torchrun starts them too, and on several hosts (docs/scaling.md). Here nothing else has to be typed, an error is said
once, Ctrl-C ends all of them after the step in hand, and the exit code is the run's own.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

import typer

from pixrl.errors import InputError
from pixrl.workers import cores

WORDS = "pixrl.words"
"""Where a command's context keeps the words of the command line."""
GRACE = 3.0
"""Seconds that the others have to end by themselves when one process has failed: its error may be theirs too."""
_LOOK = 0.05


def share_out(context: typer.Context, processes: int) -> None:
    """Go on in a process that does the work; where there is none yet, start them, wait, and end with their exit code.

    Raises:
        InputError: a launcher has started another number of processes.
        typer.Exit: the processes that were started here have ended.
    """
    if "RANK" in os.environ:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if processes not in (1, size):
            raise InputError(
                f"--processes {processes}, and a launcher has started {size} already. Leave --processes out, or start "
                "pixrl without torchrun or accelerate launch."
            )
    elif processes > 1:
        raise typer.Exit(run(context.meta[WORDS], processes))


def run(words: Sequence[str], processes: int) -> int:
    """Run `pixrl WORDS` in so many processes that know each other, and return the exit code.

    The first one speaks. Of the others what they say of an error is printed where the first one did not fail. One
    process is this very one.
    """
    if processes == 1:
        from pixrl.cli import app

        return int(app(list(words), standalone_mode=False) or 0)
    with contextlib.ExitStack() as stack:
        unheard = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]
        begun = [
            subprocess.Popen([sys.executable, "-m", "pixrl", *words], env=os.environ | place, stderr=errors)
            for place, errors in zip(_places(processes), [None, *unheard], strict=True)
        ]
        stack.enter_context(_passing_on(begun))
        failed = _wait(begun)
        if failed > 0:
            sys.stderr.buffer.write(_read(unheard[failed - 1]))
            sys.stderr.flush()
        code = begun[failed].returncode
        return code if code >= 0 else 128 - code


def _places(processes: int) -> Iterator[dict[str, str]]:
    """Yield what torch.distributed reads of each process's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = os.environ.get("OMP_NUM_THREADS", str(cores()))  # which the processes divide among them
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    for rank in map(str, range(processes)):
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        yield shared | sizes | {"RANK": rank, "LOCAL_RANK": rank}


def _wait(begun: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Wait until all have ended and return which one speaks for them: the first one, unless only another failed."""
    until = None
    while None in [
        process.poll() for process in begun
    ]:  # a list: all are asked, also behind one that still runs
        failed = [rank for rank, process in enumerate(begun) if process.returncode]
        if failed and until is None:
            until = time.monotonic() + GRACE
        if until is not None and time.monotonic() > until:
            for process in begun:
                process.kill()
                process.wait()
            return 0 if 0 in failed else failed[0]
        time.sleep(_LOOK)
    failed = [rank for rank, process in enumerate(begun) if process.returncode]
    return failed[0] if failed else 0


@contextlib.contextmanager
def _passing_on(begun: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Wait for the processes at Ctrl-C, which reaches them without this one, and end them where this one is ended."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in begun:
            process.send_signal(number)

    def wait(number: int, frame: FrameType | None) -> None:
        pass  # they end after the step in hand

    acts = ((signal.SIGTERM, pass_on), (signal.SIGINT, wait))
    before = {number: signal.signal(number, act) for number, act in acts}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
        for process in begun:
            if process.poll() is None:
                process.kill()
                process.wait()


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
