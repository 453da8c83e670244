"""The six backgrounds, each in three variants: quiet and pale (night excepted), drawn once per size."""

from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageDraw

from pixrl.toy.drawing.pen import WHITE, mix
from pixrl.toy.vocabulary import RGB

VARIANTS = 3
PLAIN: tuple[RGB, ...] = ((246, 243, 238), (234, 240, 246), (246, 236, 226))
SCATTER = tuple(((37 * k % 101) / 101, (61 * k % 103) / 103) for k in range(1, 40))


class BackdropCanvas:
    """A background being drawn, in units of its side."""

    def __init__(self, size: int, colour: RGB) -> None:
        self.size = size
        self.image = Image.new("RGB", (size, size), colour)
        self._draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
        n = self.size
        self._draw.rectangle((left * n, top * n, right * n, bottom * n), colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        n = self.size
        self._draw.ellipse(((x - rx) * n, (y - ry) * n, (x + rx) * n, (y + ry) * n), colour)


def plain(size: int, variant: int) -> BackdropCanvas:
    return BackdropCanvas(size, PLAIN[variant])


def grass(size: int, variant: int) -> BackdropCanvas:
    horizon = 0.5 + 0.06 * variant
    canvas = BackdropCanvas(size, (210, 234, 248))
    canvas.oval(0.2 + 0.55 * (variant % 2), horizon + 0.12, 0.6, 0.24, (190, 226, 164))
    ground = (168, 212, 134)
    canvas.box(0, horizon, 1, 1, ground)
    for x, y in SCATTER[:14]:
        top = horizon + 0.05 + y * (0.9 - horizon)
        for shift in (-0.014, 0.0, 0.014):
            canvas.box(x + shift, top - 0.012 * (shift == 0), x + shift + 0.006, top + 0.035, (122, 180, 96))
    for x, y in SCATTER[20:26]:
        canvas.oval(x, horizon + 0.06 + y * (0.88 - horizon), 0.013, 0.013, (252, 236, 150))
    return canvas


def beach(size: int, variant: int) -> BackdropCanvas:
    horizon = 0.36 + 0.05 * variant
    canvas = BackdropCanvas(size, (216, 240, 250))
    canvas.oval(0.16 + 0.66 * (variant % 2), 0.14, 0.085, 0.085, (255, 232, 150))
    canvas.box(0, horizon, 1, 1, (130, 204, 224))
    canvas.box(0, horizon + 0.22, 1, 1, (242, 224, 176))
    for shift, colour in ((0.0, (238, 248, 250)), (0.028, (242, 224, 176))):
        for k in range(6):
            canvas.oval((k + 0.5) / 5.5, horizon + 0.22 + shift, 0.12, 0.026, colour)
    for x, y in SCATTER[:10]:
        canvas.oval(x, horizon + 0.32 + y * (0.62 - horizon), 0.012, 0.008, (220, 196, 144))
    return canvas


def snow(size: int, variant: int) -> BackdropCanvas:
    horizon = 0.52 + 0.05 * variant
    canvas = BackdropCanvas(size, (190, 210, 230))
    canvas.oval(0.8 - 0.5 * (variant % 2), horizon + 0.1, 0.55, 0.22, (228, 236, 246))
    canvas.box(0, horizon + 0.04, 1, 1, (248, 250, 253))
    for x, y in SCATTER[:28]:
        canvas.oval(x, y * horizon, 0.014, 0.014, WHITE)
    return canvas


def night(size: int, variant: int) -> BackdropCanvas:
    sky = (68, 80, 138)
    canvas = BackdropCanvas(size, sky)
    x = 0.16 + 0.66 * (variant % 2)
    canvas.oval(x, 0.15, 0.1, 0.1, (250, 240, 196))
    canvas.oval(x + 0.05, 0.12, 0.085, 0.085, sky)
    for sx, sy in SCATTER[:18]:
        canvas.oval(sx, sy * 0.66, 0.009, 0.009, (238, 234, 210))
    canvas.oval(0.7 - 0.4 * (variant % 2), 0.98 - 0.03 * variant, 0.9, 0.22, (54, 64, 104))
    return canvas


def city(size: int, variant: int) -> BackdropCanvas:
    canvas = BackdropCanvas(size, (232, 226, 230))
    heights = (0.3, 0.46, 0.22, 0.4, 0.28, 0.5, 0.34)
    for k in range(7):
        left, top = k / 7, 0.76 - heights[(k + 2 * variant) % 7]
        wall = mix((194, 192, 206), (180, 190, 202), k % 2)
        canvas.box(left, top, left + 1 / 7, 0.8, wall)
        for row in range(6):
            for column in (0.03, 0.085):
                y = top + 0.04 + row * 0.08
                canvas.box(left + column, y, left + column + 0.03, y + 0.035, mix(wall, (255, 240, 190), 0.6))
    canvas.box(0, 0.78, 1, 1, (172, 172, 180))
    for k in range(4):
        canvas.box(0.04 + 0.26 * k, 0.885, 0.16 + 0.26 * k, 0.91, (240, 236, 222))
    return canvas


BACKDROPS: dict[str, Callable[[int, int], BackdropCanvas]] = {
    "plain": plain, "grass": grass, "beach": beach, "snow": snow, "night": night, "city": city,
}  # fmt: skip


@lru_cache(maxsize=64)
def backdrop(name: str, size: int, variant: int) -> Image.Image:
    """The background at that size; shared, so copy it before drawing on it."""
    return BACKDROPS[name](size, variant % VARIANTS).image
