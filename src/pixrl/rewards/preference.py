"""Human-preference rewards: a CLIPModel fine-tuned on pairwise choices, in PickScore's published layout.

Kirstain et al. 2023 (Pick-a-Pic): s(x, y) = exp(logit_scale) · cos(E_image(y), E_text(x)). The softmax of two such
scores is the probability that people choose one picture over the other, which is why the scale is part of the score.
`yuvalkirstain/PickScore_v1` takes its tokenizer and preprocessing from `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from pixrl.rewards.base import Form, Options, Read
from pixrl.rewards.clip import PromptCosineReward
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.references import choice


class ScoreScale(StrEnum):
    """The factor of the cosine. Group normalization removes it; logs and weighted sums of rewards keep it."""

    RAW = "raw"
    """The factor exp(logit_scale), as PickScore and E²PO report it: about 19 to 24 for PickScore."""
    DIV26 = "div26"
    """The raw scale divided by 26, on which Flow-GRPO and DiffusionNFT train."""
    COSINE = "cosine"
    """The factor 1, as D²-Align reports it."""


class PreferenceReward(PromptCosineReward):
    """The scaled cosine between the picture and its prompt, from a model of people's choices.

    Args:
        model: `toy:preference`, a folder or a hub id of a CLIPModel.
        scale: see `ScoreScale`.
        processor: the checkpoint of the tokenizer and preprocessing, where they are not the model's own.

    Raises:
        ConfigError: there is no such scale.
        CheckpointError: a checkpoint is missing, half written or not a CLIPModel.
    """

    name = "preference"
    examples: ClassVar[Mapping[str, object]] = {"model": "toy:preference"}

    def __init__(
        self,
        model: str | Path,
        scale: str = ScoreScale.RAW,
        processor: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        chosen = choice(self.name, "scale", scale, ScoreScale)
        clip = ClipSimilarity(model, device=device, dtype=dtype, processor=processor)
        factor = {
            ScoreScale.RAW: clip.logit_scale,
            ScoreScale.DIV26: clip.logit_scale / 26,
            ScoreScale.COSINE: 1.0,
        }[chosen]
        super().__init__(clip, factor=factor, provenance={"scale": f"{chosen} (cosine x {factor:.6g})"})

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        whole = Read(kinds=("clip",), alone=options.get("processor") is not None)
        return {"model": whole, "processor": Read(Form.WORDS)}
