"""The training loop of fuse, align and personalize: collect, score, update, log, save, evaluate.

The loop knows no method. An `Algorithm` draws pictures, has them scored and learns from the scores; a `Record` keeps
the steps on the disk; a `Monitor` shows them. The jobs differ in the algorithm and the record that they pass. Read
`Loop._play` first.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from pixrl.runs.process import Attendance, attending

STOPPING = (
    "Stopping after this step, which is then saved. Ctrl-C again stops at once, at the last checkpoint."
)
ASKED = "Another process asked this run to stop: it ends after this step, which is saved."
R = TypeVar("R")
"""The rollouts of an algorithm: the pictures of a step, and how they were drawn."""
S = TypeVar("S")
"""The scores of an algorithm's rollouts."""
R_contra = TypeVar("R_contra", contravariant=True)
S_contra = TypeVar("S_contra", contravariant=True)


@dataclass
class Clock:
    """A stopwatch that sums the seconds of one training step by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the `with` block to a phase, after waiting for the GPU's work."""
        begun = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def metrics(self, images: int) -> dict[str, float]:
        """Return `seconds/PHASE` for each phase, and `images_per_second` over all phases; nan where there are none."""
        total = sum(self.seconds.values())
        return {f"seconds/{name}": x for name, x in self.seconds.items()} | {
            "images_per_second": images / total if total > 0 else torch.nan
        }


class Algorithm(Protocol[R, S]):
    """A training method as the loop sees it: three verbs a step, and a state that a checkpoint keeps."""

    def images(self, step: int) -> int:
        """Return the number of pictures of a step, over all processes."""

    def collect(self, step: int, clock: Clock) -> R:
        """Draw this process's pictures of a step."""

    def score(self, rollouts: R, clock: Clock) -> S:
        """Score the rollouts; a picture that could not be scored has nan and a reason."""

    def update(self, rollouts: R, scores: S, clock: Clock) -> dict[str, float]:
        """Take the optimizer steps that the scores ask for, and return figures for the log."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the training state, for a checkpoint."""

    def state(self) -> dict[str, Any]:
        """Return the rest of the training state as JSON values, for a checkpoint."""

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Load a saved state, after which the next step is bit for bit that of an unbroken run."""


class Record(Protocol[R_contra, S_contra]):
    """The files of a run as the loop sees them: what keeps its steps on the disk, in order."""

    def step(self, rollouts: R_contra, scores: S_contra, metrics: Mapping[str, float]) -> None:
        """Write the pictures of a step, one manifest line each, and one line of metrics."""

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint after `step` steps; called after the last of them was given to `step`."""

    def wait(self) -> None:
        """Wait until everything that was handed over is on the disk."""

    def close(self) -> None:
        """End the writing: nothing is handed over any more."""


@dataclass(frozen=True)
class Step(Generic[R, S]):
    """One training step: what was drawn, how it scored, and the figures for the log."""

    rollouts: R
    scores: S
    metrics: dict[str, float]


def take_step(algorithm: Algorithm[R, S], step: int) -> Step[R, S]:
    """Collect, score and update once, without files or screen."""
    clock = Clock()
    rollouts = algorithm.collect(step, clock)
    scores = algorithm.score(rollouts, clock)
    metrics = algorithm.update(rollouts, scores, clock)
    return Step(rollouts, scores, metrics | clock.metrics(algorithm.images(step)))


@dataclass(frozen=True)
class Pace:
    """The length of a run, and how often it saves and evaluates, all in training steps."""

    steps: int
    save_every: int = 1
    evaluate_every: int | None = None
    """None evaluates before the first step and after the last one alone."""


@dataclass(frozen=True)
class Loop(Generic[R, S]):
    """The parts of a run, which `run` trains to its last step."""

    algorithm: Algorithm[R, S]
    record: Record[R, S]
    monitor: Monitor
    pace: Pace
    kept: Mapping[str, Any]
    """What every checkpoint keeps beside the state: a copy of what the run began with, should its file be lost."""
    evaluate: Callable[[int], Mapping[str, float]] | None = None
    """Evaluates on held-out prompts before a training step and returns the figures; None where nothing is held out."""
    watch: Callable[[S], None] | None = None
    """Looks at a step's scores after the step is saved, and raises a RunError where the run had better stop.

    Fuse alone has one. Align and personalize check earlier: `Algorithm.score` raises (`RewardSet.score`) before
    anything is learned from the step, which is then not saved.
    """
    world: World = field(default_factory=Alone)

    def run(self, folder: Path, start: int, images: int) -> None:
        """Train from step `start` to the last one.

        The first Ctrl-C lets the current step end and saves it, as does `process.ask_to_stop` of another process; a
        second one interrupts at once. During the last
        evaluation the first one interrupts already: resuming the run draws that evaluation again.

        Args:
            folder: the run's folder, for messages.
            start: the number of steps that are done.
            images: the number of pictures that those steps drew.

        Raises:
            RunError: the run had to stop: no room or memory, or too many pictures without a score.
            ServiceError: a service that a reward asks is gone.
            KeyboardInterrupt: after the step in hand was saved.
        """
        try:
            leads = self.world.rank == 0
            with resource_guard(folder), attending(folder) if leads else nullcontext() as attendance:
                self._play(start, images, attendance)
                self.record.wait()
        except ServiceError as error:
            raise ServiceError(
                f"{error} The run is kept up to its last checkpoint: when the service is there again, type: "
                f"pixrl resume {folder}"
            ) from error
        finally:
            self.record.close()
            self.monitor.end()

    def _play(self, start: int, images: int, attendance: Attendance | None) -> None:
        with StopAfterStep(self.monitor.say) as stop:
            for step in range(start, self.pace.steps):
                every = self.pace.evaluate_every
                if step == 0 or (every is not None and step % every == 0):
                    self._evaluate(step)
                taken = self._train(step)
                done = step + 1
                images += self.algorithm.images(step)
                asked = attendance is not None and attendance.stop_is_wanted()
                if asked:
                    self.monitor.say(ASKED)
                # all alike, or some would wait for the others
                stops = any(self.world.gather(stop.asked or asked))
                if stops or done % self.pace.save_every == 0 or done == self.pace.steps:
                    state = {"images": images, **self.algorithm.state(), **self.kept}
                    self.record.save(done, self.algorithm.tensors(), state)
                if self.watch is not None:
                    try:
                        self.watch(taken.scores)
                    except RunError:
                        self.record.wait()  # what is done is saved
                        raise
                if stops:
                    self.record.wait()
                    raise KeyboardInterrupt
        self._evaluate(self.pace.steps)

    def _train(self, step: int) -> Step[R, S]:
        taken = take_step(self.algorithm, step)
        self.record.step(taken.rollouts, taken.scores, taken.metrics)
        self.monitor.step(self.algorithm.images(step), taken.metrics)
        return taken

    def _evaluate(self, step: int) -> None:
        if self.evaluate is not None:
            self.monitor.evaluation(step, self.evaluate(step))


class StopAfterStep:
    """A context in which the first Ctrl-C only sets `asked`, and the next one interrupts as usual.

    Where Python does not handle Ctrl-C itself (another thread, a program with its own handler) nothing is changed.
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
