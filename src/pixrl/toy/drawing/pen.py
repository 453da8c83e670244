"""The pen of this module draws outlined flat shapes in an object's own frame (x right, y down, both from -1 to 1).

Pictures are RGBA while they are drawn: the alpha channel is 255 where an object has put ink and 0 on the
background, so that reducing the picture also gives every object's coverage.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

from pixrl.toy.vocabulary import RGB, Palette

Point = tuple[float, float]
Outline = Callable[[ImageDraw.ImageDraw, float, float, int], None]

INK: RGB = (44, 36, 48)
WHITE: RGB = (255, 255, 255)
SHADE_STRENGTH = 48
CIRCLE = tuple((math.cos(k * math.pi / 16), math.sin(k * math.pi / 16)) for k in range(32))


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """Return the RGB colour that lies `share` of the way from `a` to `b`."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def brightness(colour: RGB) -> float:
    """Return the perceived lightness of an RGB colour, from 0 to 255."""
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


@dataclass(frozen=True, slots=True)
class Coat:
    """A coat is what an object is painted with: two colours and a pattern."""

    palette: Palette
    pattern: str = "plain"

    @property
    def pattern_colour(self) -> RGB:
        """Return the secondary colour where it shows on the primary one, else a darker or lighter primary."""
        primary, secondary = self.palette.primary, self.palette.secondary
        if math.dist(primary, secondary) > 120:
            return secondary
        return mix(primary, INK, 0.45) if brightness(primary) > 130 else mix(primary, WHITE, 0.6)


def mirrored(*right: Point) -> list[Point]:
    """Return the closed symmetric outline whose right half is given from top to bottom."""
    return [*right, *((-x, y) for x, y in reversed(right) if x != 0)]


@lru_cache(maxsize=512)
def smooth(points: tuple[Point, ...], steps: int = 5) -> tuple[Point, ...]:
    """Return a closed Catmull-Rom curve through the points, with `steps` points from each of them to the next."""
    curve: list[Point] = []
    n = len(points)
    for i in range(n):
        a, b, c, d = points[i - 1], points[i], points[(i + 1) % n], points[(i + 2) % n]
        for k in range(steps):
            t = k / steps
            wa, wb = -0.5 * t + t**2 - 0.5 * t**3, 1 - 2.5 * t**2 + 1.5 * t**3
            wc, wd = 0.5 * t + 2 * t**2 - 1.5 * t**3, 0.5 * t**3 - 0.5 * t**2
            x = wa * a[0] + wb * b[0] + wc * c[0] + wd * d[0]
            y = wa * a[1] + wb * b[1] + wc * c[1] + wd * d[1]
            curve.append((x, y))
    return tuple(curve)


@lru_cache(maxsize=512)
def pattern_stencil(pattern: str, half: int) -> Image.Image:
    """Return an L picture of the frame, `half` pixels from middle to edge, that is 255 where the pattern has ink."""
    side = 2 * half + 4
    stencil = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(stencil)
    if pattern == "stripes":
        period = 0.40 * half
        for k in range(-1, 12):
            x = k * period
            draw.polygon(
                [(x, 0), (x + period * 0.45, 0), (x + period * 0.45 - side / 3, side), (x - side / 3, side)],
                255,
            )
    elif pattern == "dots":
        period, radius = 0.38 * half, 0.105 * half
        for row in range(7):
            for column in range(7):
                x, y = (column + 0.5 * (row % 2)) * period, (row + 0.3) * period * 0.87
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    return stencil


