"""FLUX with reference pictures as a flow policy, on diffusers' FluxPipeline.

Latents run from noise (t = 1) to data (t = 0). The latents of reference pictures are packed two by two like the
target's and appended after its tokens; the output is cut to the target's (UNO; FLUX.1 Kontext). The guidance scale is
an input of the distilled model, not a second pass.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from pixrl.device import choose_device, choose_precision
from pixrl.errors import RunError, ShapeError
from pixrl.hub import fingerprint, read_card
from pixrl.models.base import Conditioning, FlowPolicy, SamplingSettings
from pixrl.models.flux_tokens import Preset, pack_latents, position_ids, unpack_latents
from pixrl.models.pipeline import (
    check_pairs,
    chunks,
    decode_latents,
    draw,
    generators,
    latent_side,
    load_pipeline,
    make_settings,
    micro_batch_for,
)  # fmt: skip
from pixrl.models.prompts import PromptCache, check_words
from pixrl.models.slots import Slot, parse_slot

__all__ = ["FluxPolicy", "Preset", "pack_latents", "position_ids", "unpack_latents"]

DEFAULTS = SamplingSettings(steps=25, guidance=4.0, resolution=512)
MAX_SEQUENCE_LENGTH = 512


class FluxPolicy(FlowPolicy):
    """A FluxPipeline folder; Euler ODE sampling on the pipeline's own schedule, any number of references."""

    def __init__(
        self, path: Path, *, name: str = "", device: str = "auto", dtype: str = "auto", steps: int | None = None,
        guidance: float | None = None, resolution: int | None = None, preset: str = Preset.UNO,
    ) -> None:  # fmt: skip
        self.name = name or path.name
        self.path = path
        self.card = read_card(path)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.settings = make_settings(self.card, DEFAULTS, steps, guidance, resolution)
        self.vocabulary = None if self.card.vocabulary is None else frozenset(self.card.vocabulary)
        self.preset = Preset(preset)
        self.pipeline = load_pipeline("FluxPipeline", path, self.precision, self.device)
        self.transformer: nn.Module = self.pipeline.transformer
        self.vae: nn.Module = self.pipeline.vae
        side = latent_side(self.settings.resolution, self.pipeline.vae_scale_factor, 2)
        self.latent_shape = (int(self.pipeline.transformer.config.in_channels) // 4, side, side)
        self.micro_batch = micro_batch_for(self.device, self.settings.resolution)
        self._cache = PromptCache(self._encode_one)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        check_words(prompts, self.vocabulary, self.name)
        if self.vocabulary is not None:
            prompts = [prompt.lower() for prompt in prompts]
        return self._cache.rows(prompts)

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> Conditioning:
        length = self.card.max_sequence_length
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt=[prompt], prompt_2=None, device=self.device,
            max_sequence_length=MAX_SEQUENCE_LENGTH if length is None else length,
        )  # fmt: skip
        return Conditioning(tokens, pooled)

    @torch.inference_mode()
    def encode_references(self, images_BCHW: Tensor) -> Tensor:
        """Latents [B, C, h, w] of one reference picture a sample, scaled as the transformer takes them."""
        with self.precision.context(self.device):
            mean = self.pipeline.vae.encode(images_BCHW.to(self.device) * 2 - 1).latent_dist.mean.float()
        config = self.pipeline.vae.config
        return torch.as_tensor((mean - (config.shift_factor or 0.0)) * config.scaling_factor)

    def with_references(self, conditioning: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        """The same prompts with reference pictures, each [B, 3, H, W] with sides that are multiples of 2 latents."""
        latents = tuple(self.encode_references(images) for images in references)
        for one in latents:
            if len(one) != len(conditioning):
                raise ShapeError(
                    f"{len(one)} reference pictures for {len(conditioning)} prompts; give one a prompt."
                )
        return Conditioning(conditioning.tokens_BLD, conditioning.pooled_BE, latents)

    def schedule(self, steps: int) -> Tensor:
        scheduler = self.pipeline.scheduler
        start = torch.linspace(1.0, 1.0 / steps, steps).tolist()
        if scheduler.config.use_dynamic_shifting:
            scheduler.set_timesteps(sigmas=start, mu=self._shift_mu())
        else:
            scheduler.set_timesteps(sigmas=start)
        sigmas: Tensor = scheduler.sigmas
        return sigmas.to(device="cpu", dtype=torch.float32).clone()

    def _shift_mu(self) -> float:
        """The schedule shift, linear in the number of the target's image tokens: the same in training and inference."""
        config = self.pipeline.scheduler.config
        tokens = self.latent_shape[1] * self.latent_shape[2] // 4
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        return float(config.base_shift + slope * (tokens - config.base_image_seq_len))

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return draw(generators(seeds), self.latent_shape).to(self.device)

    def velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        if t_B.shape != x_t.shape[:1] or len(conditioning) != len(x_t):
            raise ShapeError(
                f"velocity: {len(x_t)} latents, t of shape {list(t_B.shape)} and {len(conditioning)} conditionings; "
                "give one t and one row each."
            )
        size = (x_t.shape[2] // 2, x_t.shape[3] // 2)
        packed = [pack_latents(x.to(self.device)) for x in (x_t, *conditioning.references)]
        with self.precision.context(self.device):
            tokens: Tensor = self.transformer(
                hidden_states=torch.cat(packed, dim=1),
                timestep=t_B.to(self.device),
                guidance=self._guidance(len(x_t)),
                pooled_projections=self._pooled(conditioning).to(self.device),
                encoder_hidden_states=conditioning.tokens_BLD.to(self.device),
                txt_ids=torch.zeros(conditioning.tokens_BLD.shape[1], 3, device=self.device),
                img_ids=self._image_ids(size, conditioning.references),
                return_dict=False,
            )[0]
        return unpack_latents(tokens[:, : size[0] * size[1]].float(), size)

    def _image_ids(self, size: tuple[int, int], references: Sequence[Tensor]) -> Tensor:
        target, others = position_ids(
            size, [(r.shape[2] // 2, r.shape[3] // 2) for r in references], self.preset
        )
        return torch.cat((target, *others)).to(self.device)

    def _guidance(self, batch: int) -> Tensor | None:
        """The scale as the distilled model takes it, float32; models without the embedding take none."""
        if not self.pipeline.transformer.config.guidance_embeds:
            return None
        return torch.full((batch,), self.settings.guidance, device=self.device)

    def _pooled(self, conditioning: Conditioning) -> Tensor:
        if conditioning.pooled_BE is None:
            raise ShapeError("FLUX needs pooled text features; take conditionings from encode().")
        return conditioning.pooled_BE

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        check_pairs(conditioning, seeds)
        side = self.settings.resolution
        images = torch.empty(len(seeds), 3, side, side)
        with torch.inference_mode():
            for rows in chunks(len(seeds), self.micro_batch):
                images[rows] = self.decode(self._integrate(conditioning[rows], seeds[rows])).cpu()
        return images

    def _integrate(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        """Euler steps from noise to data: x + (sigma_next - sigma) v."""
        sigmas = self.schedule(self.settings.steps)
        x = self.initial_noise(seeds)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = x + (sigma_next - sigma).item() * self.velocity(x, sigma.expand(len(seeds)), conditioning)
        return x

    def decode(self, latents: Tensor) -> Tensor:
        with self.precision.context(self.device):
            return decode_latents(self.vae, latents.to(self.device))

    def slot(self, name: str) -> AbstractContextManager[None]:
        if parse_slot(name) in (Slot.OLD, Slot.EMA):
            raise RunError(f"The slot {name!r} does not exist: this policy has no LoRA slots.")
        return nullcontext()

    def fingerprint(self) -> str:
        return fingerprint(self.path)
