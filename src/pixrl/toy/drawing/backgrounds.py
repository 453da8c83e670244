"""This module draws the six backgrounds in four variants each; all are quiet and, the night excepted, pale."""

from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageDraw

from pixrl.toy.drawing.pen import WHITE, mix
from pixrl.toy.vocabulary import RGB

VARIANTS = 4
PLAIN: tuple[RGB, ...] = ((246, 244, 240), (232, 238, 244), (242, 234, 222), (228, 226, 232))
SCATTER = tuple(((37 * k % 101) / 101, (61 * k % 103) / 103) for k in range(1, 40))


class Canvas:
    """A canvas holds a background while it is drawn; all positions and sizes are fractions of its side, y downwards."""

    def __init__(self, size: int, colour: RGB) -> None:
        self.size = size
        self.image = Image.new("RGBA", (size, size), (*colour, 0))
        self._draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
        """Draw a filled upright rectangle."""
        n = self.size
        self._draw.rectangle((left * n, top * n, right * n, bottom * n), (*colour, 0))

    def oval(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        """Draw a filled ellipse of radii `rx` and `ry` around (x, y)."""
        n = self.size
        self._draw.ellipse(((x - rx) * n, (y - ry) * n, (x + rx) * n, (y + ry) * n), (*colour, 0))


def plain(size: int, variant: int) -> Canvas:
    """Draw a background of one pale colour, another one in each variant, on a canvas of `size` pixels a side."""
    return Canvas(size, PLAIN[variant])


def grass(size: int, variant: int) -> Canvas:
    """Draw a meadow with blades of grass under a pale sky, on a canvas of `size` pixels a side."""
    horizon = 0.5 + 0.05 * variant
    canvas = Canvas(size, (206, 232, 246))
    canvas.oval(0.2 + 0.5 * (variant % 2), horizon + 0.12, 0.6, 0.22, (186, 222, 160))
    ground = (168, 212, 132)
    canvas.box(0, horizon, 1, 1, ground)
    for x, y in SCATTER[:22]:
        top = horizon + 0.04 + y * (0.94 - horizon)
        canvas.box(x, top, x + 0.012, top + 0.045, mix(ground, (70, 140, 60), 0.35))
    return canvas


def beach(size: int, variant: int) -> Canvas:
    """Draw a beach with the sea and a low sun behind it, on a canvas of `size` pixels a side."""
    horizon = 0.34 + 0.04 * variant
    canvas = Canvas(size, (214, 238, 250))
    canvas.oval(0.16 + 0.66 * (variant % 2), 0.14, 0.09, 0.09, (255, 238, 170))
    canvas.box(0, horizon, 1, 1, (126, 200, 222))
    canvas.box(0, horizon + 0.22, 1, 1, (240, 222, 174))
    for k in range(6):
        canvas.oval((k + 0.5) / 5.5, horizon + 0.22, 0.12, 0.025, (236, 248, 250))
    for k in range(6):
        canvas.oval((k + 0.5) / 5.5, horizon + 0.25, 0.12, 0.025, (240, 222, 174))
    for x, y in SCATTER[:12]:
        canvas.oval(x, horizon + 0.32 + y * (0.64 - horizon), 0.01, 0.008, (216, 192, 140))
    return canvas


def snow(size: int, variant: int) -> Canvas:
    """Draw snowy hills with falling flakes, on a canvas of `size` pixels a side."""
    horizon = 0.5 + 0.05 * variant
    canvas = Canvas(size, (186, 204, 224))
    canvas.oval(0.8 - 0.5 * (variant % 2), horizon + 0.1, 0.55, 0.22, (226, 234, 244))
    canvas.box(0, horizon + 0.04, 1, 1, (248, 250, 253))
    for x, y in SCATTER:
        canvas.oval(x, y * horizon, 0.014, 0.014, WHITE)
    return canvas


def night(size: int, variant: int) -> Canvas:
    """Draw a starry sky with a crescent moon above a dark hill, on a canvas of `size` pixels a side."""
    canvas = Canvas(size, (66, 76, 132))
    x = 0.16 + 0.66 * (variant % 2)
    canvas.oval(x, 0.15, 0.1, 0.1, (250, 240, 196))
    canvas.oval(x + 0.05, 0.12, 0.085, 0.085, (66, 76, 132))
    for sx, sy in SCATTER[:18]:
        canvas.oval(sx, sy * 0.66, 0.009, 0.009, (236, 232, 208))
    canvas.oval(0.7 - 0.4 * (variant % 2), 0.98 - 0.03 * variant, 0.9, 0.22, (54, 62, 100))
    return canvas


def city(size: int, variant: int) -> Canvas:
    """Draw a row of houses with lit windows behind a street, on a canvas of `size` pixels a side."""
    canvas = Canvas(size, (232, 222, 224))
    heights = (0.3, 0.46, 0.22, 0.4, 0.28, 0.5, 0.34)
    for k in range(7):
        left, top = k / 7, 0.76 - heights[(k + 2 * variant) % 7] - 0.02 * variant
        wall = mix((190, 186, 200), (176, 186, 196), k % 2)
        canvas.box(left, top, left + 1 / 7, 0.8, wall)
        for row in range(6):
            for column in (0.03, 0.085):
                y = top + 0.04 + row * 0.08
                canvas.box(left + column, y, left + column + 0.03, y + 0.035, mix(wall, (255, 240, 190), 0.6))
    canvas.box(0, 0.78, 1, 1, (170, 168, 174))
    for k in range(4):
        canvas.box(0.04 + 0.26 * k, 0.885, 0.16 + 0.26 * k, 0.91, (240, 236, 220))
    return canvas


BACKDROPS: dict[str, Callable[[int, int], Canvas]] = {
    "plain": plain, "grass": grass, "beach": beach, "snow": snow, "night": night, "city": city,
}  # fmt: skip


@lru_cache(maxsize=96)
def backdrop(name: str, size: int, variant: int) -> Image.Image:
    """Return a background of `size` pixels a side as an RGBA picture whose alpha is 0 everywhere.

    The picture is drawn once for each name, size and variant and shared by all callers: copy it before drawing on it.

    Raises:
        KeyError: `name` is none of the six backgrounds.
    """
    return BACKDROPS[name](size, variant % VARIANTS).image
