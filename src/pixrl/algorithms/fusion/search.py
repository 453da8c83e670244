"""Searches that state-of-the-art black-box optimizers offer in place of a policy: bisection and CMA-ES.

`Bisection` needs no learning: it looks, noise by noise, for the share at which no concept is above the others.
`EvolutionStrategy` is CMA-ES (Hansen and Ostermeier 2001) over the compact policy's actions, by the library cmaes.
"""

from collections.abc import Mapping
from typing import Any

import cmaes
import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pixrl.algorithms.fusion.base import Feedback, FusionTask, Proposal, Sampler
from pixrl.algorithms.fusion.policy import DEFAULTS, CompactPolicy, PolicyKind
from pixrl.config import Settings
from pixrl.types import sample_seed

_START = -4
"""Epoch of the seed that starts the evolution strategy; steps are 0 and up."""


class BisectionSettings(Settings):
    """The settings of the bisection."""

    depth: int = Field(8, ge=1, le=32)
    """Pictures of one noise: shares are known to 2^-depth. Then come new noises."""


class Bisection(Sampler[BisectionSettings]):
    """Halve, for every noise apart, the interval of shares in which the balance tips from one concept to another.

    A batch has as many noises as pictures; the first pictures mix evenly. After each, the most similar concept hands a
    share of 1/4, then of 1/8 and so on to the least similar one, the same in every column: for two concepts that is
    bisection of a in [0, 1].
    """

    Settings = BisectionSettings

    def __init__(self, task: FusionTask, settings: BisectionSettings) -> None:
        super().__init__(task, settings)
        self.shares_BN = self._even()

    def _even(self) -> Tensor:
        return torch.full((self.task.batch, self.task.concepts), 1 / self.task.concepts)

    def ask(self, count: int, step: int) -> Proposal:
        start, level = divmod(step, self.settings.depth)
        shares_BN = self.shares_BN if level else self._even()
        noises_B = start * self.task.batch + torch.arange(count)
        coefficients_BND = shares_BN[:count, :, None].repeat(1, 1, self.task.columns)
        return Proposal(coefficients_BND, {"level": torch.tensor(level), "shares_BN": shares_BN}, noises_B)

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        level, shares_BN = int(proposal.trace["level"]), proposal.trace["shares_BN"].clone()
        for row, similarities_N in enumerate(feedback.similarities_BN):
            if bool(similarities_N.isnan().any()):
                continue  # tried again where it stands
            most, least = int(similarities_N.argmax()), int(similarities_N.argmin())
            moved = min(2.0 ** -(level + 2), float(shares_BN[row, most]))
            shares_BN[row, most] -= moved
            shares_BN[row, least] += moved
        self.shares_BN = shares_BN
        return {"bisection_level": float(level)}

    def tensors(self) -> dict[str, Tensor]:
        return {"shares_BN": self.shares_BN}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.shares_BN = tensors["shares_BN"]


class EvolutionSettings(Settings):
    """The settings of CMA-ES."""

    sigma: float = Field(0.5, gt=0, le=100)
    """First standard deviation, in logits."""
    groups: int = Field(4, ge=1)
    """Groups of columns that share a coefficient, as in the compact policy."""


class EvolutionStrategy(Sampler[EvolutionSettings]):
    """CMA-ES over a balance and an offset for each group of columns; a batch is a generation.

    A picture without a score counts as the worst of its generation, since only ranks matter. A batch that is smaller
    than a generation, the last one, is not learned from.
    """

    Settings = EvolutionSettings

    def __init__(self, task: FusionTask, settings: EvolutionSettings) -> None:
        super().__init__(task, settings)
        seed = sample_seed(task.seed, _START, 0, 0)
        usual = DEFAULTS[PolicyKind.COMPACT]
        self.decoder = CompactPolicy(
            task,
            groups=settings.groups,
            hidden=1,
            std=usual["std"],
            balance_std=usual["balance_std"],
            seed=seed,
        )
        size = self.decoder.action_size
        self.optimizer = cmaes.CMA(
            mean=np.zeros(size), sigma=settings.sigma, seed=seed % 2**32, population_size=task.batch
        )
        self.actions_TBX = torch.empty(0, task.batch, size, dtype=torch.float64)
        self.losses_TB = torch.empty(0, task.batch, dtype=torch.float64)
        """What each generation proposed and scored: played again, they give the optimizer's state back."""
        self.generation_BX: Tensor | None = None

    def ask(self, count: int, step: int) -> Proposal:
        if self.generation_BX is None:
            drawn = [self.optimizer.ask() for _ in range(self.task.batch)]
            self.generation_BX = torch.from_numpy(np.stack(drawn))
        actions_BX = self.generation_BX[:count]
        return Proposal(self.decoder.coefficients(actions_BX.float()), {"actions_BX": actions_BX})

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        rewards_B = feedback.rewards_B.double()
        if len(proposal) < self.task.batch or bool(rewards_B.isnan().all()):
            return {}
        losses_B = -rewards_B.nan_to_num(float(rewards_B[~rewards_B.isnan()].min()))
        self._learn(proposal.trace["actions_BX"], losses_B)
        return {"cmaes_sigma": float(self.optimizer._sigma)}

    def _learn(self, actions_BX: Tensor, losses_B: Tensor) -> None:
        self.optimizer.tell(list(zip(actions_BX.numpy(), losses_B.tolist(), strict=True)))
        self.actions_TBX = torch.cat((self.actions_TBX, actions_BX[None]))
        self.losses_TB = torch.cat((self.losses_TB, losses_B[None]))
        self.generation_BX = None

    def tensors(self) -> dict[str, Tensor]:
        return {"actions_TBX": self.actions_TBX, "losses_TB": self.losses_TB}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.__init__(self.task, self.settings)  # type: ignore[misc]
        for actions_BX, losses_B in zip(tensors["actions_TBX"], tensors["losses_TB"], strict=True):
            self.ask(self.task.batch, 0)  # its random numbers are used up as they were
            self._learn(actions_BX, losses_B)
