"""Reward functions for tests, by import path."""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

Images = Sequence[Image.Image]


def brightness(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


def some_fail(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float | None]:
    values = brightness(images, prompts, metadata)
    return [None if place % 3 == 0 else value for place, value in enumerate(values)]


def fails_on_the_first_process(
    images: Images, prompts: list[str], metadata: list[dict[str, Any]]
) -> list[float | None]:
    first = os.environ.get("RANK") == "0"
    return [None if first else value for value in brightness(images, prompts, metadata)]


def all_equal(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [0.5] * len(images)


def raises(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    raise KeyError("tag")


def wrong_length(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [0.5]


def not_a_number(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float("nan")] * len(images)


def infinite(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float("inf")] * len(images)


def hangs(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    time.sleep(5)
    return [0.5] * len(images)


def redness(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    arrays = [np.asarray(image).astype(float) for image in images]
    return [float(one[..., 0].mean() - one[..., 2].mean()) / 255 for one in arrays]


def tagged(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float | None]:
    """Redness of pictures whose prompt has a tag; the others have no score."""
    scores = redness(images, prompts, metadata)
    return [score if "tag" in one else None for score, one in zip(scores, metadata, strict=True)]
