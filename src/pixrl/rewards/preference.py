"""What people prefer: a CLIPModel fine-tuned on pairwise choices, in PickScore's published layout.

Kirstain et al. 2023 (Pick-a-Pic): s(x, y) = exp(logit_scale) · cos(E_image(y), E_text(x)). The softmax of two such
scores is the probability that people choose one picture over the other, which is why the scale is part of the score.
`yuvalkirstain/PickScore_v1` takes its tokenizer and preprocessing from `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from pixrl.errors import ConfigError, did_you_mean
from pixrl.rewards.base import Reward
from pixrl.rewards.clip import ClipSimilarity, flag_failures
from pixrl.types import RewardBatch, Scores


class Scale(StrEnum):
    """What the cosine is multiplied by. Group normalization removes the scale; logs and weights of sums keep it."""

    RAW = "raw"
    """exp(logit_scale), as PickScore and E²PO report it: about 19 to 24 for PickScore."""
    DIV26 = "div26"
    """raw / 26, as Flow-GRPO and DiffusionNFT train on it."""
    COSINE = "cosine"
    """1, as D²-Align reports it."""


class PreferenceReward(Reward):
    """Scaled cosine between the picture and its prompt, from a model of people's choices.

    Args:
        model: `toy:preference`, a folder or a hub id of a CLIPModel.
        scale: see `Scale`.
        processor: the checkpoint of the tokenizer and preprocessing, where they are not the model's own.

    Raises:
        ConfigError: there is no such scale.
        CheckpointError: a checkpoint is missing, half written or not a CLIPModel.
    """

    name = "preference"

    def __init__(
        self,
        model: str | Path,
        scale: str = Scale.RAW,
        processor: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        if scale not in list(Scale):
            raise ConfigError(
                f"preference: unknown scale {scale!r}.{did_you_mean(str(scale), Scale)} Use {', '.join(Scale)}."
            )
        self.clip = ClipSimilarity(model, device=device, dtype=dtype, processor=processor)
        learned = self.clip.logit_scale
        self.factor = {Scale.RAW: learned, Scale.DIV26: learned / 26, Scale.COSINE: 1.0}[Scale(scale)]
        self.provenance: Mapping[str, str] = {
            **self.clip.provenance,
            "processor": str(model if processor is None else processor),
            "scale": f"{Scale(scale)} (cosine x {self.factor:.6g})",
        }

    def score(self, batch: RewardBatch) -> Scores:
        images_BE = self.clip.image_features(batch.images_BCHW)
        cosines_B = (images_BE * self.clip.text_features(batch.prompts)).sum(dim=1)
        return flag_failures(self.factor * cosines_B, [None] * len(cosines_B), self.provenance)
