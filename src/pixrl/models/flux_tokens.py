"""FLUX's image tokens: packing latents two by two, and the position ids of a target with reference pictures.

Reference tokens follow the target's tokens in one sequence (UNO; FLUX.1 Kontext), so that the transformer attends to
them as to any other token; position ids tell them apart.
"""

from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate, chain

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
        InputError: an unknown preset, or a size that is not positive.

    Source: UNO (bytedance/UNO) and FLUX.1 Kontext; EQUATIONS.md, "Published settings for personalize".
    """
    if preset not in list(Preset):
        raise InputError(
            f"Unknown preset {preset!r}.{did_you_mean(preset, list(Preset))} Use {', '.join(Preset)}."
        )
    for rows, columns in (target, *references):
        if rows < 1 or columns < 1:
            raise InputError(f"A size in tokens must be positive, got {(rows, columns)}.")
    if preset == Preset.KONTEXT:
        return _grid(target), [_grid(size, plane=1) for size in references]
    starts = accumulate(chain([target], references), lambda a, b: (a[0] + b[0], a[1] + b[1]))
    return _grid(target), [_grid(size, start=start) for size, start in zip(references, starts, strict=False)]


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
