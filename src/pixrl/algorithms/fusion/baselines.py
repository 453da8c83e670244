"""What RMLer is compared with, on the same number of pictures each.

* without learning: `RandomMix`, `MeanMix` and BASS, which swaps whole columns at random;
* searches: `GoldenSection` for one balance, `RewardSearch` around the best so far, and AGSwap, which flips columns
  toward the weaker concept;
* policy gradients from RMLer's policies: `FusionPPO` with a critic (the paper's Table 1) and `FusionGRPO`.

A learned policy that does not beat `RandomMix` is a finding.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pixrl.algorithms.fusion.base import Feedback, FusionTask, NoSettings, Proposal, Sampler
from pixrl.algorithms.fusion.policy import (
    PolicySampler,
    PolicySettings,
    linear,
    module_tensors,
    restore_module,
)
from pixrl.config import Settings
from pixrl.equations import group_advantages
from pixrl.types import sample_seed

_GOLDEN = (math.sqrt(5) - 1) / 2


class RandomMix(Sampler[NoSettings]):
    """Random mixing: every column's coefficients are uniform on the simplex (in [0, 1] for two concepts)."""

    def ask(self, count: int, step: int) -> Proposal:
        return Proposal(uniform_simplex(count, self.task, self.task.generator(step)))


class MeanMix(Sampler[NoSettings]):
    """The mean of the sources for every picture; only the noise differs."""

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
        if self.task.concepts == 2:
            rows = [[weight, 1 - weight] for weight in weights]
        else:
            centers = [(low + high) / 2 for low, high in zip(self.low, self.high, strict=True)]
            others = sum(center for i, center in enumerate(centers) if i != turn)
            rows = [
                [w if i == turn else (1 - w) * center / others for i, center in enumerate(centers)]
                for w in weights
            ]
        rows_BN = torch.tensor(rows)
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

    Settings = SearchSettings

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
    """Draw coefficients [B, N, D], uniform on the simplex in every column."""
    if task.concepts == 2:
        a_BD = torch.rand(count, task.columns, generator=generator)
        return torch.stack((a_BD, 1 - a_BD), dim=1)
    exponential_BND = (
        -torch.rand(count, task.concepts, task.columns, generator=generator).clamp_min(1e-12).log()
    )
    return exponential_BND / exponential_BND.sum(dim=1, keepdim=True)


_CRITIC = -3


class FusionPPOSettings(PolicySettings):
    """The settings of PPO; gamma and lam are those of RMLer's released, unused, GAE.

    All else is RMLer's, so that the two differ by the critic alone, as in the paper's Table 1.
    """

    gamma: float = Field(0.99, ge=0, le=1)
    """Discount of later rewards; 0 makes it a contextual bandit."""
    lam: float = Field(0.95, ge=0, le=1)
    """Generalized advantage estimation's lambda."""
    value_lr: float = Field(0.01, gt=0)
    """The critic's learning rate."""


