"""Policies that are shown reference pictures, and how a picture of any size is laid out for them."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.errors import ShapeError
from pixrl.models.base import Conditioning

CACHE_BYTES = 2**28


class ReferencePolicy(ABC):
    """A policy whose conditioning may carry reference pictures."""

    reference_side: int
    """Rows and columns of pixels that a reference is laid out on."""

    @abstractmethod
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] of pictures [B, 3, H, W] in [0, 1]; a row does not depend on the others."""

    @abstractmethod
    def with_references(self, conditioning: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        """The same prompts with reference pictures: each [B, 3, H, W], sides multiples of two latents.

        Raises:
            ShapeError: another number of pictures than of prompts.
        """


def on_square(image_CHW: Tensor, side: int) -> Tensor:
    """A picture [3, H, W] of any size on a white square [3, side, side]: nothing cut off, nothing stretched.

    Raises:
        ShapeError: it is no RGB picture.
    """
    if image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
        raise ShapeError(f"A reference picture is [3, H, W], not {list(image_CHW.shape)}.")
    height, width = image_CHW.shape[1:]
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    shown = image_CHW.float()
    if size != (height, width):
        shown = F.interpolate(shown[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    square = torch.ones(3, side, side)
    square[:, top : top + size[0], left : left + size[1]] = shown.clamp(0, 1)
    return square


class LatentCache:
    """Latents of pictures by their content: a group's samples and later steps share them. Oldest first out."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, image_BCHW: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What `make` gives for one picture [1, 3, H, W]."""
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
