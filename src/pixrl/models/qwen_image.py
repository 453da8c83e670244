"""Qwen-Image as a trainable flow policy, on diffusers' QwenImagePipeline.

Latents run from noise (t = 1) to data (t = 0); the transformer is fed t and predicts noise - data. A prompt is read by
a vision-language model within a fixed frame of text, whose first tokens are left out. Token features have the prompt's
length: `encode` pads them with zeros, and the mask tells the transformer, for prompts of several lengths in one batch.

`guidance` is the pipeline's `true_cfg_scale`, with " " as the negative prompt, as the model's page draws. Each token of
the guided velocity is given the length that it has without guidance.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixrl.hub import Checkpoint
from pixrl.models.base import Conditioning, SamplingSettings
from pixrl.models.flux import pack_latents, unpack_latents
from pixrl.models.language import LanguagePolicy
from pixrl.models.memory_plan import MemoryPlan
from pixrl.models.pipeline import even_levels
from pixrl.models.slots import KNOWN_TARGETS

PATCH = 2
"""Rows and columns of latents in a token."""


class QwenImagePolicy(LanguagePolicy):
    """Qwen-Image as a trainable policy."""

    pipelines = ("QwenImagePipeline",)
    pipeline_class = "QwenImagePipeline"
    lora_layout = "qwen-image"
    licences: ClassVar[Mapping[str, str]] = {"Qwen/Qwen-Image": "Apache-2.0"}
    defaults = SamplingSettings(steps=50, guidance=4.0, resolution=1024)
    lora_targets = KNOWN_TARGETS
    negative_prompt = " "
    layers = (-1,)

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        """Load the checkpoint; the options are those of `FlowPipelinePolicy`."""
        super().__init__(checkpoint, **options)
        # Positions are kept from when they are first asked for: not within inference mode, nor without content.
        device = torch.empty(0, device=self.device).device
        self.denoiser.pos_embed([self._shape()], max_txt_seq_len=self.text_length, device=device)  # type: ignore[operator]

    def _place(self, plan: MemoryPlan, *, placed: bool) -> None:
        rope = self.pipeline.transformer.pos_embed
        if rope.pos_freqs.is_meta:  # no buffers: `estimate.imagined` does not see them
            self.pipeline.transformer.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
        super()._place(plan, placed=placed)

    def _latent_geometry(self) -> tuple[int, int]:
        return int(self.pipeline.transformer.config.in_channels) // PATCH**2, PATCH

    def _shape(self) -> list[tuple[int, int, int]]:
        """Return the frames, rows and columns of a picture's tokens."""
        return [(1, self.latent_shape[1] // PATCH, self.latent_shape[2] // PATCH)]

    def frame(self, tokenizer: Any) -> tuple[str, str]:
        before, _, after = self.pipeline.prompt_template_encode.partition("{}")
        return before, after

    @property
    def skipped(self) -> int:
        return int(self.pipeline.prompt_template_encode_start_idx)

    def schedule(self, steps: int) -> Tensor:
        """Return the pipeline's levels; of a single step 1 and 0, where diffusers divides 0 by 0 to stretch them."""
        return torch.tensor([1.0, 0.0]) if steps == 1 else super().schedule(steps)

    def _timesteps(self, steps: int) -> dict[str, Any]:
        return even_levels(steps)

    def _velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        return self._guided(self._predict, x_t, t_B, conditioning)

    def _away(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        guided = pack_latents(super()._away(unconditional, conditional))
        length = pack_latents(conditional).norm(dim=-1, keepdim=True)
        kept = guided * (length / guided.norm(dim=-1, keepdim=True))
        return unpack_latents(kept, self._shape()[0][1:])

    def _predict(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        tokens, mask = conditioning.tokens_BLD, conditioning.mask_BL
        if mask is not None:  # as long as the longest prompt; no mask where all are
            longest = int(mask.any(dim=0).nonzero().max()) + 1
            tokens, mask = tokens[:, :longest], mask[:, :longest]
            mask = None if mask.all() else mask
        found: Tensor = self.denoiser(
            hidden_states=pack_latents(x_t),
            timestep=t_B,
            encoder_hidden_states=tokens,
            encoder_hidden_states_mask=mask,
            img_shapes=[self._shape()] * len(x_t),
            return_dict=False,
        )[0]
        return unpack_latents(found.float(), self._shape()[0][1:])
