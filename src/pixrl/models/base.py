"""The model interfaces: a `Renderer` makes pictures, a `FlowPolicy` is a Renderer that can be trained.

A `ReferencePolicy` also takes reference pictures, which `on_square` lays out for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.config import parse_resolution
from pixrl.device import DType
from pixrl.errors import InputError, ShapeError
from pixrl.models.memory_plan import Base


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: token features [B, L, D], pooled features [B, E] and, where used, reference latents.

    Attributes:
        tokens_BLD: one row a prompt; zeros where it is padding.
        pooled_BE: None where the model takes none.
        references: latents of reference pictures.
        mask_BL: true on a prompt's own tokens, false on padding; None: every token counts, as SD3, SDXL and FLUX have
            it, which attend to padding too.
        away: what guidance leads away from, row by row, where that depends on the references; None: it does not.
        sizes_BN2: rows and columns of the latents of each row's N references, where these have several shapes; zeros
            fill up what is beyond. None: all references at a place have the shape of their tensor.
    """

    tokens_BLD: Tensor
    pooled_BE: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    mask_BL: Tensor | None = None
    away: "Conditioning | None" = None
    sizes_BN2: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens_BLD.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "Conditioning":
        index = (
            rows
            if isinstance(rows, slice)
            else torch.as_tensor(rows, dtype=torch.long).to(self.tokens_BLD.device)
        )
        mask = None if self.mask_BL is None else self.mask_BL[index]
        sizes = self.sizes_BN2
        if sizes is not None:  # on the CPU, since shapes are read from it
            sizes = sizes[index if isinstance(index, slice) else index.cpu()]
        away = None if self.away is None else self.away[rows]
        return replace(self._map(lambda x: x[index]), mask_BL=mask, away=away, sizes_BN2=sizes)

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Conditioning":
        """Return the same rows on a device, in a dtype."""
        mask = None if self.mask_BL is None else self.mask_BL.to(device=device)
        away = None if self.away is None else self.away.to(device=device, dtype=dtype)
        return replace(self._map(lambda x: x.to(device=device, dtype=dtype)), mask_BL=mask, away=away)

    @property
    def own_BL(self) -> Tensor:
        """True on the tokens that count, which are all where there is no mask."""
        if self.mask_BL is not None:
            return self.mask_BL
        return torch.ones(self.tokens_BLD.shape[:2], dtype=torch.bool, device=self.tokens_BLD.device)

    @property
    def sizes(self) -> Tensor:
        """The rows and columns of every reference's latents, [B, N, 2]."""
        if self.sizes_BN2 is not None:
            return self.sizes_BN2
        found = torch.tensor([one.shape[2:] for one in self.references], dtype=torch.long)
        return found.view(1, len(self.references), 2).expand(len(self), -1, -1)

    @property
    def mean_BD(self) -> Tensor:
        """The mean of each prompt's own tokens, float32."""
        if self.mask_BL is None:
            return self.tokens_BLD.float().mean(dim=1)
        own_BL1 = self.mask_BL[:, :, None]
        return (self.tokens_BLD.float() * own_BL1).sum(dim=1) / own_BL1.sum(dim=1)

    def mixed_mask(self, used_MBL: Tensor) -> Tensor | None:
        """Return the mask [M, L] of M mixtures of these rows: a token counts where it is one of a row that is used.

        `used_MBL`: bool, of each row or of each token of it ([M, B, 1] or [M, B, L]).
        """
        return None if self.mask_BL is None else (used_MBL.to(self.mask_BL.device) & self.mask_BL).any(dim=1)

    def mix(self, weights: Tensor) -> "Conditioning":
        """Return the weighted sum over the batch as one row: weights [B] for all columns, or [B, D] column by column.

        With column weights the pooled features take each concept's mean weight.

        Raises:
            ShapeError: the weights have another shape.
        """
        if weights.shape[0] != len(self) or weights.ndim not in (1, 2):
            raise ShapeError(
                f"mix: weights {tuple(weights.shape)} for {len(self)} conditionings; give [B] or [B, D]."
            )
        if self.sizes_BN2 is not None:
            raise ShapeError("mix: references of several shapes cannot be added up; lay them out on squares.")
        column_weights = weights if weights.ndim == 2 else weights[:, None]
        flat = column_weights.mean(dim=1)
        return replace(
            self,
            tokens_BLD=(self.tokens_BLD * column_weights[:, None, :]).sum(0, keepdim=True),
            pooled_BE=None
            if self.pooled_BE is None
            else (self.pooled_BE * flat[:, None]).sum(0, keepdim=True),
            references=tuple(
                (r * flat.view(-1, *[1] * (r.ndim - 1))).sum(0, keepdim=True) for r in self.references
            ),
            mask_BL=self.mixed_mask((column_weights != 0).any(dim=1)[None, :, None]),
            away=None if self.away is None else self.away.mix(weights),
        )

    def lerp(self, other: "Conditioning", weight: Tensor | float) -> "Conditioning":
        """Return (1 - weight) * self + weight * other; the weight is a number or [B]."""
        w = torch.as_tensor(weight, dtype=self.tokens_BLD.dtype, device=self.tokens_BLD.device)

        def blend(a: Tensor, b: Tensor) -> Tensor:
            return torch.lerp(a, b, w.view(-1, *[1] * (a.ndim - 1)) if w.ndim else w)

        pooled = None
        if self.pooled_BE is not None and other.pooled_BE is not None:
            pooled = blend(self.pooled_BE, other.pooled_BE)
        if not torch.equal(self.sizes, other.sizes):
            raise ShapeError("lerp: the references of the two have other shapes; lay them out on squares.")
        refs = tuple(blend(a, b) for a, b in zip(self.references, other.references, strict=True))
        mask = None
        if self.mask_BL is not None or other.mask_BL is not None:
            far = w.view(-1, 1)
            mask = (self.own_BL & (far != 1)) | (other.own_BL & (far != 0))
        away = None
        if self.away is not None and other.away is not None:
            away = self.away.lerp(other.away, weight)
        return Conditioning(
            blend(self.tokens_BLD, other.tokens_BLD), pooled, refs, mask, away, self.sizes_BN2
        )

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Return all rows of the parts, in order."""
        pooled = [p.pooled_BE for p in parts if p.pooled_BE is not None]
        columns = zip(*(p.references for p in parts), strict=True)
        is_masked = any(p.mask_BL is not None for p in parts)
        aways = [p.away for p in parts if p.away is not None]
        return Conditioning(
            torch.cat([p.tokens_BLD for p in parts]),
            torch.cat(pooled) if pooled else None,
            tuple(torch.cat(_filled_up(column)) for column in columns),
            torch.cat([p.own_BL for p in parts]) if is_masked else None,
            Conditioning.cat(aways) if len(aways) == len(parts) else None,
            _joint_sizes(parts),
        )

    def by_shape(self) -> "Iterator[tuple[Tensor, Conditioning]]":
        """Yield the rows whose references have the same shapes, and what they are, its references without filling."""
        if self.sizes_BN2 is None:
            yield torch.arange(len(self)), self
            return
        for sizes_N2 in self.sizes_BN2.unique(dim=0):
            rows = (self.sizes_BN2 == sizes_N2).flatten(1).all(dim=1).nonzero().flatten()
            part = self[rows]
            cut = tuple(x[:, :, :h, :w] for x, (h, w) in zip(part.references, sizes_N2.tolist(), strict=True))
            yield rows, replace(part, references=cut, sizes_BN2=None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Return the rows with every tensor but the mask changed."""
        pooled = None if self.pooled_BE is None else change(self.pooled_BE)
        return replace(
            self,
            tokens_BLD=change(self.tokens_BLD),
            pooled_BE=pooled,
            references=tuple(change(r) for r in self.references),
        )


