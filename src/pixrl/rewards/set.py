"""The rewards of a run together: each is scored on its own, and none is hidden in a sum.

The scores stay separate tensors until the advantage is formed. A set knows the weight of each reward at every step,
limits the time of each call, and stops the run where too large a share of the scores failed.
"""

import copy
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from pixrl import rewards
from pixrl.errors import ConfigError, FailedScoresError, Failure, InputError, ShapeError
from pixrl.plugins import Caught
from pixrl.rewards.actor import RewardOnRay
from pixrl.rewards.base import ComparingReward, DifferentiableReward, Reward
from pixrl.rewards.settings import RewardSetting, Stage, check_rewards, weights_by_stage
from pixrl.types import RewardBatch, Scores

__all__ = ["RewardSet", "RewardSetting", "Stage"]

MAX_FAILED_SHARE = "scoring.max_failed_share"
"""The setting of a recipe that limits the share of failed scores in a `RewardSet`."""
REASONS_SHOWN = 3
"""The number of reasons in the message about failed scores."""
Gather = Callable[[Mapping[str, "Failures"]], Iterable[Mapping[str, "Failures"]]]
"""The type of a function that gives what every process has to each of them."""


@dataclass(frozen=True)
class Failures:
    """The number of pictures that one reward scored, and the reasons of those without a score."""

    pictures: int
    reasons: Counter[str]

    @staticmethod
    def of(scores: Scores) -> "Failures":
        """Count the failures of a batch's scores."""
        return Failures(
            len(scores.reasons), Counter(reason for reason in scores.reasons if reason is not None)
        )

    def __add__(self, other: "Failures") -> "Failures":
        return Failures(self.pictures + other.pictures, self.reasons + other.reasons)

    def require_at_most(self, share: float, reward: str, setting: str) -> None:
        """Require that at most this share of the pictures has no score.

        Args:
            share: the limit, from 0 to 1.
            reward: the reward's name, for the message.
            setting: the recipe's setting that gives the limit, for the message.

        Raises:
            FailedScoresError: a larger share has none; names the reward and the most frequent reasons.
        """
        failed = self.reasons.total()
        if failed <= share * self.pictures:
            return
        shown = [f"{number} x {reason}" for reason, number in self.reasons.most_common(REASONS_SHOWN)]
        others = len(self.reasons) - REASONS_SHOWN
        raise FailedScoresError(
            f"The reward {reward!r} failed for {failed} of {self.pictures} pictures, more than the share "
            f"{share:g} that {setting} allows:\n  "
            + "\n  ".join([*shown, *([f"{others} other reasons"] if others > 0 else [])])
        )


