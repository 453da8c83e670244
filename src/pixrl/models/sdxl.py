"""SDXL and SDXL-Turbo as a frozen renderer, on diffusers' StableDiffusionXLPipeline.

The defaults are SDXL-Turbo's: 4 steps without guidance at 512 x 512. The pipeline's own loop and scheduler run on
cached embeddings, one fused batch at a time; only the latents and the ancestral noise are seeded per picture. With a
guidance scale above 1 (the base model) the pipeline's own empty prompt is the negative one.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pixrl.device import DType, choose_device, choose_precision
from pixrl.errors import ShapeError
from pixrl.hub import fingerprint, read_card
from pixrl.models.base import Conditioning, Renderer, SamplingSettings
from pixrl.models.pipeline import (
    check_pairs,
    chunks,
    decode_latents,
    draw,
    generators,
    latent_side,
    load_pipeline,
    make_settings,
    memory_format,
    micro_batch_for,
)
from pixrl.models.prompts import PromptCache, check_words

DEFAULTS = SamplingSettings(steps=4, guidance=0.0, resolution=512)


class SDXLRenderer(Renderer):
    """A StableDiffusionXLPipeline folder."""

    def __init__(
        self,
        path: Path,
        *,
        name: str = "",
        device: str = "auto",
        dtype: str = "auto",
        steps: int | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
    ) -> None:
        self.name = name or path.name
        self.path = path
        self.card = read_card(path)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype, on_gpu=DType.FLOAT16)
        self.settings = make_settings(self.card, DEFAULTS, steps, guidance, resolution)
        self.vocabulary = None if self.card.vocabulary is None else frozenset(self.card.vocabulary)
        self.pipeline = load_pipeline("StableDiffusionXLPipeline", path, self.precision, self.device)
        self.pipeline.unet.to(memory_format=memory_format(self.device))
        self.vae = self.pipeline.vae.to(memory_format=memory_format(self.device))
        side = latent_side(self.settings.resolution, self.pipeline.vae_scale_factor)
        self.latent_shape = (int(self.pipeline.unet.config.in_channels), side, side)
        self.micro_batch = micro_batch_for(self.device, self.settings.resolution)
        self._cache = PromptCache(self._encode_one)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        check_words(prompts, self.vocabulary, self.name)
        return self._cache.rows(prompts)

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> Conditioning:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[prompt], device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning(tokens, pooled)

    @cached_property
    def _negative(self) -> Conditioning:
        """What guidance leads away from: zeros or the empty prompt, as the checkpoint's config says."""
        with torch.no_grad():
            _, tokens, _, pooled = self.pipeline.encode_prompt(
                prompt=[""], device=self.device, do_classifier_free_guidance=True
            )
        return Conditioning(tokens, pooled)

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        check_pairs(conditioning, seeds)
        side = self.settings.resolution
        images = torch.empty(len(seeds), 3, side, side)
        with torch.inference_mode(), self.precision.context(self.device):
            for rows in chunks(len(seeds), self.micro_batch):
                latents = self._denoise(conditioning[rows], seeds[rows])
                images[rows] = decode_latents(self.vae, latents).cpu()
        return images

    def _denoise(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        if conditioning.pooled_BE is None:
            raise ShapeError("SDXL needs pooled text features; take conditionings from encode().")
        generators_B = generators(seeds)
        guided = self.settings.guidance > 1
        negative = self._negative[[0] * len(seeds)] if guided else None
        weights = self.precision.weights
        latents: Tensor = self.pipeline(
            prompt_embeds=conditioning.tokens_BLD.to(self.device, weights),
            pooled_prompt_embeds=conditioning.pooled_BE.to(self.device, weights),
            negative_prompt_embeds=None if negative is None else negative.tokens_BLD,
            negative_pooled_prompt_embeds=None if negative is None else negative.pooled_BE,
            latents=draw(generators_B, self.latent_shape).to(self.device, weights),
            generator=generators_B,  # they go on from the first latents to the ancestral noise
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            height=self.settings.resolution,
            width=self.settings.resolution,
            output_type="latent",
            return_dict=False,
        )[0]
        return latents

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.path)
