"""Calling what may raise or hang: a user's function, or a reward in the middle of a run."""

import math
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Generic, TypeVar

import torch

from pixrl.errors import ConfigError, Failure
from pixrl.plugins import Caught

T = TypeVar("T")


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
