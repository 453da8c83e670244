"""Stable Diffusion 3 and 3.5 as a trainable flow policy, on diffusers' StableDiffusion3Pipeline.

Latents run from noise (t = 1) to data (t = 0); the transformer is fed the timestep 1000 t and predicts noise - data.
With a guidance scale above 1 `velocity` is the guided one, u + scale * (c - u) with the empty prompt for u, in sampling
and in training alike.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixrl.errors import InputError
from pixrl.hub import Checkpoint
from pixrl.hub_check import read_json
from pixrl.models.base import Conditioning, SamplingSettings
from pixrl.models.loading import has_t5
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.regions import joint_attention, joint_bias
from pixrl.models.slots import KNOWN_TARGETS
from pixrl.models.text import ClipEncoder, PerturbableText

CLIP_LENGTH = 77


class SD3Policy(FlowPipelinePolicy, PerturbableText):
    """Stable Diffusion 3 or 3.5 as a trainable policy, with or without its T5 encoder."""

    pipelines = ("StableDiffusion3Pipeline",)
    pipeline_class = "StableDiffusion3Pipeline"
    lora_layout = "sd3"
    reads_regions = True
    licences: ClassVar[Mapping[str, str]] = {
        "stabilityai/stable-diffusion-3-medium-diffusers": "Stability AI Community License",
        "stabilityai/stable-diffusion-3.5-medium": "Stability AI Community License",
        "stabilityai/stable-diffusion-3.5-large": "Stability AI Community License",
        "stabilityai/stable-diffusion-3.5-large-turbo": "Stability AI Community License",
    }
    defaults = SamplingSettings(steps=28, guidance=7.0, resolution=512)
    lora_targets = KNOWN_TARGETS
    usual_text_length = 256

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        """Load the checkpoint; the options are those of `FlowPipelinePolicy`.

        Raises:
            InputError: an option would have no effect, or the resolution is beyond the table of positions.
        """
        super().__init__(checkpoint, **options)
        table, patch = int(self.pipeline.transformer.config.pos_embed_max_size), self._latent_geometry()[1]
        most = table * patch * int(self.pipeline.vae_scale_factor)
        if self.settings.longest > most:
            raise InputError(
                f"resolution {self.settings.resolution} is beyond the table of positions of {self.name}: it draws "
                f"pictures of up to {most} x {most}. Give resolution={most} or less, or leave it out."
            )

    def _check_options(self, guidance: float | None, t5: bool) -> None:
        if not t5 and not has_t5(self.checkpoint) and self.checkpoint.file is None:
            raise InputError(f"t5=false has no effect: {self.name} has no T5 encoder. Leave it out.")

    def _latent_geometry(self) -> tuple[int, int]:
        return int(self.pipeline.transformer.config.in_channels), int(self.pipeline.patch_size)

    def blank(self) -> Conditioning:
        tokenizer = read_json(self.checkpoint.folder / "tokenizer" / "tokenizer_config.json")
        clip_length = min(CLIP_LENGTH, int(str(tokenizer.get("model_max_length", CLIP_LENGTH))))
        config = self.pipeline.transformer.config
        dtype = self.precision.weights
        tokens = torch.zeros(1, clip_length + self.text_length, config.joint_attention_dim, dtype=dtype)
        return Conditioning(tokens, torch.zeros(1, config.pooled_projection_dim, dtype=dtype))

    def _encode_one(self, prompt: str) -> Conditioning:
        with self.text_present():
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=[prompt],
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )
        return Conditioning(tokens, pooled)

    def text_encoders(self) -> tuple[ClipEncoder, ...]:
        """Return CLIP-L and CLIP-G: tokens side by side in the first rows, pooled features one after the other."""
        pipeline, tokens, pooled = self.pipeline, 0, 0
        found = []
        for name, model, tokenizer in (
            ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
            ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
        ):
            width, projection = model.config.hidden_size, model.config.projection_dim
            found.append(
                ClipEncoder(
                    name=name,
                    model=model,
                    tokenizer=tokenizer,
                    length=pipeline.tokenizer_max_length,
                    projected=True,
                    pooled_columns=slice(pooled, pooled + projection),
                    token_columns=slice(tokens, tokens + width),
                )
            )
            tokens, pooled = tokens + width, pooled + projection
        return tuple(found)

    def predict(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        patch = self._latent_geometry()[1]
        size = x_t.shape[2] // patch, x_t.shape[3] // patch
        with joint_attention(self, joint_bias(conditioning, size, image_first=True)):
            velocity: Tensor = self.denoiser(
                hidden_states=x_t,
                timestep=t_B * 1000,
                encoder_hidden_states=conditioning.tokens_BLD,
                pooled_projections=self.pooled(conditioning),
                return_dict=False,
            )[0]
        return velocity
