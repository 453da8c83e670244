"""What the adapters of diffusers pipelines share: settings, seeded noise and decoding. loading.py loads them."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pixrl.errors import InputError, ShapeError
from pixrl.hub import Card
from pixrl.models.base import Conditioning, SamplingSettings


def make_settings(
    card: Card, default: SamplingSettings, steps: int | None, guidance: float | None, resolution: int | None
) -> SamplingSettings:
    """The caller's value, else the card's, else the adapter's default."""

    def first(*values: float | None) -> float:
        return next(value for value in values if value is not None)

    settings = SamplingSettings(
        steps=int(first(steps, card.steps, default.steps)),
        guidance=float(first(guidance, card.guidance, default.guidance)),
        resolution=int(first(resolution, card.resolution, default.resolution)),
    )
    if settings.steps < 1 or settings.guidance < 0:
        raise InputError(f"steps must be at least 1 and guidance at least 0, got {settings}.")
    return settings


def latent_side(resolution: int, vae_factor: int, patch: int = 1) -> int:
    """Rows and columns of the latents of a square picture."""
    if resolution < 1 or resolution % (vae_factor * patch):
        raise InputError(
            f"resolution {resolution} must be a multiple of {vae_factor * patch} for this checkpoint."
        )
    return resolution // vae_factor


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a seed, so that noise depends on neither the batch nor the device."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def draw(generators_B: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 on the CPU: row i from generator i alone."""
    return torch.stack([torch.randn(shape, generator=one) for one in generators_B])


def check_pairs(conditioning: Conditioning, seeds: Sequence[int]) -> None:
    """As many rows as seeds, and at least one."""
    if len(conditioning) != len(seeds) or not seeds:
        raise ShapeError(
            f"sample: {len(conditioning)} conditionings for {len(seeds)} seeds; give one seed a row."
        )


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices that cut `count` rows into pieces of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def micro_batch_for(device: torch.device, resolution: int) -> int:
    """How many pictures go through the model at once: small enough for the cache on a CPU, for memory on a GPU."""
    if device.type == "cpu":
        return max(1, 32 * 64 * 64 // (resolution * resolution))
    return max(1, 64 * 512 * 512 // (resolution * resolution))


def memory_format(device: torch.device) -> torch.memory_format:
    """How convolutions are stored: channels last is faster on GPUs; on CPUs it was slower (docs/log.md)."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents to pictures in [0, 1]: undo the VAE's scaling and shift, decode, map [-1, 1] to [0, 1].

    Within float16 autocast the decoder runs in bfloat16, since its activations overflow in float16.
    """
    config = vae.config
    latents = latents.float()
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            latents.new_tensor(x).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std)
        )
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    latents = latents.to(vae.dtype).contiguous(memory_format=memory_format(latents.device))
    kind = latents.device.type  # the VAE's own may be another until its hooks have moved it
    narrow = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
    with torch.autocast(kind, dtype=torch.bfloat16) if narrow else nullcontext():
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
