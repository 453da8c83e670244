"""Ctrl-C while a run trains: the step in hand is ended first, so that it can be saved."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

STOPPING = (
    "Stopping after this step, which is then saved. Ctrl-C again stops at once, at the last checkpoint."
)


class StopAfterStep:
    """Notes the first Ctrl-C within; the next one interrupts as usual.

    Where Ctrl-C is not Python's own (another thread, a program with a handler of its own) nothing is changed.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = False
        self._say = say
        self._holds = False

    def __enter__(self) -> "StopAfterStep":
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._holds = True
        return self

    def __exit__(self, *of_error: object) -> None:
        self._let_go()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._let_go()
        # from a thread of its own: the main one may be in the middle of printing
        threading.Thread(target=self._say, args=(STOPPING,), daemon=True).start()

    def _let_go(self) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._holds = False
