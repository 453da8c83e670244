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

from pixrl.device import DType, choose_device, choose_precision
from pixrl.errors import InputError, ShapeError
from pixrl.hub import Checkpoint, checkpoint_fingerprint, read_card
from pixrl.hub_check import read_json
from pixrl.models.base import Conditioning, Mixture, Renderer, SamplingSettings
from pixrl.models.loading import load_pipeline
from pixrl.models.memory_plan import MemoryPlan
from pixrl.models.pipeline import (
    check_pairs,
    chunks,
    decode_latents,
    draw,
    generators,
    latent_side,
    make_settings,
    memory_format,
    micro_batch_for,
)
from pixrl.models.placement import offload_pipeline, set_decoding, without_gradients
from pixrl.models.text import PromptCache, check_words

TEXT_LENGTH = 77
SIZES = 6
"""Numbers of a picture's size and crop that the UNet is told."""
TURBO = SamplingSettings(steps=4, guidance=0.0, resolution=512)
BASE = SamplingSettings(steps=50, guidance=5.0, resolution=1024)
"""The published pipeline's own."""


class SDXLRenderer(Renderer):
    """A StableDiffusionXLPipeline folder."""

    pipelines = ("StableDiffusionXLPipeline",)
    pipeline_class = "StableDiffusionXLPipeline"
    gpu_dtype = DType.FLOAT16
    licences: ClassVar[Mapping[str, str]] = {
        "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
        "stabilityai/sdxl-turbo": "Stability AI Non-Commercial Research Community License",
    }

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str = "",
        device: str = "auto",
        dtype: str = "auto",
        steps: int | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
        t5: bool = True,
        plan: MemoryPlan | None = None,
        pipeline: Any = None,
    ) -> None:
        """`pipeline`: one that was made already, in place of the checkpoint's weights. Others as `models.load`."""
        self.name = name or checkpoint.folder.name
        if not t5:
            raise InputError(f"t5 has no effect: {self.name} is no SD3 checkpoint. Leave it out.")
        self.checkpoint = checkpoint
        self.card = read_card(checkpoint.folder)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype, on_gpu=self.gpu_dtype)
        self.settings = make_settings(self.card, published(checkpoint.folder), steps, guidance, resolution)
        self.vocabulary = None if self.card.vocabulary is None else frozenset(self.card.vocabulary)
        self.pipeline = pipeline or load_pipeline(self.pipeline_class, checkpoint, self.precision)
        self.pipeline.unet.to(memory_format=memory_format(self.device))
        self.vae = self.pipeline.vae.to(memory_format=memory_format(self.device))
        plan = plan or MemoryPlan()
        set_decoding(self.vae, plan, self.settings.resolution)
        self.offload = plan.offload
        if pipeline is None:
            offload_pipeline(self.pipeline, plan.offload, self.device)
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

    @torch.no_grad()
    def trial(self, count: int) -> Tensor:
        """One denoising pass with the decoder, on zeros: for measurements of what pictures need."""
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

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        check_pairs(conditioning, seeds)
        return self._sample(conditioning, seeds, self.micro_batch)

    def sample_mixture(self, mixture: Mixture, seeds: Sequence[int]) -> Tensor:
        check_pairs(mixture, seeds, self.settings.steps)
        return self._sample(mixture, seeds, max(1, self.micro_batch // len(mixture.parts)))

    def _sample(self, source: Conditioning | Mixture, seeds: Sequence[int], size: int) -> Tensor:
        side = self.settings.resolution
        images = torch.empty(len(seeds), 3, side, side)
        with without_gradients(self.offload), self.precision.context(self.device):
            for rows in chunks(len(seeds), size):
                piece = source[rows]
                if isinstance(piece, Mixture):
                    with averaging(self.pipeline.unet, piece, self.device, self.precision.weights):
                        latents = self._denoise(piece.parts[0], seeds[rows])
                else:
                    latents = self._denoise(piece, seeds[rows])
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
        return checkpoint_fingerprint(self.checkpoint)


@contextmanager
def averaging(unet: nn.Module, mixture: Mixture, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it every call of the UNet is a step of `mixture`: it predicts for all its prompts, and averages.

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


def published(folder: Path) -> SamplingSettings:
    """How a checkpoint without a card is meant to be sampled. Turbo's timesteps are trailing, the base's leading."""
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return TURBO if scheduler.get("timestep_spacing") == "trailing" else BASE
