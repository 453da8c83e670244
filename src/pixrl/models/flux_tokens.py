"""FLUX's image tokens: packing latents two by two, and the position ids of a target with reference pictures.

Reference tokens follow the target's tokens in one sequence (UNO; FLUX.1 Kontext), so that the transformer attends to
them as to any other token; position ids tell them apart.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from pixrl.errors import InputError, ShapeError, did_you_mean


class Preset(StrEnum):
    """How references are placed: `uno` on a diagonal staircase after the target, `kontext` on a plane of their own."""

    UNO = "uno"
    KONTEXT = "kontext"


class Shift(StrEnum):
    """How far a schedule that depends on the resolution is shifted; the same for sampling and training."""

    FLUX = "flux"
    """By the picture's tokens, as FluxPipeline: mu = 0.630 at 512 x 512."""
    UNO = "uno"
    """As UNO's published inference: mu = 0.459 at 512 x 512."""


Size = tuple[int, int]
"""(rows, columns), in tokens."""


def position_ids(target: Size, references: Sequence[Size], preset: str) -> tuple[Tensor, list[Tensor]]:
    """Position ids of the target's tokens and of each reference's, float32 [rows * columns, 3].

    The target's ids are (0, row, column). With `uno` the first reference starts at (rows, columns) of the target and
    each next one further by the size of the one before; with `kontext` references lie at no offset with axis 0 at 1.

    Raises:
        InputError: an unknown preset, or a size that is not two positive whole numbers.

    Source: UNO (bytedance/UNO) and FLUX.1 Kontext; EQUATIONS.md, "Published settings for personalize".
    """
    if preset not in list(Preset):
        raise InputError(
            f"Unknown preset {preset!r}.{did_you_mean(str(preset), list(Preset))} Use {', '.join(Preset)}."
        )
    if not isinstance(references, Iterable):
        raise InputError(f"references must be a list of sizes, such as [(32, 32)], got {references!r}.")
    own, others = _checked_size(target), [_checked_size(size) for size in references]
    if preset == Preset.KONTEXT:
        return _grid(own), [_grid(size, plane=1) for size in others]
    starts = accumulate(chain([own], others), lambda a, b: (a[0] + b[0], a[1] + b[1]))
    return _grid(own), [_grid(size, start=start) for size, start in zip(others, starts, strict=False)]


def _checked_size(given: Any) -> Size:
    """InputError unless it is two whole numbers of at least 1; 2.0 is one."""
    try:
        rows, columns = given
        size = int(rows), int(columns)
        is_whole = size == (rows, columns)
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole:
        raise InputError(
            f"A size in tokens is two whole numbers, (rows, columns), got {given!r}. Give position_ids one for the "
            "target and a list of them for the references, such as position_ids((32, 32), [(32, 32)], 'uno')."
        )
    if min(size) < 1:
        raise InputError(f"A size in tokens must be positive, got {size}.")
    return size


def _grid(size: Size, *, start: Size = (0, 0), plane: int = 0) -> Tensor:
    rows, columns = (
        torch.arange(n, dtype=torch.float32) + offset for n, offset in zip(size, start, strict=True)
    )
    row_ids, column_ids = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.full_like(row_ids, plane), row_ids, column_ids), dim=-1).flatten(0, 1)


def pack_latents(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, H/2 * W/2, 4C], two by two as FLUX packs them.

    Raises:
        ShapeError: an odd side.
    """
    if latents.ndim != 4 or latents.shape[2] % 2 or latents.shape[3] % 2:
        raise ShapeError(f"pack_latents takes [B, C, H, W] with even H and W, got {list(latents.shape)}.")
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack_latents(tokens: Tensor, size: Size) -> Tensor:
    """The inverse: tokens [B, rows * columns, 4C] as latents [B, C, 2 rows, 2 columns].

    Raises:
        ShapeError: the number of tokens is not rows * columns.
    """
    rows, columns = size
    if tokens.ndim != 3 or tokens.shape[1] != rows * columns or tokens.shape[2] % 4:
        raise ShapeError(
            f"unpack_latents takes [B, {rows * columns}, 4C] for {rows} x {columns} tokens, got {list(tokens.shape)}."
        )
    blocks = tokens.view(len(tokens), rows, columns, tokens.shape[2] // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), tokens.shape[2] // 4, 2 * rows, 2 * columns)