class FusionPPO(PolicySampler[FusionPPOSettings]):
    """Standard PPO: a critic V(s), generalized advantage estimation along the batch's trajectory, standardized."""

    Settings = FusionPPOSettings

    def __init__(self, task: FusionTask, settings: FusionPPOSettings) -> None:
        super().__init__(task, settings)
        generator = torch.Generator().manual_seed(sample_seed(task.seed, _CRITIC, 0, 0))
        self.center_D = task.features_ND.mean(dim=0)
        self.spread = (task.features_ND - self.center_D).square().mean().sqrt().clamp_min(1e-6)
        self.critic = nn.Sequential(linear(task.columns, 64, generator), nn.Tanh(), linear(64, 1, generator))
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=settings.value_lr)

    def value(self, states_BD: Tensor) -> Tensor:
        """Return V(s), [B], of states [B, D] or, with the similarities that the critic does not look at, [B, S]."""
        embeddings_BD = states_BD[:, : len(self.center_D)]
        values_B: Tensor = self.critic((embeddings_BD - self.center_D) / self.spread)[:, 0]
        return values_B

    def advantages(self, proposal: Proposal, feedback: Feedback) -> Tensor:
        advantages_B = self.estimate(proposal, feedback.rewards_B)[0]
        return group_advantages(advantages_B.masked_fill(feedback.rewards_B.isnan(), torch.nan)[None])[0]

    @torch.no_grad()
    def estimate(self, proposal: Proposal, rewards_B: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate generalized advantages and the returns that the critic should predict, [B] each.

        A failed picture takes the mean reward here, so that its neighbours' estimates stand; it is not trained on.
        """
        filled_B = rewards_B.nan_to_num(float(rewards_B.nanmean()))
        values_B = self.value(proposal.trace["states_BS"])
        next_B = torch.cat((values_B[1:], self.value(proposal.trace["next_D"][None])))
        advantages_B = torch.zeros_like(filled_B)
        running = torch.zeros(())
        for t in reversed(range(len(filled_B))):
            delta = filled_B[t] + self.settings.gamma * next_B[t] - values_B[t]
            running = delta + self.settings.gamma * self.settings.lam * running
            advantages_B[t] = running
        return advantages_B, advantages_B + values_B

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        scored_B = ~feedback.rewards_B.isnan()
        if int(scored_B.sum()) < 2:
            return super().tell(proposal, feedback)
        returns_B = self.estimate(proposal, feedback.rewards_B)[1]
        figures = super().tell(proposal, feedback)
        for _ in range(self.settings.epochs):
            loss = (self.value(proposal.trace["states_BS"]) - returns_B)[scored_B].square().mean()
            self.critic_optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.critic_optimizer.step()
        return figures | {"value_loss": float(loss.detach())}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | module_tensors("critic", self.critic, self.critic_optimizer)

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        super().restore(tensors, state)
        restore_module("critic", self.critic, self.critic_optimizer, tensors)


class FusionGRPOSettings(PolicySettings):
    """The settings of GRPO over coefficients."""

    kl: float = Field(0.01, ge=0)
    """Weight of the KL divergence to the first policy."""


class FusionGRPO(PolicySampler[FusionGRPOSettings]):
    """GRPO: one state, s_0, for all; a group is a batch, or the pictures of one noise; KL to the first policy."""

    Settings = FusionGRPOSettings

    def __init__(self, task: FusionTask, settings: FusionGRPOSettings) -> None:
        super().__init__(task, settings)
        self.first = copy.deepcopy(self.policy).requires_grad_(False)

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        super().adopt(tensors)
        self.first = copy.deepcopy(self.policy).requires_grad_(False)

    def transition(self, coefficients_ND: Tensor) -> Tensor:
        return self.state_D

    def advantages(self, proposal: Proposal, feedback: Feedback) -> Tensor:
        advantages_PG = group_advantages(feedback.by_noise())
        return advantages_PG.sum(dim=0)

    def penalty(self, states_BS: Tensor) -> Tensor | None:
        if self.settings.kl == 0:
            return None
        mean_BX, log_std_BX = self.policy.gaussian(states_BS)
        first_mean_BX, first_log_std_BX = self.first.gaussian(states_BS)
        variance_ratio_BX = (2 * (log_std_BX - first_log_std_BX)).exp()
        distance_BX = ((mean_BX - first_mean_BX) * (-first_log_std_BX).exp()) ** 2
        kl_BX = 0.5 * (variance_ratio_BX + distance_BX - 1) - (log_std_BX - first_log_std_BX)
        return self.settings.kl * kl_BX.sum(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        first = {f"first/{name}": x for name, x in self.first.state_dict().items()}
        return super().tensors() | first

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        super().restore(tensors, state)
        first = {name.removeprefix("first/"): x for name, x in tensors.items() if name.startswith("first/")}
        if first:  # runs of before it was kept began with the one that the seed gives
            self.first.load_state_dict(first)


class BASSSettings(Settings):
    """The settings of BASS."""

    quantile: float = Field(0.5, gt=0, le=1)
    """Of the run's own pictures: those at most this far out in imbalance, and in distance, are kept."""


class BASS(Sampler[BASSSettings]):
    """Balance swap-sampling (Li, Zhang, Yang: TP2O, ECCV 2024): random binary columns, then two filters.

    A picture is kept where |d1 - d2| <= alpha and d1 + d2 <= 2 beta, d = 1 - similarity. alpha and beta are quantiles
    of the run's own pictures. Deviations: 1. the published filter looks at whole pictures and re-ranks on the
    segmented object; both use the segmented object here, which is what every sampler is scored on. 2. N > 2: the
    largest difference, and the mean distance.
    """

    Settings = BASSSettings

    def ask(self, count: int, step: int) -> Proposal:
        generator = self.task.generator(step)
        owner_BD = torch.randint(self.task.concepts, (count, self.task.columns), generator=generator)
        return Proposal(one_owner(owner_BD, self.task.concepts))

    @staticmethod
    def shortlist(settings: BASSSettings, similarities_BN: Tensor) -> Tensor:
        distances_BN = 1 - similarities_BN
        imbalance_B = distances_BN.amax(dim=1) - distances_BN.amin(dim=1)
        mean_B = distances_BN.mean(dim=1)
        scored = ~mean_B.isnan()
        if not bool(scored.any()):
            return scored
        alpha = imbalance_B[scored].quantile(settings.quantile)
        beta = mean_B[scored].quantile(settings.quantile)
        return (imbalance_B <= alpha) & (mean_B <= beta)


class AGSwap(Sampler[NoSettings]):
    """Adaptive group swapping (Zhang and others, SIGGRAPH Asia 2025): flip columns toward the weaker concept.

    As many chains as a batch has pictures, each begun with random binary columns. After every picture a chain hands
    columns of its strongest concept to its weakest; how many follows the imbalance it just saw, from one column to a
    quarter of all. A failed picture leaves its chain as it was.
    """

    def __init__(self, task: FusionTask, settings: NoSettings) -> None:
        super().__init__(task, settings)
        generator = task.generator(-1)
        self.owner_BD = torch.randint(task.concepts, (task.batch, task.columns), generator=generator)

    def ask(self, count: int, step: int) -> Proposal:
        return Proposal(one_owner(self.owner_BD[:count], self.task.concepts), {"step": torch.tensor(step)})

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        generator = self.task.generator(int(proposal.trace["step"]))
        order_BD = torch.rand(self.owner_BD.shape, generator=generator).argsort(dim=1)
        flipped = 0
        self.owner_BD = self.owner_BD.clone()
        for row, similarities_N in enumerate(feedback.similarities_BN):
            if bool(similarities_N.isnan().any()):
                continue
            strong, weak = int(similarities_N.argmax()), int(similarities_N.argmin())
            imbalance = float(similarities_N[strong] - similarities_N[weak])
            group = max(1, round(min(imbalance, 0.25) * self.task.columns))
            columns = [column for column in order_BD[row].tolist() if self.owner_BD[row, column] == strong]
            self.owner_BD[row, columns[:group]] = weak
            flipped += min(group, len(columns))
        return {"columns_flipped": flipped / max(1, len(proposal))}

    def tensors(self) -> dict[str, Tensor]:
        return {"owner_BD": self.owner_BD}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.owner_BD = tensors["owner_BD"]


def one_owner(owner_BD: Tensor, concepts: int) -> Tensor:
    """Return coefficients [B, N, D]: 1 for the concept that owns the column, 0 for the others."""
    return torch.nn.functional.one_hot(owner_BD, concepts).movedim(2, 1).float()
