"""Fusions by hand: concepts, their weights, and the picture that follows them. torch is loaded with the first picture.

A mixture is what `pixrl fuse` draws where every column of a concept has the same coefficient, its weight.
"""

import base64
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from pixrl import config as recipes
from pixrl.errors import InputError

if TYPE_CHECKING:
    from pixrl.fusion.config import FuseConfig

MOST = 4
"""Concepts of a pad, at most."""
CORNERS = {
    2: ((0.0, 0.5), (1.0, 0.5)),
    3: ((0.5, 0.0), (0.0, 1.0), (1.0, 1.0)),
    4: ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)),
}
"""Where the concepts stand on the pad, from the left and from the top: on a line, a triangle or a square."""
FRAMES = 12
"""Pictures of a morph."""
FRAME_MS = 110
MORE = 8
"""Pictures of `more like this`."""


@dataclass(frozen=True)
class Blend:
    """One mixture: its concepts, their weights, and the seed of its noise."""

    concepts: tuple[str, ...]
    weights: tuple[float, ...]
    """They sum to 1."""
    seed: int
    parent: int | None = None
    """The number of the favourite whose coefficients it has."""

    @property
    def name(self) -> str:
        """A name for files."""
        return "-".join("_".join(concept.split()) for concept in self.concepts) + f"-{self.seed}"


def weights_at(count: int, x: float, y: float) -> tuple[float, ...]:
    """Return the weights of 2 to 4 concepts at a point of their pad, which sum to 1; outside, those of its edge.

    Two divide the line, three have barycentric coordinates of the triangle, four bilinear ones of the square.
    """
    x, y = (min(max(at, 0.0), 1.0) for at in (x, y))
    if count == 2:
        return (1 - x, x)
    if count == 4:
        return ((1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y)
    top = 1 - y
    right = x - top / 2
    inside = [max(weight, 0.0) for weight in (top, 1 - top - right, right)]
    return tuple(weight / sum(inside) for weight in inside)


def point_of(weights: Sequence[float]) -> tuple[float, float]:
    """Return where the point of the pad stands for weights that `weights_at` returned."""
    corners = CORNERS[len(weights)]
    x, y = (sum(w * corner[axis] for w, corner in zip(weights, corners, strict=True)) for axis in (0, 1))
    return x, y


def check(concepts: Sequence[str], model: str) -> "FuseConfig":
    """Return the recipe of a mixture.

    Raises:
        InputError: there are fewer than two concepts or more than four, or one is empty or given twice.
    """
    from pixrl.fusion.config import FuseConfig

    if len(concepts) > MOST:
        raise InputError(
            f"The pad has room for {MOST} concepts, and {len(concepts)} were chosen: take some out."
        )
    return recipes.load(FuseConfig, None, values={"concepts": tuple(concepts), "model": model}, kind="fuse")


class Mixer:
    """Draws mixtures with one model, one at a time."""

    def __init__(self, model: str, device: str = "auto") -> None:
        self.model, self.device = model, device
        self._lock = threading.Lock()

    def draw(self, children: Sequence[Blend], size: int | None = None) -> list[Image.Image]:
        """Draw mixtures of the same concepts.

        Args:
            children: what is drawn.
            size: the side in pixels; None: the model's.

        Raises:
            InputError: a concept is unknown to the model, or the concepts or the size do not fit it.
        """
        import torch

        from pixrl.fusion.world import mixing_of, render

        config = check(children[0].concepts, self.model)
        with self._lock, torch.inference_mode():
            renderer, card = _load(self.model, self.device, size)
            mixing = mixing_of(renderer, card, config)
            columns = mixing.features_ND.shape[1]
            pictures = []
            for child in children:  # alone, so that a picture depends on nothing beside it
                weights = torch.tensor(
                    child.weights, dtype=mixing.features_ND.dtype, device=mixing.features_ND.device
                )
                coefficients_1ND = weights[None, :, None].expand(1, len(child.weights), columns)
                image_CHW = render(renderer, mixing, coefficients_1ND, [child.seed])[0]
                pixels = image_CHW.float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu()
                pictures.append(Image.fromarray(pixels.numpy()))
        return pictures

    def side(self) -> int:
        """Return the side of the model's pictures in pixels."""
        return int(_load(self.model, self.device, None)[0].settings.resolution)


@lru_cache(maxsize=2)
def _load(model: str, device: str, size: int | None) -> tuple[Any, Any]:
    from pixrl import models
    from pixrl.hub import read_card
    from pixrl.hub_check import Layout

    return models.load(model, device=device, resolution=size), read_card(model, Layout.PIPELINE)


def morph(child: Blend) -> list[Blend]:
    """Return the mixtures from one concept to the next and back to the first, all from the child's noise."""
    count = len(child.concepts)
    stops = [*range(count), 0]
    legs = len(stops) - 1
    found = []
    for frame in range(FRAMES):
        leg, share = divmod(frame * legs / FRAMES, 1)
        weights = [0.0] * count
        weights[stops[int(leg)]] += 1 - share
        weights[stops[int(leg) + 1]] += share
        found.append(Blend(child.concepts, tuple(weights), child.seed))
    return found


def gif(pictures: Sequence[Image.Image]) -> bytes:
    """Return an animation that repeats."""
    buffer = io.BytesIO()
    first, *rest = pictures
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=FRAME_MS, loop=0)
    return buffer.getvalue()


def png(picture: Image.Image, child: Blend) -> bytes:
    """Return a picture as PNG, which says how it was made."""
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    parts = [f"{concept} {weight:.4f}" for concept, weight in zip(child.concepts, child.weights, strict=True)]
    about.add_text("pixrl", f"{', '.join(parts)}, seed {child.seed}")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def uri(content: bytes, kind: str) -> str:
    """Return a file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
