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

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF")
"""What a file must be inside, whatever its name ends in. MPO: a phone's JPEG with a depth map or preview behind it."""
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".svg", ".psd", ".dng", ".raw", ".cr2", ".nef", ".arw")
"""Pictures that are not read."""
NOTE_SUFFIXES = (".txt", ".md", ".json")
NOTE_NAMES = ("license", "licence", "readme", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
"""Files without a picture that may lie beside pictures, and what systems leave there; in any case."""
LEAST_SIDE = 32
"""Pixels of the shorter side below which a picture shows no subject."""
MOST_ASPECT = 8
"""Longer to shorter side; a longer strip would be a few rows once it is laid out on the model's square."""
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
WHITE = (255, 255, 255)


def read_picture(path: Path) -> Image.Image:
    """One picture as RGB: its EXIF rotation applied, transparent parts on white.

    Raises:
        InputError: the file is missing, no picture, cut short, too large to open safely, of another format, of several
            frames or pages, of more than 8 bits a channel, of a shorter side under 32 pixels, or a strip longer than
            8:1.
    """
    try:
        with Image.open(path) as file:
            _require_plain(path, file)
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
    _require_sides(path, turned.width, turned.height)
    return _on_white(turned)


def _require_plain(path: Path, file: Image.Image) -> None:
    if file.format not in FORMATS:
        raise InputError(f"{path} is a {file.format} file inside, which is not read. Save it as PNG or JPEG.")
    if file.mode in DEEP_MODES:
        raise InputError(
            f"{path} has more than 8 bits a channel (mode {file.mode}). Save it as an 8-bit PNG."
        )
    if file.format != "MPO" and _has_second_frame(file):
        raise InputError(
            f"{path} holds several pictures (frames or pages of a {file.format}). Save the one that is meant as PNG."
        )


def _has_second_frame(file: Image.Image) -> bool:
    """Leaves the file at its first frame."""
    try:
        file.seek(1)
    except EOFError:
        return False
    file.seek(0)
    return True


def _require_sides(path: Path, width: int, height: int) -> None:
    shorter, longer = sorted((width, height))
    if shorter < LEAST_SIDE:
        raise InputError(
            f"{path} is {width}x{height}; the shorter side must be at least {LEAST_SIDE} pixels. "
            "Give a larger picture of the subject."
        )
    if longer > MOST_ASPECT * shorter:
        raise InputError(
            f"{path} is {width}x{height}; the longer side may be at most {MOST_ASPECT} times the shorter one, since "
            "the whole picture is laid out on a square. Crop it to the subject."
        )


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def list_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted by name; hidden files, folders and notes (.txt ...) are passed over.

    Raises:
        InputError: a file is neither, or a link leads nowhere: passing over it could lose a reference in silence.
    """
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists() and not file.name.startswith("."):
            raise InputError(
                f"{file} is a link to {file.readlink()}, which is not there. Mend it or delete it."
            )
        if file.is_dir() or file.name.startswith(".") or _is_note(file):
            continue
        if file.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"{file} is not read ({file.suffix or 'no ending'}). Save it as PNG or JPEG beside it and delete it; "
                f"if it is no picture, move it out of the folder. Pictures end in {', '.join(SUFFIXES)}."
            )
        found.append(file)
    return found


def _is_note(file: Path) -> bool:
    return file.suffix.lower() in NOTE_SUFFIXES or file.name.lower() in NOTE_NAMES


def holds_pictures(folder: Path) -> bool:
    """Whether pictures lie in the folder itself, of whatever kind."""
    return any(
        file.suffix.lower() in SUFFIXES + FOREIGN_SUFFIXES
        and file.is_file()
        and not file.name.startswith(".")
        for file in folder.iterdir()
    )


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
    return [as_floats(to_levels(image)) for image in images]


def to_levels(image: Image.Image) -> "Tensor":
    """A picture as uint8 [3, H, W]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def as_floats(levels_CHW: "Tensor") -> "Tensor":
    """Levels of 8 bits as float32 in [0, 1]."""
    return levels_CHW / 255
