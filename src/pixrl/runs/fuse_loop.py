"""The loop of a fusion: ask for coefficients, render, score, tell. No files, no screen."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pixrl import algorithms
from pixrl.algorithms.fusion.base import Feedback, Proposal, Sampler
from pixrl.errors import RunError
from pixrl.fusion.noise import NoisePlan
from pixrl.fusion.world import FusionSession
from pixrl.runs.fuse_config import FuseConfig, resolve_options


@dataclass(frozen=True)
class FusionStep:
    """One batch of pictures, scored and learnt from."""

    step: int
    first_index: int
    proposal: Proposal
    seeds: tuple[int, ...]
    images_BCHW: Tensor
    feedback: Feedback
    reasons: tuple[str | None, ...]
    figures: dict[str, float]
    """What the sampler reported of its update."""
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def failed(self) -> int:
        return int(self.feedback.rewards_B.isnan().sum())


def make_sampler(config: FuseConfig, session: FusionSession) -> Sampler[Any]:
    """The sampler that the recipe names, before its first picture."""
    sampler_type = algorithms.load(algorithms.FUSION_SAMPLERS[config.sampler])
    sampler = sampler_type(session.task(), resolve_options(config.sampler, config.options))
    assert isinstance(sampler, Sampler)
    return sampler


def play(
    session: FusionSession, sampler: Sampler[Any], config: FuseConfig, noise: NoisePlan, start: int = 0
) -> Iterator[FusionStep]:
    """The steps of a run from `start` on; each is yielded after the sampler has learnt from it."""
    for step in range(start, config.steps):
        begun = time.perf_counter()
        count = config.count(step)
        proposal = sampler.ask(count, step)
        seeds = noise.seeds(step, count)
        asked = time.perf_counter()
        images_BCHW = session.render(proposal.coefficients_BND, seeds)
        rendered = time.perf_counter()
        similarities_BN, reasons = session.score(images_BCHW)
        scored = time.perf_counter()
        feedback = Feedback.of(similarities_BN, config.alpha, seeds)
        figures = sampler.tell(proposal, feedback)
        noise.tell(seeds, feedback.rewards_B.tolist())
        told = time.perf_counter()
        seconds = {
            "sampler": asked - begun + told - scored,
            "render": rendered - asked,
            "score": scored - rendered,
        }
        first = step * config.batch
        yield FusionStep(step, first, proposal, seeds, images_BCHW, feedback, reasons, figures, seconds)


class FailureWatch:
    """Counts pictures that could not be scored and stops a run in which they are too many."""

    def __init__(self, config: FuseConfig) -> None:
        self.limit = config.max_failed_share
        self.images = 0
        self.reasons: Counter[str] = Counter()

    def count(self, reasons: tuple[str | None, ...]) -> None:
        """Add a step's pictures."""
        self.images += len(reasons)
        self.reasons.update(reason for reason in reasons if reason is not None)

    def check(self) -> None:
        """RunError when the share of failed pictures is above the limit."""
        failed = self.reasons.total()
        if self.images == 0 or failed / self.images <= self.limit:
            return
        reason, times = self.reasons.most_common(1)[0]
        raise RunError(
            f"{failed} of {self.images} pictures could not be scored, above the limit of {self.limit:.0%}; most often "
            f"({times} times): {reason}. What is done is saved. Go on all the same with a higher limit in a new run: "
            f"--set max_failed_share=0.9"
        )
