"""Preprocessing of pictures as tensors, in batches: the published PIL preprocessing within one grey level.

The numbers come from the checkpoint's own preprocessor_config.json (or processor_config.json). Pictures are rounded to
8 bits where PIL rounds them, so that a score taken in memory equals the score of the saved PNG. No gradient passes
through rounding, so each preprocessing has a `differentiable` twin without it. At the end are helpers of rewards that
score pictures together with texts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.device import quiet_loading
from pixrl.errors import CheckpointError, ShapeError
from pixrl.hub_check import read_json
from pixrl.libraries import require
from pixrl.types import RewardBatch, Scores

_FILTERS = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters that published checkpoints use."""
_HALF_LEVEL = 0.5 / 255
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def to_grey_levels(images_BCHW: Tensor) -> Tensor:
    """Round pictures to the 256 levels of a PNG, still in [0, 1]."""
    return (images_BCHW.clamp(0, 1) * 255).round() / 255


def batches(images_BCHW: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the pictures, at most `size` at a time."""
    return (images_BCHW[start : start + size] for start in range(0, len(images_BCHW), size))


def require_images(images_BCHW: Tensor) -> None:
    """Require pictures [B, 3, H, W] of a floating type.

    Raises:
        ShapeError: they have another shape or type, or there are none.
    """
    shape = list(images_BCHW.shape)
    if images_BCHW.ndim != 4 or shape[1] != 3 or 0 in shape or not images_BCHW.is_floating_point():
        raise ShapeError(f"Pictures must be float [B, 3, H, W] in [0, 1], got {images_BCHW.dtype} {shape}.")


class InputPreprocessing(ABC):
    """The interface of preprocessing: pictures [B, 3, H, W] in [0, 1], of one size, to a model's input."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Return a model's input as the published code makes it, from pictures rounded to 8 bits."""

    @abstractmethod
    def differentiable(self, images_BCHW: Tensor) -> Tensor:
        """Return the same input but for rounding to 8 bits, through which no gradient would pass.

        PIL rounds after each of two passes, so a value may differ by 0.5 + 0.5 * 1.25 grey levels, 0.3 on average.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return one line for provenance."""

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Return (picture - mean) / std."""
        mean, std = (images_BCHW.new_tensor(x).view(1, 3, 1, 1) for x in (self.mean, self.std))
        return (images_BCHW - mean) / std


Resize = Callable[[Tensor, tuple[int, int], str], Tensor]
"""A function of pictures, (rows, columns) and the mode of interpolation to resized pictures."""


@dataclass(frozen=True)
class Preprocessing(InputPreprocessing):
    """The usual preprocessing of vision models: resize, centre crop, normalize."""

    shortest: int | None
    """The length to which the shorter side is scaled, the aspect ratio kept; None: it is not."""
    size: tuple[int, int] | None
    """The rows and columns to which a picture is scaled, the aspect ratio not kept; None: it is not."""
    crop: tuple[int, int] | None
    """The rows and columns of the centre crop; None: nothing is cut off."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str

    @classmethod
    def dreambench(cls) -> "Preprocessing":
        """Return DreamBench's transform of DINO: shorter side 256 bicubic, centre crop 224, ImageNet's statistics.

        The preprocessor_config.json beside facebook/dino-vits16 says otherwise (224 x 224 bilinear, 0.5), and its
        numbers are not comparable with published ones.
        """
        return cls(256, None, (224, 224), IMAGENET_MEAN, IMAGENET_STD, "bicubic")

    @classmethod
    def from_folder(cls, path: Path, *, square: bool) -> "Preprocessing":
        """Read the preprocessing from a checkpoint's folder.

        Args:
            path: the folder, with preprocessor_config.json or processor_config.json.
            square: whether a bare integer size means both sides, not the shorter one.

        Raises:
            CheckpointError: neither file is there, or one of its values is not supported.
        """
        config: object = None
        if (path / "preprocessor_config.json").is_file():
            config = read_json(path / "preprocessor_config.json")
        elif (path / "processor_config.json").is_file():
            config = read_json(path / "processor_config.json").get("image_processor")
        if not isinstance(config, Mapping):
            raise CheckpointError(
                f"{path} has no preprocessor_config.json, so how its pictures are to be resized and normalized is "
                "unknown. Save the model's image processor beside it: processor.save_pretrained(FOLDER)."
            )
        size = config["size"] if config.get("do_resize", True) else None
        shortest, exact = _parse_size(size, square, path)
        crop = (
            _parse_size(config["crop_size"], True, path)[1] if config.get("do_center_crop", False) else None
        )
        resample = config.get("resample", 3)
        if resample not in _FILTERS:
            raise CheckpointError(f"{path}: resample {resample!r} is not supported; known are {_FILTERS}.")
        normalize = config.get("do_normalize", True)
        return cls(
            shortest=shortest,
            size=exact,
            crop=crop,
            mean=_three(config, "image_mean", path) if normalize else (0.0, 0.0, 0.0),
            std=_three(config, "image_std", path) if normalize else (1.0, 1.0, 1.0),
            mode=_FILTERS[resample],
        )

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        require_images(images_BCHW)
        return self.normalize(self._fit(to_grey_levels(images_BCHW.float()), resize_8_bit))

    def differentiable(self, images_BCHW: Tensor) -> Tensor:
        require_images(images_BCHW)
        return self.normalize(self._fit(images_BCHW.float().clamp(0, 1), resize_smoothly))

    def _fit(self, images_BCHW: Tensor, resize: Resize) -> Tensor:
        """Return pictures resized and cropped, not yet normalized."""
        height, width = images_BCHW.shape[-2:]
        rows, columns = self.size or (height, width)
        if self.size is None and self.shortest is not None:
            short = min(height, width)
            rows, columns = int(self.shortest * height / short), int(self.shortest * width / short)
        # The order of PIL up to 12, which published scores were made with: columns first, and 8 bits after each pass.
        # Pillow 13 takes rows first where they shrink much more than columns, which no kept ratio does.
        if columns != width:
            images_BCHW = resize(images_BCHW, (height, columns), self.mode)
        if rows != height:
            images_BCHW = resize(images_BCHW, (rows, columns), self.mode)
        if self.crop is None:
            return images_BCHW
        if rows < self.crop[0] or columns < self.crop[1]:
            raise ShapeError(
                f"A picture of {rows}x{columns} is smaller than the centre crop {self.crop[0]}x{self.crop[1]}."
            )
        top, left = (rows - self.crop[0]) // 2, (columns - self.crop[1]) // 2
        return images_BCHW[..., top : top + self.crop[0], left : left + self.crop[1]]

    def describe(self) -> str:
        steps = ["8-bit"]
        if self.shortest is not None:
            steps.append(f"shortest edge {self.shortest} {self.mode} antialias")
        if self.size is not None:
            steps.append(f"size {self.size[0]}x{self.size[1]} {self.mode} antialias")
        if self.crop is not None:
            steps.append(f"centre crop {self.crop[0]}x{self.crop[1]}")
        steps.append(f"mean {_short(self.mean)} std {_short(self.std)}")
        return "; ".join(steps)


@dataclass(frozen=True)
class PadToSquare(InputPreprocessing):
    """HPSv2's preprocessing: scale the longer side of a float tensor to `side`, and pad to a square with black.

    Bicubic overshoot is kept, since nothing clamps a float tensor.
    """

    side: int
    """The rows and columns of the model's input."""
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    antialias: bool = True
    """Whether resizing antialiases; torchvision up to 0.16, behind old HPSv2 figures, did not for float tensors."""

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        require_images(images_BCHW)
        return self.normalize(self._place(to_grey_levels(images_BCHW.float())))

    def differentiable(self, images_BCHW: Tensor) -> Tensor:
        require_images(images_BCHW)
        return self.normalize(self._place(images_BCHW.float().clamp(0, 1)))

    def describe(self) -> str:
        filter_name = "bicubic antialias" if self.antialias else "bicubic without antialias"
        stats = f"mean {_short(self.mean)} std {_short(self.std)}"
        return f"8-bit; longest edge {self.side} {filter_name} in float; black to a square; {stats}"

    def _place(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[-2:]
        scale = self.side / max(height, width)
        rows, columns = (max(1, round(edge * scale)) for edge in (height, width))
        if (rows, columns) != (height, width):
            images_BCHW = F.interpolate(
                images_BCHW, (rows, columns), mode="bicubic", antialias=self.antialias
            )
        below, right = self.side - rows, self.side - columns
        return F.pad(images_BCHW, (right // 2, right - right // 2, below // 2, below - below // 2))


def _parse_size(size: object, square: bool, path: Path) -> tuple[int | None, tuple[int, int] | None]:
    """Return (shortest edge, exact size), at most one of which is not None."""
    match size:
        case None:
            return None, None
        case int(edge):
            return (None, (edge, edge)) if square else (edge, None)
        case {"shortest_edge": int(edge)}:
            return edge, None
        case {"height": int(rows), "width": int(columns)}:
            return None, (rows, columns)
        case _:
            raise CheckpointError(f"{path}: the preprocessor's size {size!r} is not understood.")


def _three(config: Mapping[str, object], key: str, path: Path) -> tuple[float, ...]:
    values = config.get(key)
    if not isinstance(values, Sequence) or len(values) != 3:
        raise CheckpointError(f"{path}: the preprocessor's {key} must be three numbers, found {values!r}.")
    return tuple(float(value) for value in values)


def resize_8_bit(images_BCHW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize pictures and round them to 8 bits, a half upwards as PIL does."""
    levels = F.interpolate((images_BCHW * 255).round(), size, mode=mode, antialias=True)
    return (levels + 0.5).floor().clamp(0, 255) / 255


def resize_smoothly(images_BCHW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize and clamp as 8 bits would be; half a level of slack lets the gradient of full white and black pass."""
    resized = F.interpolate(images_BCHW, size, mode=mode, antialias=True)
    return resized.clamp(-_HALF_LEVEL, 1 + _HALF_LEVEL)


def _short(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


ScorePairs = Callable[[Tensor, Sequence[str]], Tensor]
"""A function from pictures [B, 3, H, W] and B texts to scores [B]."""


def score_pairs(
    batch: RewardBatch,
    score: ScorePairs,
    *,
    at_once: int,
    provenance: Mapping[str, str],
    reasons: Sequence[str | None] | None = None,
) -> Scores:
    """Score (picture, prompt) pairs; a pair with a reason, or with a picture that is not finite, fails unseen.

    Args:
        batch: the pictures and prompts.
        score: the function that scores at most `at_once` pairs.
        at_once: the number of pairs in one call.
        provenance: the provenance of the scores.
        reasons: for each pair, why it cannot be scored, known beforehand; None where it can.

    Raises:
        ShapeError: the pictures are not float [B, 3, H, W].
    """
    require_images(batch.images_BCHW)
    finite = batch.images_BCHW.isfinite().flatten(1).all(dim=1).tolist()
    known = [None] * len(finite) if reasons is None else reasons
    given = [
        reason or (None if ok else "the picture is not finite")
        for reason, ok in zip(known, finite, strict=True)
    ]
    values_B = torch.full((len(given),), torch.nan)
    shown = [row for row, reason in enumerate(given) if reason is None]
    for start in range(0, len(shown), at_once):
        rows = shown[start : start + at_once]
        values_B[rows] = score(batch.images_BCHW[rows], [batch.prompts[row] for row in rows]).float().cpu()
    return Scores.checked(values_B, given, provenance)


def load_tokenizer(folder: Path, kind: str = "AutoTokenizer") -> Any:
    """Load a transformers tokenizer from a local folder; `kind` is its class, for folders with a vocabulary alone.

    Raises:
        CheckpointError: the folder has none that can be read.
        RunError: it is a SentencePiece file, and that library is missing; says which extra to install.
    """
    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        require("sentencepiece", "rewards", f"The tokenizer spiece.model in {folder}")
    with quiet_loading():
        import transformers

        try:
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
            raise CheckpointError(f"{folder}: its tokenizer could not be loaded: {error}") from error
