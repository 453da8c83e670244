"""Z-Image and Z-Image-Turbo as a trainable flow policy, on diffusers' ZImagePipeline.

Latents run from noise (t = 1) to data (t = 0). The transformer is fed 1 - t and predicts data - noise. A prompt is read
by a language model as one turn of a chat, and its caption keeps its own length: `encode` pads it with zeros that the
mask tells apart, and the transformer, which takes a list of captions, is given the caption alone.

`guidance` g is the pipeline's: v = c + g (c - u), without a second pass at 0. In the words of other families that is a
scale of 1 + g.

The published models differ in one number of their configs: Turbo's schedule is shifted by 3, the base model's by 6.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixrl.hub_check import read_json
from pixrl.models.base import Conditioning, SamplingSettings
from pixrl.models.language import LanguagePolicy, chat_frame
from pixrl.models.memory.plan import MemoryPlan
from pixrl.models.text import PerturbableText

PATCH = 2
"""Rows and columns of latents in a token."""
TURBO_SHIFT = 3.0
TURBO = SamplingSettings(steps=8, guidance=0.0, resolution=1024)


class ZImagePolicy(LanguagePolicy, PerturbableText):
    """Z-Image or Z-Image-Turbo as a trainable policy."""

    pipelines = ("ZImagePipeline",)
    pipeline_class = "ZImagePipeline"
    lora_layout = "z-image"
    licences: ClassVar[Mapping[str, str]] = {
        "Tongyi-MAI/Z-Image": "Apache-2.0",
        "Tongyi-MAI/Z-Image-Turbo": "Apache-2.0",
    }
    defaults = SamplingSettings(steps=50, guidance=5.0, resolution=1024)
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    layers = (-2,)
    even_levels = True
    width_option = "cap_feat_dim"

    def _defaults(self, folder: Path) -> SamplingSettings:
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        return TURBO if scheduler.get("shift") == TURBO_SHIFT else self.defaults

    def _place(self, plan: MemoryPlan, *, placed: bool) -> None:
        super()._place(plan, placed=placed)
        # It makes its tables when it is first called: not within inference mode, nor of tensors without content.
        self.pipeline.transformer.rope_embedder(torch.zeros(1, 3, dtype=torch.long, device=self.device))

    def _latent_geometry(self) -> tuple[int, int]:
        return int(self.pipeline.transformer.config.in_channels), PATCH

    def frame(self, tokenizer: Any) -> tuple[str, str]:
        return chat_frame(tokenizer, thinks=True)

    @property
    def guidance_scale(self) -> float:
        return 1 + self.settings.guidance

    def predict(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        captions = list(conditioning.tokens_BLD.unbind())
        if conditioning.mask_BL is not None:
            captions = [row[own] for row, own in zip(captions, conditioning.mask_BL, strict=True)]
        frames = list(x_t.unsqueeze(2).unbind())
        found: list[Tensor] = self.denoiser(frames, 1 - t_B, captions, return_dict=False)[0]
        return -torch.stack(found).squeeze(2)
