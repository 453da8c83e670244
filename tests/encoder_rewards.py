"""How to make each reward with a picture encoder from tiny published layouts, for what is asked of all rewards."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests import tiny
from tests.tiny_encoders import dino_v1, hpsv2, laion_head


def _hpsv2(folder: Path) -> dict[str, object]:
    published, words = hpsv2(folder / "hpsv2")
    return {"model": published, "processor": words}


def _aesthetic(folder: Path) -> dict[str, object]:
    return {"model": tiny.clip(folder / "clip"), "head": laion_head(folder / "head.pth", 16)}


OPTIONS: Mapping[str, Callable[[Path], dict[str, object]]] = {
    "aesthetic": _aesthetic,
    "clip_i": lambda folder: {"model": tiny.clip(folder / "clip")},
    "clip_t": lambda folder: {"model": tiny.clip(folder / "clip")},
    "dino": lambda folder: {"model": dino_v1(folder / "dino")},
    "hpsv2": _hpsv2,
}
"""Name -> its options, in a folder that the checkpoint is written to."""
