"""What raises or hangs becomes a failure with a reason; nothing is run twice at once."""

import threading
import time

import pytest

from pixrl.errors import ConfigError, Failure
from pixrl.rewards.set import Caller


@pytest.mark.parametrize("limit", [None, 60.0])
def test_answers_and_exceptions(limit: float | None) -> None:
    caller: Caller[int] = Caller(limit)
    assert caller.call(lambda: 3) == 3
    failed = caller.call(lambda: {"a": 1}["b"])
    assert isinstance(failed, Failure)
    assert failed.reason.startswith("KeyError: 'b' (test_calls.py:")
    assert caller.call(lambda: 4) == 4


@pytest.mark.parametrize("limit", [None, 60.0])
def test_leaving_the_program_is_a_failure(limit: float | None) -> None:
    def leave() -> int:
        raise SystemExit(1)

    assert isinstance(Caller(limit).call(leave), Failure)


def test_a_keyboard_interrupt_passes() -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Caller(None).call(interrupt)


def test_a_hanging_call_is_left_behind_and_never_doubled() -> None:
    free, calls = threading.Event(), []

    def hang() -> int:
        calls.append(1)
        free.wait()
        return 1

    caller: Caller[int] = Caller(0.05)
    assert caller.call(hang) == Failure("no answer within 0.05 s")
    busy = caller.call(hang)
    assert isinstance(busy, Failure)
    assert "still busy" in busy.reason
    assert len(calls) == 1
    free.set()
    deadline = time.monotonic() + 60
    while isinstance(caller.call(lambda: 5), Failure):
        assert time.monotonic() < deadline
    assert caller.call(lambda: 5) == 5


def test_a_long_message_is_cut() -> None:
    def shout() -> int:
        raise ValueError("x" * 5000)

    failed = Caller(None).call(shout)
    assert isinstance(failed, Failure)
    assert len(failed.reason) < 400


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_limits(limit: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Caller(limit)
