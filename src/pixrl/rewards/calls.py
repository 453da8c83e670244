"""Calling what may raise or hang: a user's function, or a reward in the middle of a run."""

import math
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import torch

from pixrl.errors import ConfigError, ServiceError

T = TypeVar("T")
LONGEST_REASON = 300
"""Characters of an exception's message that a reason keeps."""


@dataclass(frozen=True)
class Failure:
    """Why a call gave nothing."""

    reason: str
    lost: ServiceError | None = None
    """What must end the run rather than fail some scores."""


class Caught(AbstractContextManager["Caught"]):
    """Keeps what its block raises as a `failure`, `sys.exit()` included; a KeyboardInterrupt passes."""

    failure: Failure | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception | SystemExit):
            return False
        self.failure = Failure(describe(error), error if isinstance(error, ServiceError) else None)
        return True


def describe(error: BaseException) -> str:
    """`KeyError: 'tag' (my_reward.py:12)`: the exception, and where it was raised."""
    text = " ".join(str(error).split())
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if len(message) > LONGEST_REASON:
        message = f"{message[:LONGEST_REASON]}..."
    frames = traceback.extract_tb(error.__traceback__)
    return f"{message} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else message


class Caller(Generic[T]):
    """Calls a function that gives a T, and gives its failure where it raises or takes too long.

    A call that takes too long cannot be ended: it is left behind on its own thread, and the next call first waits for
    it, within the same limit. So at most one thread is left behind, and the function is never run twice at once.

    Args:
        time_limit: seconds a call may take; None: as long as it likes, on the caller's own thread.

    Raises:
        ConfigError: the limit is not a positive number of seconds.
    """

    def __init__(self, time_limit: float | None) -> None:
        if time_limit is not None and not (math.isfinite(time_limit) and time_limit > 0):
            raise ConfigError(f"time_limit is in seconds and above 0 (or null for none), got {time_limit!r}.")
        self.time_limit = time_limit
        self._left_behind: threading.Thread | None = None

    def call(self, function: Callable[[], T]) -> T | Failure:
        if self.time_limit is None:
            return _caught(function)
        deadline = time.monotonic() + self.time_limit
        if self._left_behind is not None:
            self._left_behind.join(self.time_limit)
            if self._left_behind.is_alive():
                return Failure(f"still busy with an earlier call after {self.time_limit:g} s more")
            self._left_behind = None
        return self._within(function, deadline - time.monotonic())

    def _within(self, function: Callable[[], T], seconds: float) -> T | Failure:
        answers: list[T | Failure] = []
        device = _cuda_device()  # a new thread would start on the first GPU

        def work() -> None:
            with nullcontext() if device is None else torch.cuda.device(device):
                answers.append(_caught(function))

        thread = threading.Thread(target=work, name="pixrl-reward", daemon=True)
        thread.start()
        thread.join(max(seconds, 0.0))
        if not answers:
            self._left_behind = thread
            return Failure(f"no answer within {self.time_limit:g} s")
        return answers[0]


def _cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _caught(function: Callable[[], T]) -> T | Failure:
    with Caught() as caught:
        return function()
    assert caught.failure is not None
    return caught.failure
