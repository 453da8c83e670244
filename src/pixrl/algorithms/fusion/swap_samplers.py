"""Swapping whole columns between concepts: BASS and AGSwap, as controls for RMLer.

A coefficient is 0 or 1 here: every column of the fused embedding comes from one concept alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pixrl.algorithms.fusion.base import Feedback, FusionTask, NoSettings, Proposal, Sampler
from pixrl.config import Settings


class BASSSettings(Settings):
    """BASS' own settings."""

    quantile: float = Field(0.5, gt=0, le=1)
    """Of the run's own pictures: those at most this far out in imbalance, and in distance, are kept."""


class BASS(Sampler[BASSSettings]):
    """Balance swap-sampling (Li, Zhang, Yang: TP2O, ECCV 2024): random binary columns, then two filters.

    A picture is kept where |d1 - d2| <= alpha and d1 + d2 <= 2 beta, d = 1 - similarity. alpha and beta are quantiles
    of the run's own pictures. Deviations: 1. the published filter looks at whole pictures and re-ranks on the
    segmented object; both use the segmented object here, which is what every sampler is scored on. 2. N > 2: the
    largest difference, and the mean distance.
    """

    settings_type = BASSSettings

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
    """Coefficients [B, N, D]: 1 for the concept that owns the column, 0 for the others."""
    return torch.nn.functional.one_hot(owner_BD, concepts).movedim(2, 1).float()
