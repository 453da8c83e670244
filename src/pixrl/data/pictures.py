"""Pictures of people's own, read as they look: turned as the camera says, transparency on white, in RGB.

Nothing here is guessed in silence: a file that cannot be shown faithfully is an InputError that says what to do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from pixrl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".svg", ".psd", ".dng", ".raw", ".cr2", ".nef")
"""Pictures that are not read: passing over one would lose a reference in silence."""
LEAST_SIDE = 32
"""Pixels of the shorter side below which a picture shows no subject."""
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
WHITE = (255, 255, 255)


def read_picture(path: Path) -> Image.Image:
    """One picture as RGB: its EXIF rotation applied, transparent parts on white.

    Raises:
        InputError: the file is missing, no picture, cut short, too large to open safely, of more than 8 bits a
            channel, or its shorter side is under 32 pixels.
    """
    try:
        with Image.open(path) as file:
            if file.mode in DEEP_MODES:
                raise InputError(
                    f"{path} has more than 8 bits a channel (mode {file.mode}). Save it as an 8-bit PNG."
                )
            turned = ImageOps.exif_transpose(file)
            turned.load()
    except FileNotFoundError:
        raise InputError(f"There is no picture {str(path)!r} (looked in {Path.cwd()}).") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read as a picture: {error}. Open it in a viewer, or save it again as PNG."
        ) from None
    if min(turned.size) < LEAST_SIDE:
        raise InputError(
            f"{path} is {turned.width}x{turned.height}; the shorter side must be at least {LEAST_SIDE} pixels. "
            "Give a larger picture of the subject."
        )
    return _on_white(turned)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def list_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted by name; hidden files are passed over.

    Raises:
        InputError: one is of a kind that is not read.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    for file in files:
        if file.suffix.lower() in FOREIGN_SUFFIXES:
            raise InputError(
                f"{file} is not read ({file.suffix}). Save it as PNG or JPEG beside it and delete it. "
                f"Pictures end in {', '.join(SUFFIXES)}."
            )
    return [file for file in files if file.suffix.lower() in SUFFIXES]


def read_pictures(folder: Path) -> list[Image.Image]:
    """A folder of reference pictures, sorted by name; each as `read_picture` gives it.

    Raises:
        InputError: there is no such folder, it holds no picture, or one that cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r} (looked in {Path.cwd()}).")
    files = list_pictures(folder)
    if not files:
        raise InputError(f"{folder} holds no pictures. They end in {', '.join(SUFFIXES)}.")
    return [read_picture(file) for file in files]


def to_tensors(images: Sequence[Image.Image]) -> list["Tensor"]:
    """Each picture as float32 [3, H, W] in [0, 1], in its own size: what a reward's metadata["reference"] takes."""
    import numpy as np
    import torch

    return [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255 for image in images]
