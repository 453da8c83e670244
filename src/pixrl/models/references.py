"""Reference pictures as tokens: their latents stand behind the picture's own in one sequence, whose end is cut off."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.errors import InputError, ShapeError
from pixrl.hub import Checkpoint
from pixrl.models.base import Conditioning, ReferencePolicy
from pixrl.models.pipeline import FlowPipelinePolicy


class ReferenceShape(StrEnum):
    """The shape in which references are shown."""

    SQUARE = "square"
    """Each on a white square, nothing cut off: one batch holds references of any shapes."""
    OWN = "own"
    """Each as it is, up to its last whole token, as UNO shows them: rows of one shape go through the model together."""


class TokenReferences(FlowPipelinePolicy, ReferencePolicy):
    """A pipeline that is shown any number of reference pictures as clean latents, two by two as its own."""

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        """Load the checkpoint; the options are those of `FlowPipelinePolicy`."""
        super().__init__(checkpoint, **options)
        self.shape = ReferenceShape.SQUARE
        self.reference_side = min(self.settings.width, self.settings.height)

    @property
    def reference_unit(self) -> int:
        """The pixels that a reference's sides must be multiples of."""
        return 2 * int(self.pipeline.vae_scale_factor)

    def place(self, *, side: int | None = None, shape: ReferenceShape | None = None) -> None:
        """Set the shape in which references are shown, and the side of the square or the longer one; None: as it is.

        Raises:
            InputError: the side is no multiple of two latents.
        """
        unit = self.reference_unit
        if side is not None and (side < unit or side % unit):
            raise InputError(f"The side of a reference must be a multiple of {unit} pixels, got {side}.")
        self.reference_side = self.reference_side if side is None else side
        self.shape = self.shape if shape is None else shape

    def laid_out(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Return pictures [3, H, W] as the model is shown them: on white squares, or in their own shapes."""
        if self.shape is ReferenceShape.OWN:
            return [in_own_shape(picture, self.reference_side, self.reference_unit) for picture in pictures]
        return super().laid_out(pictures)

    def blank_reference(self) -> Tensor:
        """Return zeros in the shape of one reference's latents, [1, C, h, w]."""
        side = self.reference_side // int(self.pipeline.vae_scale_factor)
        return torch.zeros(1, self.latent_shape[0], side, side)

    def with_references(self, conditioning: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        for images in references:
            _check_pictures(images, self.reference_unit)
            if len(images) != len(conditioning):
                raise ShapeError(
                    f"{len(images)} reference pictures for {len(conditioning)} prompts; give one a prompt."
                )
        return replace(conditioning, references=tuple(self.encode_images(images) for images in references))

    def _velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity, in one pass for each number and shape of references among the rows."""
        if conditioning.sizes_BN2 is None:
            return super()._velocity(x_t, t_B, conditioning)
        order, found = [], []
        for rows, part in conditioning.by_shape():
            order.append(rows)
            found.append(super()._velocity(x_t[rows], t_B[rows], part))
        return torch.cat(found)[torch.cat(order).argsort().to(x_t.device)]


def in_own_shape(image_CHW: Tensor, longest: int, unit: int) -> Tensor:
    """Scale a picture [3, H, W] to a longer side, and cut the middle whose sides are multiples of `unit` pixels.

    Raises:
        InputError: a side would be shorter than that.

    Source: UNO's `preprocess_ref` (bytedance/UNO).
    """
    rows, columns = image_CHW.shape[1:]
    size = tuple(int(longest / max(rows, columns) * side) for side in (rows, columns))
    height, width = (side // unit * unit for side in size)
    if min(height, width) < 1:
        raise InputError(
            f"A reference of {columns} x {rows} pixels, scaled to {longest} on its longer side, is thinner than "
            f"a token, {unit} pixels: give a larger references.side, or leave references.shape out."
        )
    shown = image_CHW.float()
    if size != (rows, columns):
        shown = F.interpolate(shown[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return shown[:, top : top + height, left : left + width].clamp(0, 1)


def _check_pictures(images: object, unit: int) -> None:
    """Raise an error unless the images are RGB, in [0, 1], with sides that are multiples of two latents."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        raise ShapeError(
            f"A reference is RGB pictures [B, 3, H, W], one a prompt, got {_said(images)}. Give a list of them, "
            "each with the batch's axis (picture[None]); pixrl.data.pictures.read_picture puts transparency on white."
        )
    height, width = images.shape[2:]
    if min(height, width) < unit or height % unit or width % unit:
        side = max(unit, -(-max(height, width) // unit) * unit)
        raise ShapeError(
            f"The sides of a reference must be multiples of {unit} pixels, got {height} x {width}. Lay it out on "
            f"white, nothing cut off: pixrl.models.base.on_square(picture, {side})."
        )
    if not images.is_floating_point():
        raise InputError(
            f"A reference must be floating point in [0, 1], got {_said(images)}. Give images.float() / 255."
        )
    if not images.isfinite().all():
        raise InputError("A reference holds values that are not finite. Its values must lie in [0, 1].")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise InputError(
            f"The values of a reference must lie in [0, 1], got {low:g} to {high:g}. Give images / 255 for 0..255, "
            "(images + 1) / 2 for -1..1, and images.clamp(0, 1) for what a resize overshot."
        )


def _said(given: object) -> str:
    """Describe what was given, for an error message."""
    if isinstance(given, Tensor):
        return f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    return f"a {type(given).__name__}"
