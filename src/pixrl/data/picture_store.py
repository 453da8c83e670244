"""The pictures that prompts come with, read when they are asked for; the last ones are kept."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pixrl.data.pictures import as_floats, read_picture, to_levels

if TYPE_CHECKING:
    from torch import Tensor

LEVEL_BYTES = 2**29
"""The bytes of 8-bit pictures that are kept, 170 of the largest ones: DreamBench has 158."""
CACHE_BYTES = 2**28
"""The bytes of the same pictures that are kept as float32."""
LARGEST = 1024
"""The pixels of a reference's longer side, to which larger ones are reduced: no reward or model looks at more."""

_Key = tuple[object, ...]


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
