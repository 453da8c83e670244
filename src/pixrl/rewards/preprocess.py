"""Pictures to a model's input, as tensors: the published PIL preprocessing within one grey level, batched.

The numbers come from the checkpoint's own preprocessor_config.json (or processor_config.json). Pictures are rounded to
8 bits where PIL rounds them, so that a score taken in memory equals the score of the saved PNG.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from pixrl.errors import CheckpointError, ShapeError
from pixrl.hub import read_json

_FILTERS = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters that published checkpoints use."""


def to_grey_levels(images_BCHW: Tensor) -> Tensor:
    """Rounded to the 256 levels of a PNG, still in [0, 1]."""
    return (images_BCHW.clamp(0, 1) * 255).round() / 255


def batches(images_BCHW: Tensor, size: int) -> Iterator[Tensor]:
    """The pictures, at most `size` at a time."""
    return (images_BCHW[start : start + size] for start in range(0, len(images_BCHW), size))


def require_images(images_BCHW: Tensor) -> None:
    """[B, 3, H, W] of a floating type, at least one picture."""
    shape = list(images_BCHW.shape)
    if images_BCHW.ndim != 4 or shape[1] != 3 or 0 in shape or not images_BCHW.is_floating_point():
        raise ShapeError(f"Pictures must be float [B, 3, H, W] in [0, 1], got {images_BCHW.dtype} {shape}.")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, normalize."""

    shortest: int | None
    """Side length that the shorter side is scaled to, the ratio kept."""
    size: tuple[int, int] | None
    """Rows and columns that a picture is scaled to, the ratio not kept."""
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str

    @classmethod
    def from_folder(cls, path: Path, *, square: bool) -> "Preprocessing":
        """What the checkpoint's folder says. `square`: a bare integer size means both sides, not the shorter one."""
        config = _read_config(path)
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
        """Pictures in [0, 1] of one size to the model's input."""
        require_images(images_BCHW)
        return self.normalize(self.fit(to_grey_levels(images_BCHW.float())))

    def fit(self, images_BCHW: Tensor) -> Tensor:
        """Resized and cropped, not yet normalized."""
        height, width = images_BCHW.shape[-2:]
        rows, columns = self._target(height, width)
        # PIL's order: columns first, and 8 bits after each pass
        if columns != width:
            images_BCHW = _resize_8_bit(images_BCHW, (height, columns), self.mode)
        if rows != height:
            images_BCHW = _resize_8_bit(images_BCHW, (rows, columns), self.mode)
        return images_BCHW if self.crop is None else _centre_crop(images_BCHW, self.crop)

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        mean, std = (images_BCHW.new_tensor(x).view(1, 3, 1, 1) for x in (self.mean, self.std))
        return (images_BCHW - mean) / std

    def describe(self) -> str:
        """One line for provenance."""
        steps = ["8-bit"]
        if self.shortest is not None:
            steps.append(f"shortest edge {self.shortest} {self.mode} antialias")
        if self.size is not None:
            steps.append(f"size {self.size[0]}x{self.size[1]} {self.mode} antialias")
        if self.crop is not None:
            steps.append(f"centre crop {self.crop[0]}x{self.crop[1]}")
        steps.append(f"mean {_short(self.mean)} std {_short(self.std)}")
        return "; ".join(steps)

    def _target(self, rows: int, columns: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        if self.shortest is None:
            return rows, columns
        if rows <= columns:
            return self.shortest, int(self.shortest * columns / rows)
        return int(self.shortest * rows / columns), self.shortest


def _read_config(path: Path) -> Mapping[str, object]:
    if (path / "preprocessor_config.json").is_file():
        return read_json(path / "preprocessor_config.json")
    if (path / "processor_config.json").is_file():
        nested = read_json(path / "processor_config.json").get("image_processor")
        if isinstance(nested, Mapping):
            return nested
    raise CheckpointError(
        f"{path} has no preprocessor_config.json, so how its pictures are to be resized and normalized is unknown. "
        "Save the model's image processor beside it: processor.save_pretrained(FOLDER)."
    )


def _parse_size(size: object, square: bool, path: Path) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest edge, exact size), at most one of them."""
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


def _resize_8_bit(images_BCHW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resized on the scale 0 to 255 and rounded there, a half upwards as PIL does."""
    levels = F.interpolate((images_BCHW * 255).round(), size, mode=mode, antialias=True)
    return (levels + 0.5).floor().clamp(0, 255) / 255


def _centre_crop(images_BCHW: Tensor, crop: tuple[int, int]) -> Tensor:
    rows, columns = images_BCHW.shape[-2:]
    if rows < crop[0] or columns < crop[1]:
        raise ShapeError(
            f"A picture of {rows}x{columns} is smaller than the centre crop {crop[0]}x{crop[1]}."
        )
    top, left = (rows - crop[0]) // 2, (columns - crop[1]) // 2
    return images_BCHW[..., top : top + crop[0], left : left + crop[1]]


def _short(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
