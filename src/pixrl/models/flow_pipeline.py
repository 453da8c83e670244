"""What every trainable flow pipeline of diffusers shares: one Euler loop, seeded noise, decoding, LoRA slots.

A family (SD3, FLUX) adds how it encodes a prompt, its schedule and its velocity; nothing else differs.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pixrl.device import choose_device, choose_precision
from pixrl.errors import InputError, RunError, ShapeError
from pixrl.hub import Checkpoint, checkpoint_fingerprint, read_card
from pixrl.models.attention import SHORT, plain_attention
from pixrl.models.base import Conditioning, FlowPolicy, SamplingSettings
from pixrl.models.compiling import compile_blocks
from pixrl.models.flux_lora import digest, merge
from pixrl.models.loading import load_pipeline
from pixrl.models.lora_files import open_lora
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
from pixrl.models.placement import Part, Placement, set_decoding, without_gradients
from pixrl.models.prompts import PromptCache, check_words
from pixrl.models.slots import LoraSlots, Slot, parse_slot


@dataclass(frozen=True)
class Merged:
    """A LoRA that was added to the frozen weights."""

    digest: str
    said: str
    """What it is, in words."""


class FlowPipelinePolicy(FlowPolicy):
    """A flow pipeline folder, sampled by Euler steps on the pipeline's own schedule."""

    kind: ClassVar[str]
    """As `models.RENDERERS` has it."""
    pipeline_class: ClassVar[str]
    defaults: ClassVar[SamplingSettings]
    lora_targets: ClassVar[tuple[str, ...]]

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
        """`pipeline`: one that was made already, in place of the checkpoint's weights. Others as `models.load`.

        Raises:
            InputError: an option would have no effect on this checkpoint.
        """
        self.name = name or checkpoint.folder.name
        self.checkpoint = checkpoint
        self.card = read_card(checkpoint.folder)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self._check_options(guidance, t5)
        defaults = self._published(checkpoint.folder)
        self.settings = make_settings(self.card, defaults, steps, guidance, resolution)
        self.vocabulary = None if self.card.vocabulary is None else frozenset(self.card.vocabulary)
        self.pipeline = pipeline or load_pipeline(self.pipeline_class, checkpoint, self.precision, t5=t5)
        self.transformer: nn.Module = self.pipeline.transformer
        self.vae: nn.Module = self.pipeline.vae.to(memory_format=memory_format(self.device))
        plan = plan or MemoryPlan()
        set_decoding(self.vae, plan, self.settings.resolution)
        is_made = pipeline is not None
        self.placement = Placement(self.pipeline, self.transformer, self.device, plan, placed=is_made)
        self.lora: LoraSlots | None = None
        self.compiled = False
        self.merged: tuple[Merged, ...] = ()
        channels, patch = self._latent_geometry()
        side = latent_side(self.settings.resolution, self.pipeline.vae_scale_factor, patch)
        self.latent_shape = (channels, side, side)
        self.micro_batch = micro_batch_for(self.device, self.settings.resolution)
        self._cache = PromptCache(self._encode_row)

    def _published(self, folder: Path) -> SamplingSettings:
        """How a checkpoint without a card is sampled, by its configs."""
        return self.defaults

    def _check_options(self, guidance: float | None, t5: bool) -> None:
        """InputError for an option that this checkpoint takes no notice of."""
        if not t5:
            raise InputError(f"t5 has no effect: {self.name} is no SD3 checkpoint. Leave it out.")

    @abstractmethod
    def _latent_geometry(self) -> tuple[int, int]:
        """Channels of the latents, and the rows and columns of them in one image token."""

    @abstractmethod
    def blank(self) -> Conditioning:
        """Zeros in the shape of one row of `encode`, for measurements; the text encoders are not needed."""

    @abstractmethod
    def _encode_one(self, prompt: str) -> Conditioning:
        """One row; called without gradients and once a prompt."""

    @abstractmethod
    def _sigmas(self, steps: int) -> Tensor:
        """The noise levels of the pipeline's scheduler, [steps + 1]."""

    @abstractmethod
    def _velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity of tensors that are on the device and fit each other, within the model's autocast."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        check_words(prompts, self.vocabulary, self.name)
        with torch.no_grad():
            return self._cache.rows(prompts)

    def _encode_row(self, prompt: str) -> Conditioning:
        with self.present(Part.TEXT):
            return self._encode_one(prompt)

    def checkpoint_gradients(self) -> None:
        """Recompute the transformer's activations in the backward pass: less memory, about a third more time."""
        self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]

    def compile(self, backend: str) -> None:
        """torch.compile for every transformer block; LoRA must be attached. Raises as `compile_blocks`."""
        compile_blocks(self.transformer, backend)
        self.compiled = True

    def drop_text(self, prompts: Sequence[str]) -> None:
        """Encodes these prompts and the empty one, keeps their rows on the CPU, and frees the text encoders for good.

        Raises:
            InputError: the rows would not fit into memory.
            UnknownWordError: a prompt has a word outside the vocabulary.
        """
        check_words(prompts, self.vocabulary, self.name)
        with torch.no_grad(), self.present(Part.TEXT):
            self._cache.keep(["", *prompts])
        self.placement.drop_text()

    def present(self, part: Part) -> AbstractContextManager[None]:
        """Within it the text encoders, or the VAE, are on the device."""
        return self.placement.present(part)

    def text_present(self) -> AbstractContextManager[None]:
        return self.present(Part.TEXT)

    def decoder_present(self) -> AbstractContextManager[None]:
        return self.present(Part.VAE)

    def schedule(self, steps: int) -> Tensor:
        return self._sigmas(steps).to(device="cpu", dtype=torch.float32).clone()

    def _shift_mu(self) -> float:
        """The resolution-dependent schedule shift: linear in the number of the picture's tokens."""
        config = self.pipeline.scheduler.config
        rise = config.max_shift - config.base_shift
        run = config.max_image_seq_len - config.base_image_seq_len
        return float(config.base_shift + rise / run * (self._shift_tokens() - config.base_image_seq_len))

    def _shift_tokens(self) -> int:
        """Tokens of a picture; references do not count."""
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
        with self.precision.context(self.device):
            velocity = self._velocity(
                x_t.to(self.device), t_B.to(self.device), conditioning.to(device=self.device)
            )
        return velocity.float()

    def quick_backward(self) -> AbstractContextManager[None]:
        computed_twice = self.compiled or getattr(self.transformer, "gradient_checkpointing", False)
        quick = self.device.type == "cpu" and self._shift_tokens() <= SHORT and not computed_twice
        return plain_attention() if quick else nullcontext()

    def pooled(self, conditioning: Conditioning) -> Tensor:
        """The pooled text features, which these models cannot do without."""
        if conditioning.pooled_BE is None:
            raise ShapeError(f"{self.name} needs pooled text features; take conditionings from encode().")
        return conditioning.pooled_BE

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        check_pairs(conditioning, seeds)
        side = self.settings.resolution
        images = torch.empty(len(seeds), 3, side, side)
        with without_gradients(self.placement.offload):
            for rows in chunks(len(seeds), self.micro_batch):
                images[rows] = self.decode(self._integrate(conditioning[rows], seeds[rows])).cpu()
        return images

    def _integrate(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        """Euler steps from noise to data: x + (sigma_next - sigma) v."""
        sigmas = self.schedule(self.settings.steps)
        x = self.initial_noise(seeds)
        for sigma, sigma_next in pairwise(sigmas.unbind()):
            x = x + (sigma_next - sigma).item() * self.velocity(x, sigma.expand(len(seeds)), conditioning)
        return x

    def decode(self, latents: Tensor) -> Tensor:
        with self.present(Part.VAE), self.precision.context(self.device):
            return decode_latents(self.vae, latents.to(self.device))

    def merge_lora(self, place: Path) -> None:
        """Adds a LoRA to the frozen weights: a file or folder as `lora_files.open_lora` reads it.

        Raises:
            RunError: slots are attached already.
            CheckpointError: it is missing, damaged, more than plain LoRA, or does not fit this transformer.
        """
        if self.lora is not None:
            raise RunError("Merge a LoRA before attach_lora: slots are trained on top of the merged weights.")
        found = open_lora(place, self.kind)
        with self.placement.changing_layers():
            merge(self.transformer, found.lora, str(place))
        self.merged = (*self.merged, Merged(digest(found.lora), f"{place}: {found.said}"))

    def attach_lora(
        self, *, rank: int = 32, alpha: float = 64.0, targets: tuple[str, ...] | None = None, seed: int = 0
    ) -> LoraSlots:
        """Adds the trainable slots; until then `current` is the backbone. The pictures do not change by it."""
        if self.lora is not None:
            raise RunError("This policy already has LoRA slots. Load the model again to attach others.")
        wanted = self.lora_targets if targets is None else targets
        with self.placement.changing_layers():
            self.lora = LoraSlots(self.transformer, rank=rank, alpha=alpha, targets=wanted, seed=seed)
        return self.lora

    def slot(self, name: str) -> AbstractContextManager[None]:
        wanted = parse_slot(name)
        if self.lora is not None:
            return self.lora.use(wanted)
        if wanted in (Slot.OLD, Slot.EMA):
            raise RunError(f"The slot {name!r} does not exist before attach_lora(rank=..., alpha=...).")
        return nullcontext()

    def fingerprint(self) -> str:
        """Of the checkpoint's files, and of the `current` slot where there is one."""
        if self.lora is None:
            return self.backbone_fingerprint
        return sha256(f"{self.backbone_fingerprint}{_digest(self.lora.state())}".encode()).hexdigest()[:16]

    @property
    def backbone_fingerprint(self) -> str:
        """Of the checkpoint's files and of what was merged into them."""
        if not self.merged:
            return self._files
        return sha256(" ".join((self._files, *(one.digest for one in self.merged))).encode()).hexdigest()[:16]

    @cached_property
    def _files(self) -> str:
        return checkpoint_fingerprint(self.checkpoint)


def _digest(state: Mapping[str, Tensor]) -> str:
    total = sha256()
    for name in sorted(key for key in state if key.startswith(f"{Slot.CURRENT}/")):
        total.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return total.hexdigest()
