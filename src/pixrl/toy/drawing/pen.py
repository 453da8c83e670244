"""A pen that draws outlined flat shapes in an object's own frame (x right, y down, both from -1 to 1).

Everything is drawn twice: in colour, and as a map of labels that says to which part of which object a pixel belongs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

from pixrl.toy.vocabulary import RGB, Palette

Point = tuple[float, float]
Outline = Callable[[ImageDraw.ImageDraw, float, float, int], None]

INK: RGB = (52, 42, 58)
WHITE: RGB = (255, 255, 255)
SIDES = (-1, 1)
SHADE_STRENGTH = 36
CIRCLE = tuple((math.cos(k * math.pi / 20), math.sin(k * math.pi / 20)) for k in range(40))


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """The colour `share` of the way from a to b."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def brightness(colour: RGB) -> float:
    """Perceived lightness, 0 to 255."""
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    """The corners of a rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def mirrored(*right: Point) -> list[Point]:
    """The symmetric outline whose right half is given from top to bottom."""
    return [*right, *((-x, y) for x, y in reversed(right) if x != 0)]


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, steps: int = 12) -> list[Point]:
    """Points of an ellipse from one angle to another (degrees, clockwise from the right)."""
    angles = [math.radians(start + (end - start) * k / steps) for k in range(steps + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def spiral(x: float, y: float, radius: float, turns: float, start: float, steps: int = 28) -> list[Point]:
    """A spiral from its middle to `radius`; `start` is the outer end's angle in degrees."""
    end = math.radians(start)
    return [
        (
            x + radius * (k / steps) * math.cos(end - turns * 2 * math.pi * (1 - k / steps)),
            y + radius * (k / steps) * math.sin(end - turns * 2 * math.pi * (1 - k / steps)),
        )
        for k in range(steps + 1)
    ]


@lru_cache(maxsize=2048)
def smooth(points: tuple[Point, ...], steps: int = 6) -> tuple[Point, ...]:
    """A closed Catmull-Rom curve through the points."""
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


@lru_cache(maxsize=256)
def pattern_stencil(pattern: str, half: int) -> Image.Image:
    """Where the pattern's ink goes, over the whole frame of half side `half` pixels."""
    side = 2 * half + 4
    stencil = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(stencil)
    if pattern == "stripes":
        period, width = 0.36 * half, 0.16 * half
        for k in range(-1, 14):
            x = k * period
            draw.polygon([(x, 0), (x + width, 0), (x + width - side / 3, side), (x - side / 3, side)], 255)
    elif pattern == "dots":
        period, radius = 0.36 * half, 0.1 * half
        for row in range(8):
            for column in range(8):
                x, y = (column + 0.5 * (row % 2)) * period, (row + 0.3) * period * 0.87
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    return stencil


@dataclass(frozen=True, slots=True)
class Coat:
    """What an object is painted with."""

    palette: Palette
    pattern: str = "plain"

    @property
    def pattern_colour(self) -> RGB:
        """The secondary colour where it shows on the primary, else a darker or lighter primary."""
        primary, secondary = self.palette.primary, self.palette.secondary
        if math.dist(primary, secondary) > 120:
            return secondary
        return mix(primary, INK, 0.45) if brightness(primary) > 130 else mix(primary, WHITE, 0.6)


@dataclass(frozen=True)
class LabelledCanvas:
    """A picture being drawn, in colour and as labels (0 is background)."""

    image: Image.Image
    labels: Image.Image
    ink: ImageDraw.ImageDraw = field(init=False)
    tags: ImageDraw.ImageDraw = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ink", ImageDraw.Draw(self.image))
        object.__setattr__(self, "tags", ImageDraw.Draw(self.labels))