class RewardSet:
    """The rewards of a run, loaded once, with their weights and limits.

    Args:
        settings: the rewards, held-out ones too.
        stages: weights by ranges of steps; empty: the settings' own weights at every step.
        time_limit: seconds that one reward may take for one batch; None: no limit. A call that takes longer fails, and
            so do the following ones for as long as it is still busy. A reward with `keeps_time` has no limit.
        max_failed_share: a share in [0, 1]; the run stops when more than this share of a step's pictures, those of all
            processes together, has no score from one reward, a held-out one included.

    Raises:
        ConfigError: settings or stages contradict each other, or an option is wrong.
        CheckpointError: a model that a reward needs is missing or half written.
    """

    def __init__(
        self,
        settings: Sequence[RewardSetting],
        stages: Sequence[Stage] = (),
        *,
        time_limit: float | None,
        max_failed_share: float,
    ) -> None:
        check_rewards(settings, stages)
        if not 0 <= max_failed_share <= 1:
            raise ConfigError(f"max_failed_share is a share from 0 to 1, got {max_failed_share!r}.")
        self.settings = tuple(settings)
        self.stages = tuple(stages)
        self.max_failed_share = max_failed_share
        self._weights = weights_by_stage(settings, stages)
        self.names: tuple[str, ...] = tuple(setting.name for setting in settings)
        self._rewards: dict[str, Reward] = {
            s.name: RewardOnRay(s) if s.on is not None else rewards.load(s.reward, **s.options)
            for s in settings
        }
        self._callers: dict[str, Caller[Scores | Failure]] = {
            name: Caller(None if one.keeps_time else time_limit) for name, one in self._rewards.items()
        }

    def weights(self, step: int) -> Mapping[str, float]:
        """Return the rewards that are trained on at a step (counted from 0) with their weights above 0."""
        return next(weights for end, weights in self._weights if end is None or step < end)

    def provenance(self) -> Mapping[str, Mapping[str, str]]:
        """Return the provenance of every reward's scores, held-out ones too."""
        return {name: dict(one.provenance) for name, one in self._rewards.items()}

    def differentiable(self) -> Mapping[str, DifferentiableReward]:
        """Return the rewards that are differentiable with respect to the picture."""
        return {name: one for name, one in self._rewards.items() if isinstance(one, DifferentiableReward)}

    def of_single_pictures(self) -> "RewardSet":
        """Return the same set without the rewards that compare a step's pictures, for evaluations."""
        others = copy.copy(self)
        comparing = self._comparisons()
        others.names = tuple(name for name in self.names if name not in comparing)
        return others

    def require_comparable(self, processes: int) -> None:
        """Raise a ConfigError where a reward that compares a step's pictures cannot do so in this run."""
        comparing = self._comparisons()
        if len(comparing) > 1:
            raise ConfigError(
                f"{' and '.join(map(repr, comparing))} both compare a step's pictures, and a run asks one question. "
                "Take one of them out."
            )
        for name, one in comparing.items():
            if (
                problem := one.problem([other for other in self.names if other != name], processes)
            ) is not None:
                raise ConfigError(f"The reward {name!r} {problem}")

    @contextmanager
    def attending(self, folder: Path, say: Callable[[str], None]) -> Iterator[None]:
        """Tell the rewards that compare a step's pictures of the run, and when it ends."""
        comparing = self._comparisons()
        for name, one in comparing.items():
            one.attend(folder, {other: r for other, r in self._rewards.items() if other != name}, say)
        try:
            yield
        finally:
            for one in comparing.values():
                one.leave()

    def _comparisons(self) -> dict[str, ComparingReward]:
        return {name: one for name, one in self._rewards.items() if isinstance(one, ComparingReward)}

    def reference_problems(self, metadata: Mapping[str, object]) -> Mapping[str, str]:
        """Return, by reward, why it can judge no picture by a sample's references, where that is so."""
        found = {name: one.reference_problem(metadata) for name, one in self._rewards.items()}
        return {name: reason for name, reason in found.items() if reason is not None}

    def unused_references(self, metadata: Mapping[str, object]) -> Mapping[str, list[int]]:
        """Return, by reward, which of a sample's references, counted from 1, it leaves out, where it does."""
        found = {name: one.unused_references(metadata) for name, one in self._rewards.items()}
        return {name: numbers for name, numbers in found.items() if numbers}

    def score(self, batch: RewardBatch, gather: Gather | None = None) -> Mapping[str, Scores]:
        """Return every reward's scores [B] of a step's pictures.

        Args:
            batch: the pictures of this process.
            gather: gives what every process has to each of them; None: this process has all pictures. With it all
                processes call together, those without pictures too.

        Raises:
            FailedScoresError: more than `max_failed_share` of all processes' pictures failed, on every process alike;
                names the reward and the reasons.
            ServiceError, ShapeError: as `score_some`.
        """
        if gather is None or len(batch.images_BCHW):
            scores = self.score_some(batch)
        else:
            scores = {name: Scores(torch.zeros(0), ()) for name in self.names}
        failures = {name: Failures.of(one) for name, one in scores.items()}
        self.require_enough([failures] if gather is None else gather(failures))
        return scores

    def score_some(self, batch: RewardBatch) -> Mapping[str, Scores]:
        """Return every reward's scores [B], held-out ones too; nan with a reason where a reward failed.

        A reward that raises, hangs past the time limit or gives the wrong number of scores fails for the whole batch.
        The share of failures is not judged here: `require_enough` does so, over all processes.

        Raises:
            ServiceError: a service that a reward asks is gone for longer than the reward waits.
            ShapeError: there is not one prompt (and one metadata, where there is any) per picture.
            InputError: there is no picture.
        """
        count = _count(batch)
        self.expect(batch)
        return {name: self._score(name, batch, count) for name in self.names}

    def expect(self, batch: RewardBatch) -> None:
        """Hand pictures to the rewards that score elsewhere, so that they begin while others are drawn or scored."""
        for name in self.names:
            self._rewards[name].expect(batch)

    @property
    def are_elsewhere(self) -> bool:
        """Whether any of the rewards scores beside the run, on a cluster."""
        return any(isinstance(one, RewardOnRay) for one in self._rewards.values())

    def broken(self, batch: RewardBatch) -> Mapping[str, str]:
        """Return, by reward, why it cannot score this batch at all: it raises, hangs, or answers in the wrong shape."""
        count = _count(batch)
        found = {name: self._ask(name, lambda reward: reward.rehearse(batch), count) for name in self.names}
        return {name: answer.reason for name, answer in found.items() if isinstance(answer, Failure)}

    def require_enough(self, everywhere: Iterable[Mapping[str, Failures]]) -> None:
        """Check the share of a step's failures over all processes, reward by reward.

        Raises:
            FailedScoresError: more than `max_failed_share` of the pictures failed; names the reward and the reasons.
        """
        whole = {name: Failures(0, Counter()) for name in self.names}
        for tallies in everywhere:
            whole = {name: one + tallies[name] for name, one in whole.items()}
        for name, one in whole.items():
            one.require_at_most(self.max_failed_share, name, MAX_FAILED_SHARE)

    def _score(self, name: str, batch: RewardBatch, count: int) -> Scores:
        answer = self._ask(name, lambda reward: reward.score(batch), count)
        if isinstance(answer, Scores):
            values_B = answer.values_B.detach().cpu()
            return Scores.checked(values_B, answer.reasons, answer.provenance, answer.detail)
        model = {"model": f"{self._rewards[name].name} (failed)"}
        return Scores(torch.full((count,), torch.nan), (answer.reason,) * count, provenance=model)

    def _ask(self, name: str, act: Callable[[Reward], Scores | Failure], count: int) -> Scores | Failure:
        """Return a reward's scores, or why there is none at all. Raise what must end the run."""
        reward = self._rewards[name]
        answer = self._callers[name].call(lambda: act(reward))
        if isinstance(answer, Failure):
            if answer.lost is not None:
                raise answer.lost
            return answer
        shape = list(answer.values_B.shape)
        if shape == [count] and len(answer.reasons) == count:
            return answer
        return Failure(f"it gave scores {shape} with {len(answer.reasons)} reasons for {count} pictures")


