"""SDXL and SDXL-Turbo as a frozen renderer, on diffusers' StableDiffusionXLPipeline.

SDXL-Turbo is drawn in 4 steps without guidance at 512 x 512, the base model in 50 steps with guidance 5 at 1024 x 1024;
the schedulers of their folders tell them apart. The pipeline's own loop and scheduler run on cached embeddings, one
fused batch at a time; only the latents and the ancestral noise are seeded per picture. With a guidance scale above 1
every step has a second pass with the pipeline's own negative prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pixrl.device import DType
from pixrl.errors import ShapeError
from pixrl.hub_check import read_json
from pixrl.models.base import Conditioning, Mixture, SamplingSettings
from pixrl.models.latents import decode_latents, memory_format
from pixrl.models.memory_plan import MemoryPlan
from pixrl.models.pipeline import PipelineRenderer, draw, generators
from pixrl.models.placement import offload_pipeline

TEXT_LENGTH = 77
SIZES = 6
"""The numbers of a picture's size and crop that are an input of the UNet."""
TURBO = SamplingSettings(steps=4, guidance=0.0, resolution=512)
BASE = SamplingSettings(steps=50, guidance=5.0, resolution=1024)
"""The defaults of the published pipeline."""


class SDXLRenderer(PipelineRenderer):
    """SDXL or SDXL-Turbo as a StableDiffusionXLPipeline, which is sampled and not trained."""

    pipelines = ("StableDiffusionXLPipeline",)
    pipeline_class = "StableDiffusionXLPipeline"
    gpu_dtype = DType.FLOAT16
    defaults = BASE
    licences: ClassVar[Mapping[str, str]] = {
        "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
        "stabilityai/sdxl-turbo": "Stability AI Non-Commercial Research Community License",
    }

    def _defaults(self, folder: Path) -> SamplingSettings:
        """Return Turbo's settings where the timesteps are trailing; those of the base model are leading."""
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        return TURBO if scheduler.get("timestep_spacing") == "trailing" else self.defaults

    def _place(self, plan: MemoryPlan, *, placed: bool) -> None:
        self.pipeline.unet.to(memory_format=memory_format(self.device))
        if not placed:
            offload_pipeline(self.pipeline, plan.offload, self.device)

    def _latent_geometry(self) -> tuple[int, int]:
        return int(self.pipeline.unet.config.in_channels), 1

    def _encode_one(self, prompt: str) -> Conditioning:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[prompt], device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning(tokens, pooled)

    @cached_property
    def _negative(self) -> Conditioning:
        """The conditioning that guidance leads away from: zeros or the empty prompt, by the checkpoint's config."""
        with torch.no_grad():
            _, tokens, _, pooled = self.pipeline.encode_prompt(
                prompt=[""], device=self.device, do_classifier_free_guidance=True
            )
        return Conditioning(tokens, pooled)

    @torch.no_grad()
    def trial(self, count: int) -> Tensor:
        """Run one denoising pass and the decoder on zeros for `count` pictures, to measure what they need."""
        config, dtype = self.pipeline.unet.config, self.precision.weights
        passes = 2 * count if self.settings.guidance > 1 else count
        pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
        with self.precision.context(self.device):
            latents = self.pipeline.unet(
                torch.zeros(passes, *self.latent_shape, dtype=dtype),
                1,
                encoder_hidden_states=torch.zeros(
                    passes, TEXT_LENGTH, config.cross_attention_dim, dtype=dtype
                ),
                added_cond_kwargs={
                    "text_embeds": torch.zeros(passes, pooled, dtype=dtype),
                    "time_ids": torch.zeros(passes, SIZES, dtype=dtype),
                },
                return_dict=False,
            )[0]
            return decode_latents(self.vae, latents[:count])

    def _draw(self, source: Conditioning | Mixture, seeds: Sequence[int]) -> Tensor:
        with self.precision.context(self.device):
            if isinstance(source, Mixture):
                with averaging(self.pipeline.unet, source, self.device, self.precision.weights):
                    latents = self._denoise(source.parts[0], seeds)
            else:
                latents = self._denoise(source, seeds)
            return decode_latents(self.vae, latents)

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


@contextmanager
def averaging(unet: nn.Module, mixture: Mixture, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make every call of the UNet a step of `mixture`, which predicts for all its prompts and averages.

    With guidance the first half of a call's rows is the negative prompt's, which stays as it is: the guided prediction
    is linear in the conditional one, so that averaging before guidance or after it is the same.
    """
    steps = count()
    step = 0

    def widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal step
        step = next(steps)
        sample, *rest = args
        negative = len(sample) - len(mixture)  # 0 without guidance
        picked = torch.cat((torch.arange(negative), mixture.used(step)[0].cpu() + negative)).to(sample.device)
        prompts = mixture.conditioning(step).to(device=device, dtype=dtype)
        assert prompts.pooled_BE is not None  # _denoise has refused others
        added = kwargs["added_cond_kwargs"]
        tokens = torch.cat((kwargs["encoder_hidden_states"][:negative], prompts.tokens_BLD))
        pooled = torch.cat((added["text_embeds"][:negative], prompts.pooled_BE))
        added = {"text_embeds": pooled, "time_ids": added["time_ids"][picked]}
        return (sample[picked], *rest), {
            **kwargs, "encoder_hidden_states": tokens, "added_cond_kwargs": added,
        }  # fmt: skip

    def narrow(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        predictions = output[0]
        negative = len(predictions) - len(mixture.used(step)[0])
        return (torch.cat((predictions[:negative], mixture.average(step, predictions[negative:]))),)

    handles = (
        unet.register_forward_pre_hook(widen, with_kwargs=True),
        unet.register_forward_hook(narrow),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
