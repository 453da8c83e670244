"""Which pictures share the generator's noise.

The noise decides much of a picture: its composition, and often which parent it takes after. Where pictures of a batch
share it, their rewards differ by the coefficients alone (common random numbers); where all share it, the coefficients
are fitted to that one noise; where none do, more of the budget goes into luck. The sampler is told which pictures
shared theirs.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from pixrl.types import sample_seed

FEW = 4
"""`narrow`: noises that stay in the game. `group`: pictures that share one."""


class Noise(StrEnum):
    """Which pictures share the generator's noise."""

    IMAGE = "image"
    """None do."""
    GROUP = "group"
    """Each four neighbours of a batch."""
    BATCH = "batch"
    """Those of one batch."""
    RUN = "run"
    """All of them: the paper's code."""
    NARROW = "narrow"
    """In the first half of the budget none do; the second half takes the four noises that scored best, in turn."""


class NoisePlan:
    """A plan that hands out seeds. They do not depend on the concepts: a pair's run in a list is its run alone."""

    def __init__(self, kind: Noise, run_seed: int, batches: int) -> None:
        self.kind = kind
        self.run_seed = run_seed
        self.wide = (batches + 1) // 2
        """`narrow`: batches with a noise a picture."""
        self.best: dict[int, float] = {}
        """`narrow`: the best reward of each noise so far."""

    def seeds(self, step: int, count: int) -> tuple[int, ...]:
        """Return the seeds of a step's pictures."""
        if self.kind is Noise.RUN:
            return (sample_seed(self.run_seed, 0, 0, 0),) * count
        if self.kind is Noise.BATCH:
            return (sample_seed(self.run_seed, step, 0, 0),) * count
        if self.kind is Noise.GROUP:
            return tuple(sample_seed(self.run_seed, step, 0, i // FEW) for i in range(count))
        if self.kind is Noise.NARROW and step >= self.wide and self.best:
            ranked = sorted(self.best, key=lambda seed: -self.best[seed])[:FEW]
            return tuple(ranked[i % len(ranked)] for i in range(count))
        return tuple(sample_seed(self.run_seed, step, 0, i) for i in range(count))

    def numbered(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Return the seeds of noises that a sampler chose by number."""
        return tuple(sample_seed(self.run_seed, 0, 0, number) for number in numbers)

    def tell(self, seeds: Sequence[int], rewards: Sequence[float]) -> None:
        """Learn what the noises scored; nan where scoring failed."""
        if self.kind is not Noise.NARROW:
            return
        for seed, reward in zip(seeds, rewards, strict=True):
            if reward == reward:
                self.best[seed] = max(reward, self.best.get(seed, reward))

    def state(self) -> dict[str, Any]:
        return {str(seed): reward for seed, reward in self.best.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.best = {int(seed): float(reward) for seed, reward in state.items()}