class Pen:
    """A pen draws one object: shapes in its frame with dark rims; body shapes also get the pattern and a shade."""

    def __init__(self, image: Image.Image, coat: Coat, centre: Point, half: float, rim: float) -> None:
        self.image = image
        self.coat = coat
        self.centre = centre
        self.half = half
        self.rim = rim
        self.draw = ImageDraw.Draw(image)
        self.primary = coat.palette.primary
        self.secondary = coat.palette.secondary
        self.deep = mix(self.primary, INK, 0.28)

    def place(self, points: Sequence[Point]) -> list[Point]:
        """Return points of the frame in pixels of the picture."""
        (cx, cy), h = self.centre, self.half
        return [(cx + h * x, cy + h * y) for x, y in points]

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: RGB,
        *,
        tilt: float = 0,
        rim: bool = True,
        coat: bool = False,
    ) -> None:
        """Draw an ellipse of radii `rx` and `ry` around (x, y), turned clockwise by `tilt` degrees."""
        if tilt:
            c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
            self.shape(
                [(x + c * rx * u - s * ry * v, y + s * rx * u + c * ry * v) for u, v in CIRCLE],
                fill,
                rim=rim,
                coat=coat,
            )
            return
        (cx, cy), h, r = self.centre, self.half, self.rim
        left, top, right, bottom = cx + h * (x - rx), cy + h * (y - ry), cx + h * (x + rx), cy + h * (y + ry)
        if rim:
            self.draw.ellipse((left - r, top - r, right + r, bottom + r), (*INK, 255))
        self.draw.ellipse((left, top, right, bottom), (*fill, 255))
        if coat:
            self._coat(
                (left, top, right, bottom),
                lambda draw, dx, dy, value: draw.ellipse(
                    (left + dx, top + dy, right + dx, bottom + dy), value
                ),
            )

    def blob(self, points: Sequence[Point], fill: RGB, *, rim: bool = True, coat: bool = False) -> None:
        """Draw the area inside a smooth closed curve through the points."""
        self.shape(smooth(tuple(points)), fill, rim=rim, coat=coat)

    def shape(self, points: Sequence[Point], fill: RGB, *, rim: bool = True, coat: bool = False) -> None:
        """Draw the polygon whose corners are the points."""
        corners = self.place(points)
        if rim:
            self.draw.line(
                [*corners, corners[0], corners[1]], (*INK, 255), round(2 * self.rim), joint="curve"
            )
        self.draw.polygon(corners, (*fill, 255))
        if coat:
            xs, ys = [p[0] for p in corners], [p[1] for p in corners]
            self._coat(
                (min(xs), min(ys), max(xs), max(ys)),
                lambda draw, dx, dy, value: draw.polygon([(x + dx, y + dy) for x, y in corners], value),
            )

    def limb(self, points: Sequence[Point], width: float, fill: RGB) -> None:
        """Draw a thick line with rounded ends and a rim: a tail, a leg or a handle."""
        corners = self.place(points)
        for extra, colour in ((self.rim, INK), (0.0, fill)):
            radius = width * self.half / 2 + extra
            self.draw.line(corners, (*colour, 255), max(1, round(2 * radius)), joint="curve")
            for x, y in (corners[0], corners[-1]):
                self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), (*colour, 255))

    def line(self, points: Sequence[Point], width: float = 0.05, colour: RGB = INK) -> None:
        """Draw a thin line without a rim: a mouth, a whisker or a seam."""
        self.draw.line(self.place(points), (*colour, 255), max(3, round(width * self.half)), joint="curve")

    def eye(self, x: float, y: float, radius: float, *, look: Point = (0.0, 0.1)) -> None:
        """Draw a white eye whose dark pupil is shifted by `look`, in radii of the eye."""
        self.oval(x, y, radius, radius, WHITE)
        self.oval(x + look[0] * radius, y + look[1] * radius, radius * 0.58, radius * 0.58, INK, rim=False)
        self.oval(
            x + (look[0] - 0.2) * radius,
            y + (look[1] - 0.25) * radius,
            radius * 0.2,
            radius * 0.2,
            WHITE,
            rim=False,
        )

    def _coat(self, bounds: tuple[float, float, float, float], outline: Outline) -> None:
        left, top = math.floor(bounds[0]), math.floor(bounds[1])
        size = (math.ceil(bounds[2]) - left + 1, math.ceil(bounds[3]) - top + 1)
        if self.coat.pattern != "plain":
            inside = Image.new("L", size, 0)
            outline(ImageDraw.Draw(inside), -left, -top, 255)
            half = round(self.half)
            x, y = left - round(self.centre[0]) + half + 2, top - round(self.centre[1]) + half + 2
            stencil = pattern_stencil(self.coat.pattern, half).crop((x, y, x + size[0], y + size[1]))
            self.image.paste(
                (*self.coat.pattern_colour, 255), (left, top), ImageChops.darker(inside, stencil)
            )
        shade = Image.new("L", size, 0)
        pencil = ImageDraw.Draw(shade)
        shift = 0.09 * self.half
        outline(pencil, -left, -top, SHADE_STRENGTH)
        outline(pencil, -left - shift, -top - shift, 0)
        self.image.paste((*INK, 255), (left, top), shade)
