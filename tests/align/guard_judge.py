"""Rewards for the guard's tests: two that are easily gamed, one that means nothing, one that is only looked at."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

Images = Sequence[Image.Image]


def _pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(image.convert("L"), dtype=np.float64) / 255


def brightness(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(_pixels(image).mean()) for image in images]


def edges(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(np.abs(np.diff(_pixels(image), axis=1)).mean()) for image in images]


def noise(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """As good as random, and the same for the same picture."""
    return [hashlib.blake2b(image.tobytes(), digest_size=1).digest()[0] / 255 for image in images]


def contrast(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(_pixels(image).std()) for image in images]
