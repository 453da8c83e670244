"""Pictures as a VAE's latents and back."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from pixrl.config import plain_resolution
from pixrl.errors import InputError
from pixrl.models.base import SamplingSettings

CACHE_BYTES = 2**28
"""The bytes of pictures' latents that are kept."""


def latent_size(settings: SamplingSettings, vae_factor: int, patch: int = 1) -> tuple[int, int]:
    """Return the rows and columns of a picture's latents.

    Raises:
        InputError: a side is no multiple of a latent's pixels, or of a token's; names the nearest size that is.
    """
    unit = vae_factor * patch
    sides = (settings.width, settings.height)
    if any(side % unit for side in sides):
        near = plain_resolution("x".join(str(max(1, round(side / unit)) * unit) for side in sides))
        each = "" if settings.width == settings.height else "width and height each "
        raise InputError(
            f"resolution {settings.resolution} must be {each}a multiple of {unit} for this checkpoint. The nearest is "
            f"{near}."
        )
    return settings.height // vae_factor, settings.width // vae_factor


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Return how convolutions are stored: channels last is faster on GPUs, and on CPUs in float32 (docs/log.md)."""
    faster = device.type == "cuda" or (device.type == "cpu" and dtype is torch.float32)
    return torch.channels_last if faster else torch.contiguous_format


def is_of_video(vae: Any) -> bool:
    """Return whether a VAE is one of video, to which a picture is a single frame [B, C, 1, h, w]: Qwen-Image's."""
    return "temperal_downsample" in vae.config


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents to pictures in [0, 1]: undo the VAE's scaling and shift, decode, map [-1, 1] to [0, 1].

    Within float16 autocast the decoder runs in bfloat16, since its activations overflow in float16.
    """
    config = vae.config
    latents = latents.float()
    if spread := _spread(vae, latents):
        mean, std = spread
        latents = latents * std + mean
    else:
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    latents = latents.to(vae.dtype).contiguous(memory_format=memory_format(latents.device, vae.dtype))
    kind = latents.device.type  # the VAE's own may be another until its hooks have moved it
    narrow = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
    with torch.autocast(kind, dtype=torch.bfloat16) if narrow else nullcontext():
        pixels: Tensor = vae.decode(_as_frame(vae, latents), return_dict=False)[0]
    pixels = pixels.squeeze(2) if is_of_video(vae) else pixels
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def encode_latents(vae: Any, images_BCHW: Tensor) -> Tensor:
    """Encode pictures in [0, 1] as the transformer takes latents; in the VAE's own dtype, since it is done once each.

    The VAE's distribution gives its mean.
    """
    config = vae.config
    images_BCHW = _as_frame(vae, images_BCHW.to(vae.dtype) * 2 - 1)
    mean: Tensor = vae.encode(images_BCHW).latent_dist.mean.float()
    mean = mean.squeeze(2) if is_of_video(vae) else mean
    if spread := _spread(vae, mean):
        middle, deviation = spread
        return (mean - middle) / deviation
    return (mean - (config.shift_factor or 0.0)) * float(config.scaling_factor)


def _spread(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the deviation of a VAE's latents, as it states them; None where it states one scale."""
    config = vae.config
    if (
        "batch_norm_eps" in config
    ):  # FLUX.2's: of each channel at each place within a patch of 2 x 2, in that order
        channels, rows, columns = latents.shape[1:]
        moments = (vae.bn.running_mean.float(), (vae.bn.running_var.float() + config.batch_norm_eps).sqrt())
        tiles = (x.to(latents.device).view(1, channels, 2, 2) for x in moments)
        mean, std = (x.repeat(1, 1, rows // 2, columns // 2) for x in tiles)
        return mean, std
    if config.latents_mean is None or config.latents_std is None:
        return None
    mean, std = (latents.new_tensor(x).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std))
    return mean, std / config.get("scaling_factor", 1.0)


def _as_frame(vae: Any, x_BCHW: Tensor) -> Tensor:
    return x_BCHW.unsqueeze(2) if is_of_video(vae) else x_BCHW


class LatentCache:
    """A cache of the latents of pictures by their content, which a group's samples and later steps share.

    The latents that were used longest ago are dropped first.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, image_BCHW: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the latents of one picture [1, 3, H, W], from the cache or by `make`."""
        content = image_BCHW.detach().float().cpu().contiguous().numpy().tobytes()
        key = blake2b(f"{list(image_BCHW.shape)}".encode() + content, digest_size=16).digest()
        row = self._rows.get(key)
        if row is None:
            row = make(image_BCHW)
            self._bytes += row.nbytes
        self._rows[key] = row
        self._rows.move_to_end(key)
        while self._bytes > self._limit and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes
        return row
