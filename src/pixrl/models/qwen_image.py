"""Qwen-Image as a trainable flow policy, on diffusers' QwenImagePipeline.

Latents run from noise (t = 1) to data (t = 0); the transformer is fed t and predicts noise - data. A prompt is read by
a vision-language model within a fixed frame of text, whose first tokens are left out. Token features have the prompt's
length: `encode` pads them with zeros, and the mask tells the transformer, for prompts of several lengths in one batch.

`guidance` is the pipeline's `true_cfg_scale`, with " " as the negative prompt, as the model's page draws. Each token of
the guided velocity is given the length that it has without guidance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixrl.hub import Checkpoint
from pixrl.models.base import Conditioning, SamplingSettings
from pixrl.models.flux import pack_latents, unpack_latents
from pixrl.models.language import LanguagePolicy
from pixrl.models.memory.plan import MemoryPlan
from pixrl.models.slots import KNOWN_TARGETS
from pixrl.models.text import PerturbableText

PATCH = 2
"""Rows and columns of latents in a token."""
Shape = tuple[int, int, int]
"""Frames, rows and columns of a picture's tokens."""


class QwenPolicy(LanguagePolicy):
    """What Qwen-Image and Qwen-Image-Edit share: all but what is read and shown beside a prompt."""

    lora_layout = "qwen-image"
    defaults = SamplingSettings(steps=50, guidance=4.0, resolution=1024)
    lora_targets = KNOWN_TARGETS
    negative_prompt = " "
    even_levels = True
    layers = (-1,)

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        """Load the checkpoint; the options are those of `FlowPipelinePolicy`."""
        super().__init__(checkpoint, **options)
        self._keep_positions([self._shape(self.latent_shape)], self.text_length)

    def _keep_positions(self, shapes: list[Shape], length: int) -> None:
        """Compute the positions of pictures and text, which the transformer keeps from when it is first asked."""
        device = torch.empty(0, device=self.device).device
        with torch.inference_mode(False):  # what is made within it could not be trained through
            self.denoiser.pos_embed([shapes], max_txt_seq_len=length, device=device)  # type: ignore[operator]

    def _place(self, plan: MemoryPlan, *, placed: bool) -> None:
        rope = self.pipeline.transformer.pos_embed
        if rope.pos_freqs.is_meta:  # no buffers: `estimate.imagined` does not see them
            self.pipeline.transformer.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
        super()._place(plan, placed=placed)

    def _latent_geometry(self) -> tuple[int, int]:
        return int(self.pipeline.transformer.config.in_channels) // PATCH**2, PATCH

    def _shape(self, latents: Sequence[int]) -> Shape:
        """Return the frames, rows and columns of a picture's tokens, of the shape of its latents [..., h, w]."""
        return 1, latents[-2] // PATCH, latents[-1] // PATCH

    def frame(self, tokenizer: Any) -> tuple[str, str]:
        before, _, after = self.pipeline.prompt_template_encode.partition("{}")
        return before, after

    @property
    def skipped(self) -> int:
        return int(self.pipeline.prompt_template_encode_start_idx)

    def schedule(self, steps: int) -> Tensor:
        """Return the pipeline's levels; of a single step 1 and 0, where diffusers divides 0 by 0 to stretch them."""
        return torch.tensor([1.0, 0.0]) if steps == 1 else super().schedule(steps)

    def _away(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        guided = pack_latents(super()._away(unconditional, conditional))
        length = pack_latents(conditional).norm(dim=-1, keepdim=True)
        kept = guided * (length / guided.norm(dim=-1, keepdim=True))
        return unpack_latents(kept, self._shape(conditional.shape)[1:])

    def predict(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        tokens, mask = conditioning.tokens_BLD, conditioning.mask_BL
        if mask is not None:  # as long as the longest prompt; no mask where all are
            longest = int(mask.any(dim=0).nonzero().max()) + 1
            tokens, mask = tokens[:, :longest], mask[:, :longest]
            mask = None if mask.all() else mask
        pictures = (x_t, *conditioning.references)
        shapes = [self._shape(latents.shape) for latents in pictures]
        found: Tensor = self.denoiser(
            hidden_states=torch.cat([pack_latents(latents) for latents in pictures], dim=1),
            timestep=t_B,
            encoder_hidden_states=tokens,
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * len(x_t),
            return_dict=False,
        )[0]
        size = shapes[0][1:]
        return unpack_latents(found[:, : size[0] * size[1]].float(), size)


class QwenImagePolicy(QwenPolicy, PerturbableText):
    """Qwen-Image as a trainable policy."""

    pipelines = ("QwenImagePipeline",)
    pipeline_class = "QwenImagePipeline"
    licences: ClassVar[Mapping[str, str]] = {"Qwen/Qwen-Image": "Apache-2.0"}