class Pen:
    """Draws one object: shapes in its frame, each with a dark rim; coated shapes also get pattern and shade.

    `label` is what the label map receives; `mood` is what faces show.
    """

    def __init__(
        self,
        canvas: LabelledCanvas,
        coat: Coat,
        centre: Point,
        half: float,
        rim: float,
        mood: str | None = None,
    ) -> None:
        self.canvas, self.centre, self.half, self.rim, self.mood = canvas, centre, half, rim, mood
        self.label = 0
        self.wear(coat)

    def wear(self, coat: Coat) -> None:
        """Go on with another coat: the parts of a hybrid may keep their own."""
        self.coat = coat
        self.primary, self.secondary = coat.palette.primary, coat.palette.secondary
        self.deep = mix(self.primary, INK, 0.26)
        self.light = mix(self.primary, WHITE, 0.5)

    def place(self, points: Sequence[Point]) -> list[Point]:
        """The frame's points in pixels."""
        (cx, cy), h = self.centre, self.half
        return [(cx + h * x, cy + h * y) for x, y in points]

    def oval(
        self, x: float, y: float, rx: float, ry: float, fill: RGB, *,
        tilt: float = 0, rim: bool = True, coat: bool = False,
    ) -> None:  # fmt: skip
        """An ellipse, turned clockwise by `tilt` degrees."""
        if tilt:
            c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
            turned = [(x + c * rx * u - s * ry * v, y + s * rx * u + c * ry * v) for u, v in CIRCLE]
            self.shape(turned, fill, rim=rim, coat=coat)
            return
        (cx, cy), h = self.centre, self.half
        left, top, right, bottom = cx + h * (x - rx), cy + h * (y - ry), cx + h * (x + rx), cy + h * (y + ry)
        r = self.rim if rim else 0.0
        outer = (left - r, top - r, right + r, bottom + r)
        if rim:
            self.canvas.ink.ellipse(outer, INK)
        self.canvas.ink.ellipse((left, top, right, bottom), fill)
        self.canvas.tags.ellipse(outer, self.label)
        if coat:
            self._coat(
                (left, top, right, bottom),
                lambda draw, dx, dy, value: draw.ellipse(
                    (left + dx, top + dy, right + dx, bottom + dy), value
                ),
            )

    def blob(self, points: Sequence[Point], fill: RGB, *, rim: bool = True, coat: bool = False) -> None:
        """A smooth closed curve through the points."""
        self.shape(smooth(tuple(points)), fill, rim=rim, coat=coat)

    def shape(self, points: Sequence[Point], fill: RGB, *, rim: bool = True, coat: bool = False) -> None:
        """A polygon."""
        corners = self.place(points)
        if rim:
            closed = [*corners, corners[0], corners[1]]
            self.canvas.ink.line(closed, INK, round(2 * self.rim), joint="curve")
            self.canvas.tags.line(closed, self.label, round(2 * self.rim))
        self.canvas.ink.polygon(corners, fill)
        self.canvas.tags.polygon(corners, self.label)
        if coat:
            xs, ys = [p[0] for p in corners], [p[1] for p in corners]
            self._coat(
                (min(xs), min(ys), max(xs), max(ys)),
                lambda draw, dx, dy, value: draw.polygon([(x + dx, y + dy) for x, y in corners], value),
            )

    def limb(self, points: Sequence[Point], width: float, fill: RGB) -> None:
        """A rounded thick line with a rim: a tail, a leg, a handle."""
        corners = self.place(points)
        for extra, colour in ((self.rim, INK), (0.0, fill)):
            radius = width * self.half / 2 + extra
            self._stroke(corners, colour, max(1, round(2 * radius)))
            for x, y in (corners[0], corners[-1]):
                ends = (x - radius, y - radius, x + radius, y + radius)
                self.canvas.ink.ellipse(ends, colour)
                self.canvas.tags.ellipse(ends, self.label)

    def line(self, points: Sequence[Point], width: float = 0.045, colour: RGB = INK) -> None:
        """A plain thin line: a mouth, a whisker, a seam."""
        self._stroke(self.place(points), colour, max(3, round(width * self.half)))

    def _stroke(self, corners: list[Point], colour: RGB, width: int) -> None:
        self.canvas.ink.line(corners, colour, width, joint="curve")
        self.canvas.tags.line(corners, self.label, width)

    def _coat(self, bounds: tuple[float, float, float, float], outline: Outline) -> None:
        left, top = math.floor(bounds[0]), math.floor(bounds[1])
        size = (math.ceil(bounds[2]) - left + 1, math.ceil(bounds[3]) - top + 1)
        if self.coat.pattern != "plain":
            inside = Image.new("L", size, 0)
            outline(ImageDraw.Draw(inside), -left, -top, 255)
            half = round(self.half)
            x, y = left - round(self.centre[0]) + half + 2, top - round(self.centre[1]) + half + 2
            stencil = pattern_stencil(self.coat.pattern, half).crop((x, y, x + size[0], y + size[1]))
            self.canvas.image.paste(self.coat.pattern_colour, (left, top), ImageChops.darker(inside, stencil))
        shade = Image.new("L", size, 0)
        pencil = ImageDraw.Draw(shade)
        shift = 0.09 * self.half
        outline(pencil, -left, -top, SHADE_STRENGTH)
        outline(pencil, -left - shift, -top - shift, 0)
        self.canvas.image.paste(INK, (left, top), shade)
