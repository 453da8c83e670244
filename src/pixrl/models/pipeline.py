"""What adapters of diffusers pipelines share: `FlowPipelinePolicy`.

First the helpers of every adapter: settings, seeded noise, micro-batches. Then the policy: card, settings, sampling in
pieces by one Euler loop, placement, slots. A family adds how it encodes a prompt, its schedule and what its network
predicts. loading.py loads the weights.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pixrl.config import plain_resolution
from pixrl.device import choose_device, choose_precision, plain_attention
from pixrl.errors import InputError, RunError, ShapeError
from pixrl.hub import Card, Checkpoint, checkpoint_fingerprint, read_card
from pixrl.models.base import Conditioning, FlowPolicy, ImageEncoder, Mixture, SamplingSettings
from pixrl.models.conditioning import check_pairs
from pixrl.models.latents import (
    LatentCache,
    decode_latents,
    encode_latents,
    is_of_video,
    latent_size,
    memory_format,
)
from pixrl.models.loading import denoiser_of, load_pipeline
from pixrl.models.lora.files import open_lora
from pixrl.models.memory.placement import PipelinePart, Placement, set_decoding, without_gradients
from pixrl.models.memory.plan import Base, MemoryPlan
from pixrl.models.memory.quantization import quantize
from pixrl.models.slots import Slot, digest, merge
from pixrl.models.text import PromptCache, check_words
from pixrl.models.trained import FULL, TrainedDenoiser


def make_settings(
    card: Card,
    default: SamplingSettings,
    steps: int | None,
    guidance: float | None,
    resolution: int | str | None,
) -> SamplingSettings:
    """Return the sampling settings: of each the caller's value, else the card's, else the adapter's default.

    Raises:
        InputError: fewer than one step, a negative guidance scale, or a resolution that is none.
    """

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    settings = SamplingSettings(
        steps=int(first(steps, card.steps, default.steps)),
        guidance=float(first(guidance, card.guidance, default.guidance)),
        resolution=plain_resolution(first(resolution, card.resolution, default.resolution)),
    )
    if settings.steps < 1 or settings.guidance < 0:
        raise InputError(f"steps must be at least 1 and guidance at least 0, got {settings}.")
    return settings


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator for each seed, so that noise depends on neither the batch nor the device."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def draw(generators_B: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise, float32 [B, *shape] on the CPU; row i comes from generator i alone."""
    return torch.stack([torch.randn(shape, generator=one) for one in generators_B])


Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""What a network says of latents [B, C, h, w], levels or timesteps [B] and B prompts: the shape of the latents."""


def averaged(predict: Predict, x: Tensor, level: Tensor, source: Conditioning | Mixture, step: int) -> Tensor:
    """Return the prediction at one level for all rows, which is a mixture's average where the source is one."""
    if isinstance(source, Conditioning):
        return predict(x, level.expand(len(x)), source)
    rows = source.used(step)[0]
    return source.average(step, predict(x[rows], level.expand(len(rows)), source.conditioning(step)))


