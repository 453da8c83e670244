"""The reward interface, and the one of rewards whose gradient reaches the picture."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pixrl.errors import Failure
from pixrl.types import RewardBatch, Scores


class Reward(ABC):
    """Scores pictures, higher is better. A sample that cannot be scored gets nan and a reason, never 0."""

    name: str
    provenance: Mapping[str, str]
    """What its scores come from: id, checksum, revision and licence of the weights, and how pictures reach them."""
    keeps_time: ClassVar[bool] = False
    """It bounds its own time, for it may wait long for a service that is gone: a `RewardSet` does not cut it off."""

    @classmethod
    def lacks(cls, prompt: str, metadata: Mapping[str, object], options: Mapping[str, object]) -> str | None:
        """Why no picture of a prompt can be scored, by the prompt and what is known of it; None where nothing is.

        Asked before anything is loaded: `options` are what the reward will be made with.
        """
        return None

    @abstractmethod
    def score(self, batch: RewardBatch) -> Scores:
        """One float a sample. Scores do not depend on how a set is cut into batches."""

    def rehearse(self, batch: RewardBatch) -> Scores | Failure:
        """`score`, of a synthetic batch before a run: a failure where it can score nothing whatever is shown."""
        return self.score(batch)


class DifferentiableReward(Reward):
    """A reward that can also be differentiated by the picture, for direct reward back-propagation.

    Its own parameters are frozen: the gradient goes to the pictures alone.
    """

    @abstractmethod
    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        """Scores [B], float32 on the pictures' device, with a graph back to the pictures.

        They are what `score` gives, but for the rounding to 8 bits, through which no gradient passes: pictures are
        resized, cropped and normalized as tensors, within about one grey level of `score`'s. A sample that `score`
        fails is nan here: leave it out before averaging (`scores[scores.isfinite()]`), or its nan spreads.

        Args:
            images_BCHW: float [B, 3, H, W] in [0, 1]; values outside are clamped and get no gradient.
            prompts: one a picture.
            metadata: one mapping a picture, as in `RewardBatch`; empty where the reward reads none.
        """


def flag_failures(values_B: Tensor, reasons: Sequence[str | None], provenance: Mapping[str, str]) -> Scores:
    """Scores in which a value without a reason is finite: a picture that broke the model fails, it is not 0."""
    given = [
        reason or (None if ok else "the score is not finite")
        for reason, ok in zip(reasons, values_B.isfinite().tolist(), strict=True)
    ]
    failed = torch.tensor([reason is not None for reason in given])
    return Scores(values_B.float().masked_fill(failed, torch.nan), tuple(given), provenance=provenance)
