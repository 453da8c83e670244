"""Pictures of people's own, read as they look: turned as the camera says, their colours in sRGB, transparency on white.

Nothing here is guessed in silence: a file that cannot be shown faithfully is an InputError that says what to do.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageCms, ImageFile, ImageOps

from pixrl.errors import InputError
from pixrl.text import shown_name

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF")
"""The formats that are read, whatever a name ends in; MPO is a phone's JPEG with a depth map or preview behind it."""
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".svg", ".psd", ".dng", ".raw", ".cr2", ".nef", ".arw")
"""The endings of pictures that are not read."""
MASK_ENDING = ".mask.png"
"""Follows a picture's name, without its ending, in that of its mask."""
HALF = 128
"""The level of a mask from which on a pixel is the subject's."""
NOTE_SUFFIXES = (".txt", ".md", ".json", ".caption")
NOTE_NAMES = ("license", "licence", "readme")
"""The names, in any case, of files without a picture that may lie beside pictures."""
JUNK_NAMES = (
    ".ds_store", "__macosx", ".appledouble", ".spotlight-v100", ".trashes", ".fseventsd", "icon\r",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "@eadir", "#recycle", "lost+found", ".ipynb_checkpoints",
)  # fmt: skip
"""The names, in any case, of what systems leave in folders."""
JUNK_PREFIX = "._"
"""The prefix of the files in which a Mac keeps what other file systems cannot keep."""
LEAST_SIDE = 32
"""The pixels of the shorter side below which a picture shows no subject."""
MOST_ASPECT = 8
"""The largest ratio of the sides; a longer strip would be a few rows once it is laid out on the model's square."""
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
DEEP_MARK = ";16"
"""The mark of 16 bits a channel in PIL's name of a pixel layout, which it would cut to 8 in silence."""
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""The PIL mode of each colour space that a profile may be for."""
WHITE = (255, 255, 255)
LEVEL_BYTES = 2**29
"""The bytes of 8-bit pictures that are kept, 170 of the largest ones: DreamBench has 158."""
CACHE_BYTES = 2**28
"""The bytes of the same pictures that are kept as float32."""
LARGEST = 1024
"""The pixels of a reference's longer side, to which larger ones are reduced: no reward or model looks at more."""

_Key = tuple[object, ...]


def read_picture(path: Path) -> Image.Image:
    """Read one picture as sRGB: its EXIF rotation and its colour profile applied, transparent parts on white.

    Raises:
        InputError: the file is missing, no picture, cut short, too large to open safely, of another format, of several
            frames or pages, of more than 8 bits a channel, of a colour profile that cannot be applied, of a shorter
            side under 32 pixels, or a strip longer than 8:1.
    """
    try:
        with Image.open(path) as file:
            if file.format not in FORMATS:
                raise InputError(
                    f"{path} is a {file.format} file inside, which is not read. Save it as PNG or JPEG."
                )
            if file.mode in DEEP_MODES or is_deep(file):
                raise InputError(
                    f"{path} has more than 8 bits a channel (mode {file.mode}). Save it as an 8-bit PNG."
                )
            if file.format != "MPO" and getattr(file, "is_animated", False):
                raise InputError(
                    f"{path} holds several pictures (frames or pages of a {file.format}). Save the one that is meant "
                    "as PNG."
                )
            turned = ImageOps.exif_transpose(file)
            turned.load()
            shown = _in_srgb(path, turned)
            if shown.has_transparency_data:
                layer = shown.convert("RGBA")
                shown = Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), layer)
            shown = shown.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"There is no picture {str(path)!r} (looked in {Path.cwd()}).") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read as a picture: {error}. Open it in a viewer, or save it again as PNG."
        ) from None
    shorter, longer = sorted(shown.size)
    if shorter < LEAST_SIDE:
        raise InputError(
            f"{path} is {shown.width}x{shown.height}; the shorter side must be at least {LEAST_SIDE} pixels. "
            "Give a larger picture of the subject."
        )
    if longer > MOST_ASPECT * shorter:
        raise InputError(
            f"{path} is {shown.width}x{shown.height}; the longer side may be at most {MOST_ASPECT} times the shorter "
            "one, since the whole picture is laid out on a square. Crop it to the subject."
        )
    return shown


def is_deep(file: ImageFile.ImageFile) -> bool:
    """Return whether a picture that is opened but not loaded has 16 bits a channel in its file, whatever its mode."""
    return any(DEEP_MARK in str(part[3]) for part in file.tile)


