"""Controls without a policy network: random, mean, golden-section search over one balance, reward-guided search.

Each spends the same number of pictures as RMLer. A learned policy that does not beat `random` is a finding.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pixrl.algorithms.fusion.base import Feedback, FusionTask, NoSettings, Proposal, Sampler
from pixrl.config import Settings

_GOLDEN = (math.sqrt(5) - 1) / 2


class RandomMix(Sampler[NoSettings]):
    """Every column's coefficients uniform on the simplex (uniform in [0, 1] for two concepts)."""

    def ask(self, count: int, step: int) -> Proposal:
        return Proposal(uniform_simplex(count, self.task, self.task.generator(step)))


class MeanMix(Sampler[NoSettings]):
    """The mean of the sources every time; only the noise differs."""

    def ask(self, count: int, step: int) -> Proposal:
        shape = (count, self.task.concepts, self.task.columns)
        return Proposal(torch.full(shape, 1 / self.task.concepts))


class GoldenSection(Sampler[NoSettings]):
    """Golden-section search for the best weight of one concept, the same in every column.

    Each batch draws the two inner points of the bracket, half of it each, and the bracket shrinks toward the one with
    the better mean reward; the point that stays keeps the rewards it already has, as the search is over noisy
    pictures. For N > 2 the concepts take turns, batch by batch: one concept's weight is searched while the others
    keep their proportions, each with a bracket of its own.
    """

    def __init__(self, task: FusionTask, settings: NoSettings) -> None:
        super().__init__(task, settings)
        searched = 1 if task.concepts == 2 else task.concepts
        self.low = [0.0] * searched
        self.high = [1.0] * searched
        self.known: list[dict[str, list[float]]] = [{} for _ in range(searched)]
        """Per concept: the rewards that each weight, written with all its digits, has scored."""

    def ask(self, count: int, step: int) -> Proposal:
        turn = step % len(self.low)
        weights = [self._inner(turn)[i % 2] for i in range(count)]
        rows_BN = torch.tensor([self._mix(turn, weight) for weight in weights])
        return Proposal(rows_BN[:, :, None].repeat(1, 1, self.task.columns), {"turn": torch.tensor(turn)})

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        turn = int(proposal.trace["turn"])
        left, right = self._inner(turn)
        known = self.known[turn]
        for i, reward in enumerate(feedback.rewards_B.tolist()):
            if not math.isnan(reward):
                known.setdefault(repr((left, right)[i % 2]), []).append(reward)
        scored = [known.get(repr(weight)) for weight in (left, right)]
        if scored[0] and scored[1]:
            if sum(scored[0]) / len(scored[0]) >= sum(scored[1]) / len(scored[1]):
                self.high[turn] = right
            else:
                self.low[turn] = left
        return {"bracket_low": self.low[turn], "bracket_high": self.high[turn]}

    def _inner(self, turn: int) -> tuple[float, float]:
        low, high = self.low[turn], self.high[turn]
        return high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)

    def _mix(self, turn: int, weight: float) -> list[float]:
        concepts = self.task.concepts
        if concepts == 2:
            return [weight, 1 - weight]
        centers = [(low + high) / 2 for low, high in zip(self.low, self.high, strict=True)]
        others = sum(center for i, center in enumerate(centers) if i != turn)
        return [weight if i == turn else (1 - weight) * centers[i] / others for i in range(concepts)]

    def state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "known": self.known}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.low, self.high = list(state["low"]), list(state["high"])
        self.known = [dict(known) for known in state["known"]]


class SearchSettings(Settings):
    """The settings of the reward-guided search."""

    elite: float = Field(0.25, gt=0, le=1)
    """Share of all pictures so far whose coefficients are varied."""
    std: float = Field(0.7, gt=0)
    """First standard deviation of a variation, in logits; it falls to a third over the budget."""


class RewardSearch(Sampler[SearchSettings]):
    """Reward-guided search without a policy, RMLer's ablation: vary the coefficients that scored best so far.

    The first batch is random. Then each proposal takes one of the best coefficients and adds Gaussian noise to its
    logits, in every column.
    """

    settings_type = SearchSettings

    def __init__(self, task: FusionTask, settings: SearchSettings) -> None:
        super().__init__(task, settings)
        self.logits_BND = torch.empty(0, task.concepts, task.columns)
        self.rewards_B = torch.empty(0)
        self.told = 0

    def ask(self, count: int, step: int) -> Proposal:
        generator = self.task.generator(step)
        if len(self.rewards_B) == 0:
            return Proposal(uniform_simplex(count, self.task, generator))
        best = self.rewards_B.argsort(descending=True, stable=True)[: self._elites()]
        parents_BND = self.logits_BND[best[torch.randint(len(best), (count,), generator=generator)]]
        fade = 3 ** -(step * self.task.batch / self.task.budget)
        # the difference of two concepts' logits varies with std
        noise_BND = (
            torch.randn(parents_BND.shape, generator=generator) * self.settings.std * fade / math.sqrt(2)
        )
        return Proposal((parents_BND + noise_BND).softmax(dim=1))

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        scored_B = ~feedback.rewards_B.isnan()
        logits_BND = proposal.coefficients_BND[scored_B].clamp_min(1e-4).log()
        rewards_B = torch.cat((self.rewards_B, feedback.rewards_B[scored_B].float()))
        logits_BND = torch.cat((self.logits_BND, logits_BND))
        most = max(1, round(self.settings.elite * self.task.budget))  # no other row can become an elite
        kept = rewards_B.argsort(descending=True, stable=True)[:most].sort().values
        self.logits_BND, self.rewards_B = logits_BND[kept], rewards_B[kept]
        self.told += int(scored_B.sum())
        return {"elites": float(self._elites())}

    def _elites(self) -> int:
        return max(1, round(self.settings.elite * self.told))

    def tensors(self) -> dict[str, Tensor]:
        return {"logits_BND": self.logits_BND, "rewards_B": self.rewards_B}

    def state(self) -> dict[str, Any]:
        return {"told": self.told}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.logits_BND, self.rewards_B = tensors["logits_BND"], tensors["rewards_B"]
        self.told = int(state["told"])


def uniform_simplex(count: int, task: FusionTask, generator: torch.Generator) -> Tensor:
    """Coefficients [B, N, D], uniform on the simplex in every column."""
    if task.concepts == 2:
        a_BD = torch.rand(count, task.columns, generator=generator)
        return torch.stack((a_BD, 1 - a_BD), dim=1)
    exponential_BND = (
        -torch.rand(count, task.concepts, task.columns, generator=generator).clamp_min(1e-12).log()
    )
    return exponential_BND / exponential_BND.sum(dim=1, keepdim=True)
