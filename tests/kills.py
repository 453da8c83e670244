"""Processes that die in the middle of a file operation: a forked child that ends itself at its n-th one.

An operation is a write (which is torn in half), a rename, a replace, an fsync, a truncation or a removal, counted from
the call of `killed_at` on. `os._exit` is what SIGKILL is: no `finally`, no flush, no handler.
"""

import itertools
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

KILLED, FAILED = 77, 3
OPERATIONS = ("write", "rename", "replace", "fsync", "ftruncate", "truncate", "unlink", "rmdir", "mkdir")


@contextmanager
def watched(die_at: int | None) -> Iterator[Callable[[], int]]:
    """Counts the operations within; the process ends itself at the one of number `die_at`, the first being 0."""
    count = itertools.count()
    done = [0]
    originals = {name: getattr(os, name) for name in OPERATIONS}

    def dying(name: str) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            number = next(count)
            done[0] = number + 1
            if number == die_at:
                if name == "write":
                    originals["write"](given[0], given[1][: len(given[1]) // 2])
                os._exit(KILLED)
            return originals[name](*given, **named)

        return operation

    for name in OPERATIONS:
        setattr(os, name, dying(name))
    try:
        yield lambda: done[0]
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def in_child(work: Callable[[], object], die_at: int | None = None) -> tuple[int, int]:
    """Runs `work` in a forked process; its exit status (KILLED, FAILED or 0) and how many operations it made."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        status = FAILED
        torch.set_num_threads(1)  # the threads that the parent's operations run in are not here
        try:
            with watched(die_at) as count:
                work()
            os.write(writes, str(count()).encode())
            status = 0
        finally:
            if status:
                traceback.print_exc(file=sys.stderr)
            os._exit(status)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        count = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(count or 0)


def sample(total: int, size: int, seed: int = 0) -> list[int]:
    """Numbers below `total`: all of them, or, where they are more than `size`, the first, the last and a choice."""
    if total <= size:
        return list(range(total))
    chosen = random.Random(seed).sample(range(1, total - 1), size - 2)
    return sorted({0, total - 1, *chosen})


def content(run: Path, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file of a run by its name, without those under `without`."""
    files = (file for file in sorted(run.rglob("*")) if file.is_file())
    named = {file.relative_to(run).as_posix(): file.read_bytes() for file in files}
    return {name: data for name, data in named.items() if not name.startswith(without)}