def _in_srgb(path: Path, image: Image.Image) -> Image.Image:
    """Convert to sRGB by the picture's colour profile; one without is sRGB already, as browsers take it."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode == "P":  # its colours are RGB
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    mode = {"LA": "L", "1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    try:
        given = ImageCms.getOpenProfile(io.BytesIO(profile))
        space = given.profile.xcolor_space.strip()
        if mode == "L" and space == "RGB":  # grey is a colour
            mode = "RGB"
        if SPACES.get(space) != mode:
            raise ValueError(f"it is one for {space}, and the picture is {image.mode}")
        shown = ImageCms.profileToProfile(
            image.convert(mode),
            given,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} has a colour profile that cannot be applied: {error}. Save it as an sRGB PNG."
        ) from None
    assert shown is not None  # it is None for a change in place alone
    if alpha is not None:
        shown.putalpha(alpha)
    return shown


def mask_of(picture: Path) -> Path | None:
    """Return the mask of yours that lies beside a picture, `front.mask.png` for front.jpg; None where there is none."""
    file = picture.with_name(picture.stem + MASK_ENDING)
    return file if file.is_file() else None


def read_mask(file: Path, picture: Path) -> Image.Image:
    """Read a mask: white where the subject is, or transparent where it is not; gray levels count in part.

    Raises:
        InputError: it cannot be read, has another size than its picture, or shows no subject, or nothing else.
    """
    shown = read_picture(file).convert("L")
    with Image.open(file) as given:
        if given.has_transparency_data:
            shown = given.convert("RGBA").getchannel("A")
    size = read_picture(picture).size
    if shown.size != size:
        raise InputError(
            f"{file} is {shown.width}x{shown.height}, and its picture {picture.name} is {size[0]}x{size[1]} as it is "
            "shown. Save the mask in that size."
        )
    levels = shown.histogram()
    if not any(levels[HALF:]) or not any(levels[:HALF]):
        raise InputError(
            f"{file} is {'white' if any(levels[HALF:]) else 'black'} everywhere. A mask is white where the subject is, "
            "and black around it, or transparent around it."
        )
    return shown


def list_pictures(folder: Path) -> list[Path]:
    """Return the picture files of a folder, sorted by name.

    Hidden files, folders, notes (.txt ...), masks and what systems leave are passed over.

    Raises:
        InputError: a file is neither, a mask has no picture, or a link leads nowhere: passing over it could lose a
            reference in silence.
    """
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists() and not file.name.startswith("."):
            raise InputError(
                f"{file} is a link to {file.readlink()}, which is not there. Mend it or delete it."
            )
        is_note = file.suffix.lower() in NOTE_SUFFIXES or file.name.lower() in NOTE_NAMES
        if file.is_dir() or file.name.startswith(".") or is_junk(file) or is_note:
            continue
        if file.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"{file} is not read ({file.suffix or 'no ending'}). Save it as PNG or JPEG beside it and delete it; "
                f"if it is no picture, move it out of the folder. Pictures end in {', '.join(SUFFIXES)}."
            )
        found.append(file)
    pictures = [file for file in found if not file.name.lower().endswith(MASK_ENDING)]
    masks = {mask_of(file) for file in pictures}
    for file in found:
        if file not in pictures and file not in masks:
            raise InputError(
                f"{file} is a mask without a picture: it belongs to {file.name[: -len(MASK_ENDING)]}.jpg or .png, and "
                "there is none. Rename it after its picture, or move it out of the folder."
            )
    return pictures


def is_junk(file: Path) -> bool:
    """Return whether a file is what a system leaves in folders, such as Thumbs.db."""
    return file.name.lower() in JUNK_NAMES or file.name.startswith(JUNK_PREFIX)


def junk_note(folders: Iterable[Path]) -> Iterator[str]:
    """Yield a note for each folder in which systems left files, which are passed over."""
    for folder in folders:
        found = sorted(shown_name(file.name).strip() for file in folder.iterdir() if is_junk(file))
        if found:
            yield f"{shown_name(folder)}: passed over what systems leave there: {', '.join(found)}"


def holds_pictures(folder: Path) -> bool:
    """Return whether pictures of whatever kind lie in the folder itself."""
    return any(
        file.suffix.lower() in SUFFIXES + FOREIGN_SUFFIXES
        and file.is_file()
        and not file.name.startswith(".")
        for file in folder.iterdir()
    )


def read_pictures(folder: Path) -> list[Image.Image]:
    """Read a folder of reference pictures, sorted by name, each as `read_picture` does.

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
    """Return each picture as float32 [3, H, W] in [0, 1], in its own size, as metadata["reference"] holds them."""
    return [as_floats(to_levels(image)) for image in images]


def to_levels(image: Image.Image) -> "Tensor":
    """Return a picture as uint8 [3, H, W]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def as_floats(levels_CHW: "Tensor") -> "Tensor":
    """Return 8-bit levels as float32 in [0, 1]."""
    return levels_CHW / 255


class _Kept:
    """A cache of pictures as tensors up to so many bytes, which drops the least recently used."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tensors: OrderedDict[_Key, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: _Key, make: Callable[[], "Tensor"]) -> "Tensor":
        found = self._tensors.get(key)
        if found is None:
            found = make()
            self._bytes += found.nbytes
        self._tensors[key] = found
        self._tensors.move_to_end(key)
        while self._bytes > self._limit and len(self._tensors) > 1:
            self._bytes -= self._tensors.popitem(last=False)[1].nbytes
        return found


class PictureStore:
    """A cache of pictures in 8 bits, and of the last ones as float tensors: the same tensor costs a reward nothing."""

    def __init__(self, levels: int = LEVEL_BYTES, floats: int = CACHE_BYTES) -> None:
        self._levels = _Kept(levels)
        self._floats = _Kept(floats)

    def get(self, key: _Key, read: Callable[[], Image.Image]) -> "Tensor":
        """Return the picture of a key, float32 [3, H, W]."""
        return self._floats.get(key, lambda: as_floats(self._levels.get(key, lambda: to_levels(read()))))


def opened(picture: Path | Image.Image) -> Image.Image:
    """Return a picture, from its file if need be, reduced to `LARGEST`."""
    found = picture if isinstance(picture, Image.Image) else read_picture(picture)
    if max(found.size) <= LARGEST:
        return found
    smaller = found.copy()
    smaller.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return smaller
