"""The one loop of fuse, align and personalize: collect, score, update, log, evaluate, save.

It knows no method. An algorithm draws pictures, has them scored and learns from the scores; what differs between the
jobs is the algorithm and the record that keeps its steps.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pixrl.algorithms.world import Alone, World
from pixrl.errors import RunError, ServiceError
from pixrl.runs.display import Monitor
from pixrl.runs.files import resource_guard

STOPPING = (
    "Stopping after this step, which is then saved. Ctrl-C again stops at once, at the last checkpoint."
)
R = TypeVar("R")
"""Rollouts: the pictures of a step, and how they came about."""
S = TypeVar("S")
"""Their scores."""
R_contra = TypeVar("R_contra", contravariant=True)
S_contra = TypeVar("S_contra", contravariant=True)


@dataclass
class Clock:
    """Seconds by phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what is within; a GPU's work is waited for."""
        begun = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def metrics(self, images: int) -> dict[str, float]:
        """seconds/PHASE, and pictures a second over all phases."""
        total = sum(self.seconds.values())
        return {f"seconds/{name}": x for name, x in self.seconds.items()} | {
            "images_per_second": images / total if total > 0 else torch.nan
        }


class Algorithm(Protocol[R, S]):
    """What a run trains, and with what: three verbs a step, and a state that a checkpoint keeps."""

    def images(self, step: int) -> int:
        """Pictures of a step, over all processes."""

    def collect(self, step: int, clock: Clock) -> R:
        """This process's pictures of a step."""

    def score(self, rollouts: R, clock: Clock) -> S:
        """Their scores; a picture that could not be scored has a reason."""

    def update(self, rollouts: R, scores: S, clock: Clock) -> dict[str, float]:
        """Learn from the scores; figures for the log."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state, for a checkpoint."""

    def state(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take up a saved state: the next step is what it would have been without the break."""


class Record(Protocol[R_contra, S_contra]):
    """What keeps the steps of a run on a disk, in order."""

    def step(self, rollouts: R_contra, scores: S_contra, metrics: Mapping[str, float]) -> None:
        """Pictures, one manifest line each, and one line of metrics."""

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """A checkpoint after so many steps; called after the step itself is kept."""

    def wait(self) -> None:
        """Until all that was handed over is on the disk."""

    def close(self) -> None:
        """No more is written."""


@dataclass(frozen=True)
class Step(Generic[R, S]):
    """One step: what was drawn, what it scored, and the figures of both."""

    rollouts: R
    scores: S
    metrics: dict[str, float]


def take_step(algorithm: Algorithm[R, S], step: int) -> Step[R, S]:
    """Collect, score, update: no files, no screen."""
    clock = Clock()
    rollouts = algorithm.collect(step, clock)
    scores = algorithm.score(rollouts, clock)
    metrics = algorithm.update(rollouts, scores, clock)
    return Step(rollouts, scores, metrics | clock.metrics(algorithm.images(step)))


@dataclass(frozen=True)
class Pace:
    """How long a run is and how often it does what. `evaluate_every` None: before the first step and after the last."""

    steps: int
    save_every: int = 1
    evaluate_every: int | None = None


@dataclass(frozen=True)
class Loop(Generic[R, S]):
    """A run's parts; `run` plays it."""

    algorithm: Algorithm[R, S]
    record: Record[R, S]
    monitor: Monitor
    pace: Pace
    kept: Mapping[str, Any]
    """What the run began with; every checkpoint keeps a copy, for the day that its file is lost."""
    evaluate: Callable[[int], Mapping[str, float]] | None = None
    """Figures of what was learnt, before training step ...; None: nothing is held out."""
    watch: Callable[[S], None] | None = None
    """Looks at a step's scores after the step is saved: a RunError where the run had better stop."""
    world: World = field(default_factory=Alone)

    def run(self, folder: Path, start: int, images: int) -> None:
        """Steps `start` to the last; at Ctrl-C the step in hand is ended and saved, at a second one it is lost.

        The last evaluation is broken off at once: going on with the run draws it again.

        Args:
            folder: the run's, for messages.
            start: steps that are done.
            images: pictures that they made.

        Raises:
            RunError: the run had to stop: no room or memory, or too many pictures without a score.
            ServiceError: a service that a reward asks is gone.
            KeyboardInterrupt: after the step in hand was saved.
        """
        try:
            with resource_guard(folder):
                self._play(start, images)
                self.record.wait()
        except ServiceError as error:
            raise ServiceError(
                f"{error} The run is kept up to its last checkpoint: when the service is there again, type: "
                f"pixrl resume {folder}"
            ) from error
        finally:
            self.record.close()
            self.monitor.end()

    def _play(self, start: int, images: int) -> None:
        with StopAfterStep(self.monitor.say) as stop:
            for step in range(start, self.pace.steps):
                every = self.pace.evaluate_every
                if step == 0 or (every is not None and step % every == 0):
                    self._evaluate(step)
                taken = self._train(step)
                done = step + 1
                images += self.algorithm.images(step)
                stops = any(self.world.gather(stop.asked))  # all alike, or some would wait for the others
                if stops or done % self.pace.save_every == 0 or done == self.pace.steps:
                    state = {"images": images, **self.algorithm.state(), **self.kept}
                    self.record.save(done, self.algorithm.tensors(), state)
                if self.watch is not None:
                    self._check(self.watch, taken.scores)
                if stops:
                    self.record.wait()
                    raise KeyboardInterrupt
        self._evaluate(self.pace.steps)

    def _train(self, step: int) -> Step[R, S]:
        taken = take_step(self.algorithm, step)
        self.record.step(taken.rollouts, taken.scores, taken.metrics)
        self.monitor.step(self.algorithm.images(step), taken.metrics)
        return taken

    def _check(self, watch: Callable[[S], None], scores: S) -> None:
        try:
            watch(scores)
        except RunError:
            self.record.wait()  # what is done is saved
            raise

    def _evaluate(self, step: int) -> None:
        if self.evaluate is not None:
            self.monitor.evaluation(step, self.evaluate(step))


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
