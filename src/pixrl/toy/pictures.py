"""Pictures of the toy world as tensors, and what spoils them."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.toy.scene import Picture, Scene, draw


def to_tensor(images: Picture) -> Tensor:
    """Return pictures [B, H, W, 3] of bytes as [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)


def drawn(scenes: Iterable[Scene]) -> Tensor:
    """Return the pictures of scenes [B, 3, 128, 128]."""
    return to_tensor(np.stack([draw(scene).picture for scene in scenes]))


def smear(images: Tensor, side: int) -> Tensor:
    """Return pictures [B, 3, 128, 128] whose details smaller than `side` pixels are gone."""
    coarse = F.avg_pool2d(images, side, ceil_mode=True, count_include_pad=False)
    return F.interpolate(coarse, images.shape[-2:], mode="bilinear")


def spoil(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each picture with one of five faults: noise, blur, swapped blocks, washed-out colours, or a grid."""
    faults = (_noisy, _blurred, _shuffled, _washed, _gridded)
    return torch.stack([faults[int(rng.integers(len(faults)))](image, rng) for image in images])


def _noisy(image: Tensor, rng: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(rng.standard_normal(image.shape)).float()
    return (image + float(rng.uniform(0.1, 0.3)) * noise).clamp(0, 1)


def _blurred(image: Tensor, rng: np.random.Generator) -> Tensor:
    side = int(rng.choice((16, 24, 32, 40)))
    small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, image.shape[1:], mode="bilinear", align_corners=False)[0]


def _shuffled(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Blocks of 32 pixels in random order."""
    n = image.shape[1] // 32
    blocks = image.unfold(1, 32, 32).unfold(2, 32, 32).reshape(3, n * n, 32, 32)
    mixed = blocks[:, torch.from_numpy(rng.permutation(n * n))].view(3, n, n, 32, 32)
    return mixed.permute(0, 1, 3, 2, 4).reshape(image.shape)


def _washed(image: Tensor, rng: np.random.Generator) -> Tensor:
    return image.mean() + (image - image.mean()) * float(rng.uniform(0.15, 0.45))


def _gridded(image: Tensor, rng: np.random.Generator) -> Tensor:
    period = int(rng.integers(4, 11))
    lines = (torch.arange(image.shape[1]) % period == 0).float()
    grid = torch.maximum(lines[:, None], lines[None, :])
    return image + (float(rng.uniform(0, 1)) - image) * grid * float(rng.uniform(0.4, 0.9))
