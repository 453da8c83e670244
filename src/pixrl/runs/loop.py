"""The one loop: collect, score, update, log, evaluate, save. It knows no method: an algorithm is two verbs, a state."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pixrl.algorithms.base import Group, Rollouts
from pixrl.algorithms.world import Tally, World
from pixrl.metrics.spread import Features, group_diversity
from pixrl.rewards.set import RewardSet
from pixrl.runs import checkpoint
from pixrl.runs.align_log import AlignLog
from pixrl.runs.display import Monitor
from pixrl.runs.evaluation import Evaluator, score
from pixrl.runs.interrupts import StopAfterStep
from pixrl.runs.sampler import PromptSampler, share
from pixrl.types import Scores


class Algorithm(Protocol):
    """What is trained. `pixrl.algorithms.trainer.Aligner` is one."""

    def collect(self, groups: Sequence[Group], step: int) -> Rollouts:
        """This process's pictures of a training step."""

    def update(
        self, rollouts: Rollouts, scores: Mapping[str, Scores], weights: Mapping[str, float]
    ) -> dict[str, float]:
        """Learn from their scores; figures for the log."""

    def tensors(self) -> dict[str, Tensor]:
        """Of a checkpoint."""

    def state(self) -> dict[str, float]:
        """The rest of a checkpoint, as JSON."""

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, float]) -> None:
        """Take them up."""


@dataclass(frozen=True)
class Pace:
    """How long a run is and how often it does what."""

    steps: int
    evaluate_every: int | None
    save_every: int
    keep: int


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
            "images_per_second": images / total
        }


@dataclass(frozen=True)
class Loop:
    """A run's parts; `run` plays it."""

    algorithm: Algorithm
    prompts: PromptSampler
    rewards: RewardSet
    evaluator: Evaluator
    features: Features
    log: AlignLog
    monitor: Monitor
    world: World
    pace: Pace
    group_size: int
    before_first_update: Callable[[Rollouts], Mapping[str, float]]
    """Checks that the first update is on-policy; figures for the log."""
    after_first_update: Callable[[], Mapping[str, float]]
    """Checks that all processes agree."""
    start: Mapping[str, Any]
    """What the run began with; every checkpoint keeps a copy, for the day that start.json is lost."""

    def run(self, start: int) -> None:
        """Steps `start` to the last; at Ctrl-C the step in hand is ended and saved, at a second one it is lost.

        The last evaluation is broken off at once: going on with the run draws it again.
        """
        with StopAfterStep(self.monitor.say) as stop:
            for step in range(start, self.pace.steps):
                every = self.pace.evaluate_every
                if step == 0 or (every is not None and step % every == 0):
                    self._evaluate(step)
                self._train(step, first=step == start)
                done = step + 1
                stops = any(self.world.gather(stop.asked))  # all alike, or some would wait for the others
                if stops or done % self.pace.save_every == 0 or done == self.pace.steps:
                    self._save(done)
                if stops:
                    raise KeyboardInterrupt
        self._evaluate(self.pace.steps)

    def _train(self, step: int, *, first: bool) -> None:
        clock = Clock()
        with clock.phase("collect"):
            groups = self.prompts.groups(step)
            rollouts = self.algorithm.collect(
                groups[share(len(groups), self.world.rank, self.world.size)], step
            )
        with clock.phase("score"):
            scores = score(self.rewards, rollouts.samples, rollouts.images_BCHW, self.world)
        checks = dict(self.before_first_update(rollouts)) if first else {}
        with clock.phase("update"):
            metrics = self.algorithm.update(rollouts, scores, self.rewards.weights(step))
        if first:
            checks |= self.after_first_update()
        with clock.phase("diversity"):
            metrics["diversity"] = self._diversity(rollouts)
        images = len(groups) * self.group_size
        metrics |= checks | clock.metrics(images)
        self.log.step(rollouts, scores, images, metrics)
        self.monitor.step(step, metrics)

    def _diversity(self, rollouts: Rollouts) -> float:
        tally = Tally()
        spread_P = group_diversity(rollouts.images_BCHW, self.group_size, self.features)
        tally.add({"diversity": spread_P})
        return tally.over(self.world).means()["diversity"]

    def _evaluate(self, step: int) -> None:
        self.monitor.evaluation(step, self.evaluator.run(self.log, step))

    def _save(self, step: int) -> None:
        state: dict[str, Any] = {
            "images": self.log.images,
            "algorithm": self.algorithm.state(),
            "start": self.start,
        }
        if self.world.rank == 0:
            path = self.log.folder.path
            checkpoint.save(checkpoint.step_folder(path, step), self.algorithm.tensors(), state)
            self.log.folder.step_is_saved()
            checkpoint.keep_last(path, self.pace.keep)
        self.world.gather(None)  # nobody runs ahead of the checkpoint
