"""The model interfaces: a `Renderer` makes pictures, a `FlowPolicy` is a Renderer that can be trained.

A `ReferencePolicy` also takes reference pictures, which `on_square` lays out for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.config import parse_resolution
from pixrl.device import DType
from pixrl.errors import InputError, ShapeError
from pixrl.models.conditioning import Conditioning, Mixture
from pixrl.models.memory.plan import Base

__all__ = [
    "Conditioning",
    "FlowPolicy",
    "ImageEncoder",
    "Mixture",
    "ReferencePolicy",
    "Renderer",
    "SamplingSettings",
    "on_canvas",
    "on_square",
]


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
    reads_regions: ClassVar[bool] = False
    """Whether its places attend to a row's prompts by the masks of `Conditioning.regions_BNHW`."""
    reads_pictures: ClassVar[bool] = False
    """Whether rows of one batch may be shown different numbers of references, so that a picture can be a concept."""
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

    @classmethod
    def require_regions(cls, name: str) -> None:
        """Raise InputError where a model of this class, loaded as `name`, has no attention by region."""
        if not cls.reads_regions:
            raise InputError(
                f"{name} cannot attend by region: its adapter {cls.__name__} takes one prompt a picture. SD3, SDXL and "
                "FLUX models can; with this one take mixing=spatial, at a pass for each concept."
            )

    @classmethod
    def require_pictures(cls, name: str) -> None:
        """Raise InputError where a model of this class, loaded as `name`, takes no picture for a concept."""
        if not cls.reads_pictures:
            how = (
                "is shown as many pictures with every prompt"
                if issubclass(cls, ReferencePolicy)
                else "draws from words alone"
            )
            raise InputError(
                f"{name} takes no picture for a concept: its adapter {cls.__name__} {how}. FLUX models can, FLUX.1 "
                "Kontext and toy:flux among them: --model toy:flux. Or name what it shows: pixrl fuse owl snail."
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