def _count(batch: RewardBatch) -> int:
    count = len(batch.images_BCHW)
    if not count:
        raise InputError("There is no picture to score.")
    if len(batch.prompts) != count or len(batch.metadata) not in (0, count):
        raise ShapeError(
            f"A batch of {count} pictures needs {count} prompts, and {count} metadata or none; "
            f"got {len(batch.prompts)} and {len(batch.metadata)}."
        )
    return count


T = TypeVar("T")


class Caller(Generic[T]):
    """A caller of functions that gives their result, or a `Failure` where they raise or take too long.

    A call that takes too long cannot be killed: it is left behind on its own thread, and the next call first waits for
    it, within the same limit. So at most one thread is left behind, and the function never runs twice at once.

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
        """Return the function's result, or why there is none."""
        if self.time_limit is None:
            return _caught(function)
        deadline = time.monotonic() + self.time_limit
        if self._left_behind is not None:
            self._left_behind.join(self.time_limit)
            if self._left_behind.is_alive():
                return Failure(f"still busy with an earlier call after {self.time_limit:g} s more")
            self._left_behind = None
        answers: list[T | Failure] = []
        # a new thread would start on the first GPU
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            with nullcontext() if device is None else torch.cuda.device(device):
                answers.append(_caught(function))

        thread = threading.Thread(target=work, name="pixrl-reward", daemon=True)
        thread.start()
        thread.join(max(deadline - time.monotonic(), 0.0))
        if not answers:
            self._left_behind = thread
            return Failure(f"no answer within {self.time_limit:g} s")
        return answers[0]


def _caught(function: Callable[[], T]) -> T | Failure:
    with Caught() as caught:
        return function()
    assert caught.failure is not None
    return caught.failure
