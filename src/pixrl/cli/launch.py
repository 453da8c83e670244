"""`--processes N`: the same command in several processes of this machine, which share each training step.

torchrun starts them too, and on several hosts (docs/scaling.md). Here nothing else has to be typed, an error is said
once, Ctrl-C ends all of them after the step in hand, and the exit code is the run's own.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType

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
            unheard[failed - 1].seek(0)
            sys.stderr.buffer.write(unheard[failed - 1].read())
            sys.stderr.flush()
        code = begun[failed].returncode
        return code if code >= 0 else 128 - code


def _places(processes: int) -> Iterator[dict[str, str]]:
    """Yield what torch.distributed reads of each process's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores())),  # they divide these among them
    }
    for rank in map(str, range(processes)):
        yield shared | {"RANK": rank, "LOCAL_RANK": rank}


def _wait(begun: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Wait until all have ended, or for `GRACE` after one has failed; return the first that has failed, or else 0."""
    until = math.inf
    while None in [one.poll() for one in begun] and time.monotonic() < until:  # a list: each is asked
        if any(one.returncode for one in begun):
            until = min(until, time.monotonic() + GRACE)
        time.sleep(_LOOK)
    return next((rank for rank, one in enumerate(begun) if one.returncode), 0)


@contextlib.contextmanager
def _passing_on(begun: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Leave Ctrl-C to the processes, which have it too; pass SIGTERM on; at the end kill those that still run."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in begun:
            process.send_signal(number)

    def wait(number: int, frame: FrameType | None) -> None:
        pass  # for them, which end after the step in hand

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