def chunks(count: int, size: int) -> Iterator[slice]:
    """Return slices that cut `count` rows into pieces of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def micro_batch_for(device: torch.device, width: int, height: int) -> int:
    """Return how many pictures go through the model at once: what fits a CPU's cache, or a GPU's memory."""
    pixels = 32 * 64 * 64 if device.type == "cpu" else 64 * 512 * 512
    return max(1, pixels // (width * height))


FEW_STEPS = 8
"""The most steps of a checkpoint that was distilled to few."""
SHORT = 256
"""The number of image tokens up to which the table of all pairs is small beside the other activations."""


@dataclass(frozen=True)
class Merged:
    """A LoRA that was added to the frozen weights."""

    digest: str
    said: str
    """The place it came from, and its modules, ranks and strength, as a report prints them."""


class FlowPipelinePolicy(TrainedDenoiser, FlowPolicy, ImageEncoder):
    """A trainable flow pipeline, sampled by Euler steps on the pipeline's own schedule, with a cache of prompts."""

    pipeline_class: ClassVar[str]
    defaults: ClassVar[SamplingSettings]
    """How a checkpoint of this family without a card is sampled."""
    even_levels: ClassVar[bool] = False
    """Whether the pipeline of diffusers asks its scheduler for levels that fall evenly from 1 to 1 / steps before they
    are shifted, and not for a number of steps alone."""
    usual_text_length: ClassVar[int] = 512
    """`text_length` in the pipeline of diffusers, where no card says another."""
    reads_negative_prompt = True
    negative_prompt: ClassVar[str] = ""
    """What guidance leads away from where `settings.negative_prompt` does not say it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str = "",
        device: str = "auto",
        dtype: str = "auto",
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        resolution: int | str | None = None,
        t5: bool = True,
        plan: MemoryPlan | None = None,
        pipeline: Any = None,
    ) -> None:
        """Load the checkpoint; the options are those of `models.load`.

        Args:
            pipeline: a pipeline that is on its device already, in place of the checkpoint's weights.

        Raises:
            InputError: an option would have no effect on this checkpoint.
        """
        self.name = name or checkpoint.folder.name
        self.checkpoint = checkpoint
        self.card = read_card(checkpoint.folder)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype, on_gpu=self.gpu_dtype)
        self._check_options(guidance, t5)
        defaults = self._defaults(checkpoint.folder)
        self.vocabulary = None if self.card.vocabulary is None else frozenset(self.card.vocabulary)
        settings = make_settings(self.card, defaults, steps, guidance, resolution)
        self.settings = replace(settings, negative_prompt=negative_prompt)
        if negative_prompt is not None:
            self.require_negative_prompt(self.name)
            check_words([negative_prompt], self.vocabulary, self.name)
            if self.guidance_scale <= 1:
                least = self.settings.guidance - (self.guidance_scale - 1)
                raise InputError(
                    f"negative_prompt has no effect on {self.name} at guidance {self.settings.guidance:g}: only "
                    f"guidance above {least:g} leads away from it. Give guidance too, such as guidance={least + 3:g}, "
                    "or leave it out."
                )
        self.pipeline = pipeline or load_pipeline(self.pipeline_class, checkpoint, self.precision, t5=t5)
        self.vae: nn.Module = self.pipeline.vae
        if not is_of_video(self.vae):
            self.vae.to(memory_format=memory_format(self.device, self.vae.dtype))
        plan = plan or MemoryPlan()
        self.base = plan.base
        if plan.base is not Base.DTYPE:
            quantize(denoiser_of(self.pipeline), self.name, plan.base, self.device, self.precision)
        set_decoding(self.vae, plan, self.settings.longest)
        self.offload = plan.offload
        self._place(plan, placed=pipeline is not None)
        channels, patch = self._latent_geometry()
        rows, columns = latent_size(self.settings, self.pipeline.vae_scale_factor, patch)
        self.latent_shape = (channels, rows, columns)
        self.micro_batch = micro_batch_for(self.device, self.settings.width, self.settings.height)
        self._cache = PromptCache(self._encode_one)

    def _place(self, plan: MemoryPlan, *, placed: bool) -> None:
        """Move the pipeline to where the plan wants it, unless it was `placed` before."""
        self._denoiser = denoiser_of(self.pipeline)
        self.placement = Placement(self.pipeline, self._denoiser, self.device, plan, placed=placed)
        self._latents = LatentCache()
        self.merged: tuple[Merged, ...] = ()

    def _defaults(self, folder: Path) -> SamplingSettings:
        """Return how a checkpoint without a card is sampled; a family may look into the folder's configs."""
        return self.defaults

    @property
    def distilled_steps(self) -> int | None:
        """The few steps that the checkpoint was distilled to, by its configs; None where it was not, or has a card."""
        steps = self._defaults(self.checkpoint.folder).steps
        return steps if self.card.steps is None and steps <= FEW_STEPS else None

    def _check_options(self, guidance: float | None, t5: bool) -> None:
        """Raise InputError for an option that has no effect on this checkpoint."""
        if not t5:
            raise InputError(f"t5 has no effect: {self.name} is no SD3 checkpoint. Leave it out.")

    @abstractmethod
    def _latent_geometry(self) -> tuple[int, int]:
        """Return the channels of the latents, and the rows and columns of them in one image token."""

    @abstractmethod
    def _encode_one(self, prompt: str) -> Conditioning:
        """Encode one prompt as one row; called without gradients and once a prompt."""

    @abstractmethod
    def blank(self) -> Conditioning:
        """Return zeros in the shape of one row of `encode`, for measurements without the text encoders."""

    @abstractmethod
    def predict(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's velocity under these prompts, without guidance, within the model's autocast."""

    def _velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity of tensors that are on the device and fit each other, within the model's autocast."""
        return self._guided(self.predict, x_t, t_B, conditioning)

    @property
    def guidance_scale(self) -> float:
        """The scale of `_guided` for the setting `guidance`, which means what it does in the pipeline of diffusers."""
        return self.settings.guidance

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        check_words(prompts, self.vocabulary, self.name)
        with torch.no_grad():
            return self._cache.rows(prompts)

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        return self._sample(conditioning, seeds, self.micro_batch)

    def sample_mixture(self, mixture: Mixture, seeds: Sequence[int]) -> Tensor:
        return self._sample(mixture, seeds, max(1, self.micro_batch // len(mixture.parts)))

    def _sample(self, source: Conditioning | Mixture, seeds: Sequence[int], size: int) -> Tensor:
        check_pairs(source, seeds, self.settings.steps, by_region=self.reads_regions)
        images = torch.empty(len(seeds), 3, self.settings.height, self.settings.width)
        # weights that were gathered in inference mode could not be trained through afterwards
        with torch.no_grad() if self.in_step else without_gradients(self.offload):
            for rows in chunks(len(seeds), size):
                images[rows] = self.decode(self._integrate(source[rows], seeds[rows])).cpu()
        return images

    @property
    def unwanted(self) -> str:
        """The text that guidance leads away from."""
        given = self.settings.negative_prompt
        return self.negative_prompt if given is None else given

    def _guided(self, predict: Predict, x: Tensor, level_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return u + scale * (c - u) of the prediction c and the unconditional u; c where the scale is at most 1."""
        if self.guidance_scale <= 1:
            return predict(x, level_B, conditioning)
        away = self._unconditional(len(x)) if conditioning.away is None else conditioning.away
        away = replace(away.to(device=self.device), references=conditioning.references)
        away = away.in_regions_of(conditioning)
        both = Conditioning.cat([away, conditioning])
        return self._away(*predict(torch.cat([x, x]), torch.cat([level_B, level_B]), both).float().chunk(2))

    def _away(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """Return the prediction that leads away from the unconditional one, beyond the conditional one."""
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _unconditional(self, rows: int) -> Conditioning:
        """Return what guidance leads away from, of rows of `encode`."""
        with torch.no_grad():
            return self._cache.rows([self.unwanted] * rows)

    @property
    def text_length(self) -> int:
        """The most tokens of a prompt that an encoder other than CLIP reads: the card's, or the pipeline's own."""
        return (
            self.usual_text_length if self.card.max_sequence_length is None else self.card.max_sequence_length
        )

    def framed(self, prompt: str, tokenizer: Any) -> str:
        """Return the text that a tokenizer of the pipeline is given for a prompt."""
        return prompt

    @property
    def framed_length(self) -> int:
        """The most tokens of `framed` that an encoder other than CLIP reads."""
        return self.text_length

    def drop_text(self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Encode these prompts and the empty one, keep their rows on the CPU and free the text encoders for good.

        Args:
            prompts: at least one.
            references: the pictures [3, side, side] that each prompt will be shown with; None: there are none.

        Raises:
            InputError: the rows would not fit into memory.
            UnknownWordError: a prompt has a word outside the vocabulary.
        """
        check_words(prompts, self.vocabulary, self.name)
        with torch.no_grad(), self.placement.without_denoiser(), self.present(PipelinePart.TEXT):
            self._keep_text(prompts, references or [()] * len(prompts))
        self.placement.drop_text()

    def _keep_text(self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]]) -> None:
        self._cache.keep(["", self.unwanted, *prompts])

    def present(self, part: PipelinePart) -> AbstractContextManager[None]:
        """Keep the text encoders, or the VAE, on the device while it is open."""
        placement = self.placement
        return nullcontext() if part in placement.on_device else placement.moved(part)

    def text_present(self) -> AbstractContextManager[None]:
        return self.present(PipelinePart.TEXT)

    def decoder_present(self) -> AbstractContextManager[None]:
        return self.present(PipelinePart.VAE)

    def schedule(self, steps: int) -> Tensor:
        scheduler = self.pipeline.scheduler
        asked: dict[str, Any] = {"num_inference_steps": steps}
        if self.even_levels:
            asked = {"sigmas": torch.linspace(1.0, 1.0 / steps, steps).tolist()}
        shift = {"mu": self._shift_mu(steps)} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(**asked, **shift)
        sigmas: Tensor = scheduler.sigmas
        return sigmas.to(device="cpu", dtype=torch.float32).clone()

    def _shift_mu(self, steps: int) -> float:
        """Return the schedule's shift for so many steps, which is linear in the number of the picture's tokens."""
        config = self.pipeline.scheduler.config
        rise = config.max_shift - config.base_shift
        run = config.max_image_seq_len - config.base_image_seq_len
        return float(config.base_shift + rise / run * (self._shift_tokens() - config.base_image_seq_len))

    def _shift_tokens(self) -> int:
        """Return the number of a picture's tokens; references do not count."""
        patch = self._latent_geometry()[1]
        return (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return draw(generators(seeds), self.latent_shape).to(self.device)

    def velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        if t_B.shape != x_t.shape[:1] or len(conditioning) != len(x_t):
            raise ShapeError(
                f"velocity: {len(x_t)} latents, t of shape {list(t_B.shape)} and {len(conditioning)} conditionings; "
                "give one t and one row each."
            )
        if conditioning.regions_BNHW is not None:
            self.require_regions(self.name)
        with self.precision.context(self.device):
            velocity = self._velocity(
                x_t.to(self.device), t_B.to(self.device), conditioning.to(device=self.device)
            )
        return velocity.float()

    def quick_backward(self) -> AbstractContextManager[None]:
        computed_twice = self.compiled or getattr(self.denoiser, "gradient_checkpointing", False)
        is_full = (self.precision.autocast or self.precision.weights) in FULL
        quick = (
            self.device.type == "cpu" and self._shift_tokens() <= SHORT and not computed_twice and not is_full
        )
        return plain_attention() if quick else nullcontext()

    def pooled(self, conditioning: Conditioning) -> Tensor:
        """Return the pooled text features [B, E], without which these models cannot run.

        Raises:
            ShapeError: the conditioning has none.
        """
        if conditioning.pooled_BE is None:
            raise ShapeError(f"{self.name} needs pooled text features; take conditionings from encode().")
        return conditioning.pooled_BE

    def _integrate(self, source: Conditioning | Mixture, seeds: Sequence[int]) -> Tensor:
        """Take Euler steps from noise to data, x + (sigma_next - sigma) v, and return the latents."""
        sigmas = self.schedule(self.settings.steps)
        x = sigmas[0].item() * self.initial_noise(seeds)
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.unbind())):
            x = x + (sigma_next - sigma).item() * averaged(self.velocity, x, sigma, source, step)
        return x

    def decode(self, latents: Tensor) -> Tensor:
        with self.present(PipelinePart.VAE), self.precision.context(self.device):
            return decode_latents(self.vae, latents.to(self.device))

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        with self.present(PipelinePart.VAE):
            pictures, get = images_BCHW.split(1), self._latents.get
            rows = [get(x, lambda one: encode_latents(self.vae, one.to(self.device))) for x in pictures]
            return torch.cat(rows)

    def merge_lora(self, place: Path) -> None:
        """Add a LoRA to the frozen weights: a file or folder as `lora.files.open_lora` reads it.

        Raises:
            RunError: slots are attached already.
            CheckpointError: it is missing, damaged, more than plain LoRA, or does not fit this transformer.
            InputError: nobody knows whose names files for this model go by.
        """
        if self.slots is not None:
            raise RunError(
                "Merge a LoRA before attach_lora or attach_full: slots begin with the merged weights."
            )
        if self.lora_layout is None:
            return super().merge_lora(place)
        found = open_lora(place, self.lora_layout)
        with self.placement.changing_layers():
            merge(self.denoiser, found.lora, str(place))
        self.merged = (*self.merged, Merged(digest(found.lora), f"{place}: {found.said}"))

    def fingerprint(self) -> str:
        """Return a hash of the checkpoint's files, and of the `current` slot where there is one."""
        if self.slots is None:
            return self.backbone_fingerprint
        current = {key: x for key, x in self.slots.state().items() if key.startswith(f"{Slot.CURRENT}/")}
        total = sha256()
        for key, x in sorted(current.items()):
            total.update(key.encode() + x.contiguous().numpy().tobytes())
        return sha256(f"{self.backbone_fingerprint}{total.hexdigest()}".encode()).hexdigest()[:16]

    @cached_property
    def _files_fingerprint(self) -> str:
        files = checkpoint_fingerprint(self.checkpoint)
        if self.base is Base.DTYPE:
            return files
        return sha256(f"{files} {self.base.value}".encode()).hexdigest()[:16]

    @property
    def backbone_fingerprint(self) -> str:
        """A hash of the checkpoint's files and of what was merged into them."""
        if not self.merged:
            return self._files_fingerprint
        return sha256(
            " ".join((self._files_fingerprint, *(one.digest for one in self.merged))).encode()
        ).hexdigest()[:16]