def _filled_up(references: Sequence[Tensor]) -> list[Tensor]:
    """Return latents [B, C, h, w] with zeros below and at the right up to the largest of them."""
    rows, columns = (max(one.shape[axis] for one in references) for axis in (2, 3))
    return [F.pad(one, (0, columns - one.shape[3], 0, rows - one.shape[2])) for one in references]


def _joint_sizes(parts: Sequence[Conditioning]) -> Tensor | None:
    """Return the sizes of all references of the parts, or None where all at a place have one shape."""
    shapes = {tuple(one.shape[1:] for one in part.references) for part in parts}
    if len(shapes) == 1 and all(part.sizes_BN2 is None for part in parts):
        return None
    return torch.cat([part.sizes for part in parts])


@dataclass(frozen=True)
class Mixture:
    """Several prompts for each picture, for which the network's predictions are averaged at every step.

    Attributes:
        parts: N conditionings of B rows each.
        weights_S: for each of the S sampling steps the parts' weights, [B, N, 1, 1], or masks of any size,
            [B, N, H, W], which are resized to the latents. They sum to one over N.
    """

    parts: tuple[Conditioning, ...]
    weights_S: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        rows = {len(part) for part in self.parts} | {len(weights) for weights in self.weights_S}
        counts = {weights.shape[1] for weights in self.weights_S}
        if len(rows) != 1 or counts != {len(self.parts)} or {w.ndim for w in self.weights_S} != {4}:
            raise ShapeError(
                f"Mixture: {len(self.parts)} parts and weights of {[list(w.shape) for w in self.weights_S]}; each step "
                "needs weights [B, N, H, W] of N parts with B rows."
            )

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: slice) -> "Mixture":
        return Mixture(tuple(part[rows] for part in self.parts), tuple(w[rows] for w in self.weights_S))

    @property
    def passes(self) -> int:
        """The number of the network's evaluations in all, counted in pictures; parts without weight are left out."""
        return sum(len(self.used(step)[0]) for step in range(len(self.weights_S)))

    def used(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the pairs (row, part) that have weight at a step, as two vectors of equal length."""
        rows, parts = (self.weights_S[step].flatten(2) != 0).any(dim=2).nonzero(as_tuple=True)
        return rows, parts

    def conditioning(self, step: int) -> Conditioning:
        """Return the prompts of the pairs of `used`, one row each."""
        rows, parts = self.used(step)
        return Conditioning.cat(self.parts)[parts * len(self) + rows]

    def average(self, step: int, predictions: Tensor) -> Tensor:
        """Return the weighted sum [B, C, h, w] of predictions [pairs, C, h, w] for the pairs of `used`."""
        rows, parts = self.used(step)
        weights_BNHW = self.weights_S[step].to(predictions)
        if weights_BNHW.shape[2:] != (1, 1):
            size = predictions.shape[2:]
            weights_BNHW = F.interpolate(
                weights_BNHW, size=size, mode="bilinear", antialias=True, align_corners=False
            )
        found = predictions.new_zeros(len(self), len(self.parts), *predictions.shape[1:])
        found[rows, parts] = predictions
        return (found * weights_BNHW[:, :, None]).sum(dim=1)


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of sampling.

    Attributes:
        steps: how many.
        guidance: the scale.
        resolution: size of a picture in pixels: the side of a square, or WIDTHxHEIGHT.
        negative_prompt: what guidance leads away from; None: what the family's pipeline does.
    """

    steps: int
    guidance: float
    resolution: int | str
    negative_prompt: str | None = None

    @property
    def width(self) -> int:
        """The columns of a picture, in pixels."""
        return parse_resolution(self.resolution)[0]

    @property
    def height(self) -> int:
        """The rows of a picture, in pixels."""
        return parse_resolution(self.resolution)[1]

    @property
    def longest(self) -> int:
        """The longer side of a picture, in pixels."""
        return max(self.width, self.height)


class Renderer(ABC):
    """A frozen generator: all that concept fusion needs. Prompt embeddings are computed once and cached.

    `models.load` makes one by `Adapter(checkpoint, name=, device=, dtype=, steps=, guidance=, resolution=, t5=, plan=)`
    and passes on what it was given; also `negative_prompt=`, where one was given and the class reads it. An adapter of
    another package is found by the entry points `pixrl.models`, one in a file of yours by
    `path/to/file.py:Name@FOLDER`.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    """The `_class_name`s, in a checkpoint's model_index.json, of the pipelines that it loads."""
    pipeline_class: ClassVar[str | None] = None
    """The class of diffusers that it wraps; None: its memory cannot be estimated before it loads."""
    gpu_dtype: ClassVar[DType] = DType.BFLOAT16
    """The dtype that "auto" stands for on a GPU."""
    lora_layout: ClassVar[str | None] = None
    """The family whose names its LoRA files use, such as sd3; None: none can be merged."""
    base: Base = Base.DTYPE
    """The form of its frozen weights; an adapter that can quantize them sets it to its plan's."""
    reads_negative_prompt: ClassVar[bool] = False
    """Whether its guidance is a second pass that leads away from a text, which may be given as `negative_prompt`."""
    licences: ClassVar[Mapping[str, str]] = {}
    """The licences of published weights by hub id, as known when this was written; the model's page decides."""
    name: str
    device: torch.device
    settings: SamplingSettings
    vocabulary: frozenset[str] | None
    """The words its prompts may use, or None when any text is allowed."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode each prompt as one row; equal prompts give equal rows.

        Raises:
            UnknownWordError: a word is outside `vocabulary`.
        """

    @abstractmethod
    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        """Draw pictures [B, 3, H, W], float32 in [0, 1] on the CPU; picture i depends on row i and seed i alone."""

    def sample_mixture(self, mixture: Mixture, seeds: Sequence[int]) -> Tensor:
        """Draw pictures [B, 3, H, W] as `sample` does, from averaged predictions for several prompts.

        Raises:
            InputError: this model cannot do that.
            ShapeError: the mixture has weights for another number of steps than the model takes.
        """
        raise InputError(
            f"{self.name} cannot average predictions for several prompts: {type(self).__name__} has no sample_mixture. "
            "Take mixing=columns or mixing=tokens."
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short hash of the weights for manifests, such as `pixrl.hub.checkpoint_fingerprint`.

        A run is not resumed with another one. An adapter's own file of Python is part of that of its checkpoint.
        """

    @classmethod
    def require_negative_prompt(cls, name: str) -> None:
        """Raise InputError where a model of this class, loaded as `name`, reads no negative prompt."""
        if not cls.reads_negative_prompt:
            raise InputError(
                f"negative_prompt has no effect on {name}: its adapter {cls.__name__} draws without a second pass that "
                "could lead away from a text. Leave it out, and say in the prompt what is wanted."
            )

    def merge_lora(self, place: Path) -> None:
        """Add a LoRA to the frozen weights.

        Raises:
            InputError: LoRA files for such a model are not read.
        """
        raise InputError(
            f"The LoRA {place} cannot be merged into {self.name}, a {type(self).__name__}: pixrl reads those of "
            "SD3, FLUX, FLUX.2, SDXL, Z-Image and Qwen-Image. Leave it out."
        )


class FlowPolicy(Renderer):
    """A trainable rectified-flow generator."""

    in_step: bool = False
    """Whether every process must make the same passes in the same order, since each holds a part of the weights."""

    @property
    def draws_by_euler(self) -> bool:
        """Whether `sample` takes Euler steps on `velocity` over `schedule`, or has a way of its own."""
        return True

    @abstractmethod
    def schedule(self, steps: int) -> Tensor:
        """Return noise levels falling to 0, [steps + 1], the same for sampling and for training.

        The first is 1, pure noise, or the highest that the model was trained at; a picture begins at it times
        `initial_noise`.
        """

    @abstractmethod
    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Draw standard normal latents from one generator a seed: [B, C, h, w], float32."""

    @abstractmethod
    def velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model's velocity (noise - data) at x_t [B, C, h, w] and t in [0, 1], where 1 is noise."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pictures [B, 3, H, W] in [0, 1], differentiably."""

    def text_present(self) -> AbstractContextManager[None]:
        """Keep the text encoders on the device while it is open; needed only around use of the encoders themselves."""
        return nullcontext()

    def decoder_present(self) -> AbstractContextManager[None]:
        """Keep the decoder on the device while it is open; needed only around a gradient through `decode`."""
        return nullcontext()

    def quick_backward(self) -> AbstractContextManager[None]:
        """Let `velocity` take kernels with a faster backward pass, other ones than in sampling, while it is open.

        Results are equal but for rounding, which is too much for losses that divide densities by those of sampling.
        """
        return nullcontext()

    def folded(self) -> AbstractContextManager[None]:
        """Let passes without a gradient compute with the active slot inside the weights, while it is open.

        No other slot may be used within it. Results are equal but for rounding.
        """
        return nullcontext()

    @abstractmethod
    def slot(self, name: str) -> AbstractContextManager[None]:
        """Let `velocity` use a LoRA slot while it is open: 'current', 'old', 'ema', or 'reference' (adapters off)."""


class ImageEncoder(ABC):
    """A model that takes pictures of any origin as clean latents."""

    @abstractmethod
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W] in [0, 1] as clean latents [B, C, h, w], each row by itself."""


class ReferencePolicy(ImageEncoder):
    """A policy whose conditioning may carry reference pictures."""

    reference_side: int
    """The side in pixels of the square that a reference is laid out on, or the longer side where it keeps its shape."""

    @abstractmethod
    def with_references(self, conditioning: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        """Return the prompts with reference pictures, each [B, 3, H, W] with sides that are multiples of two latents.

        Raises:
            ShapeError: another number of pictures than of prompts.
        """

    def laid_out(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Return pictures [3, H, W] of any size as the model is shown them: on white squares."""
        return [on_square(picture, self.reference_side) for picture in pictures]

    def show(
        self, conditioning: Conditioning, references: Sequence[Tensor], prompts: Sequence[str]
    ) -> Conditioning:
        """Return what `with_references` does; a model that reads pictures and prompts together reads them anew.

        Raises:
            ShapeError: another number of pictures than of prompts.
        """
        return self.with_references(conditioning, references)


def on_square(image_CHW: Tensor, side: int) -> Tensor:
    """Lay a picture [3, H, W] of any size on a white square [3, side, side], neither cut nor stretched.

    Raises:
        ShapeError: it is no RGB picture.
    """
    return on_canvas(image_CHW, side, side)


def on_canvas(image_CHW: Tensor, width: int, height: int) -> Tensor:
    """Lay a picture [3, H, W] of any size in the middle of white, [3, height, width], neither cut nor stretched.

    Raises:
        ShapeError: it is no RGB picture.
    """
    if image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
        raise ShapeError(f"A reference picture is [3, H, W], not {list(image_CHW.shape)}.")
    rows, columns = image_CHW.shape[1:]
    scale = min(height / rows, width / columns)
    size = (max(1, round(rows * scale)), max(1, round(columns * scale)))
    shown = image_CHW.float()
    if size != (rows, columns):
        shown = F.interpolate(shown[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas = torch.ones(3, height, width)
    canvas[:, top : top + size[0], left : left + size[1]] = shown.clamp(0, 1)
    return canvas
