"""Puts the parts of an object together, dresses it, and fits all of it into its box."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

from pixrl.toy.drawing.bases import BASES
from pixrl.toy.drawing.bodies import BODIES, WIDTHS
from pixrl.toy.drawing.extras import EXTRAS, IN_FRONT, REACH
from pixrl.toy.drawing.heads import EYES, EYES_ELSEWHERE, HEADS, TOPS
from pixrl.toy.drawing.pen import INK, WHITE, Coat, LabelledCanvas, Pen, Point, arc, mix
from pixrl.toy.vocabulary import RGB, SLOTS

HAT: RGB = (78, 72, 92)
BAND: RGB = (246, 206, 84)
SCARF: RGB = (0, 166, 158)
FRINGE: RGB = (206, 244, 236)
BALLOON: RGB = (72, 204, 226)
LENS: RGB = (44, 44, 58)
NECK = -0.06
FRAME = 1.06
"""Parts are drawn between -1 and 1; tips and rims reach a little farther."""
WORN = len(SLOTS) + 1
"""The label of what an object wears, after those of its slots (1 to 4)."""
LABELS_EACH = WORN
"""Labels an object takes up in a picture's label map."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A sign that only a subject's picture shows: its kind (vocabulary.MARKS), colour, and letter if it is one."""

    kind: str
    colour: RGB
    letter: str = "A"


@dataclass(frozen=True, slots=True)
class ToyFigure:
    """One object as it is drawn: the kind that each slot comes from, the coat of each slot, and what it wears."""

    slots: tuple[str, str, str, str]
    coats: tuple[Coat, Coat, Coat, Coat]
    mood: str | None = None
    worn: tuple[str, ...] = ()
    mark: Mark | None = None


def draw_figure(
    canvas: LabelledCanvas, figure: ToyFigure, centre: Point, side: float, first_label: int
) -> None:
    """Draw the figure inside the square of that centre and side (pixels); its labels begin at `first_label`."""
    # the extent of the figure with what it wears, in its own frame
    left, top, right, bottom = -FRAME, -FRAME, FRAME, FRAME
    if "hat" in figure.worn:
        y, w = TOPS[figure.slots[0]]
        top = min(top, y + 0.04 - 1.3 * w)
    if "balloon" in figure.worn:
        top, right = min(top, -1.4), 1.58
    scale = side / max(right - left, bottom - top)
    rim = max(1.5, 0.0135 * side)
    scale *= (side - 2 * rim - 2) / side
    middle = (centre[0] - scale * (left + right) / 2, centre[1] - scale * (top + bottom) / 2)
    pen = Pen(canvas, figure.coats[0], middle, scale, rim, figure.mood)
    head, body, base, extra = figure.slots
    width = WIDTHS[body]

    def part(slot: str, draw: Callable[[], None]) -> None:
        number = SLOTS.index(slot)
        pen.label = first_label + number
        pen.wear(figure.coats[number])
        draw()

    def draw_extra() -> None:
        part("extra", lambda: EXTRAS[extra](pen, min(width, 0.98 - REACH.get(extra, 0.0))))

    if extra not in IN_FRONT:
        draw_extra()
    part("base", lambda: BASES[base](pen, width))
    part("body", lambda: BODIES[body](pen))
    if figure.mark is not None:
        _mark_body(pen, figure.mark)
    if extra in IN_FRONT:
        draw_extra()
    part("head", lambda: HEADS[head](pen))
    if figure.mark is not None:
        _recolour(pen, figure.mark, first_label)
    pen.label = first_label + WORN - 1
    for name, dress in WEAR.items():
        if name in figure.worn:
            dress(pen, head, width)


def hat(pen: Pen, head: str, _width: float) -> None:
    y, w = TOPS[head]
    y += 0.06
    crown = 0.66 * w
    pen.shape([(-crown, y), (-crown * 1.08, y - 1.25 * w), (crown * 1.08, y - 1.25 * w), (crown, y)], HAT)
    pen.shape([(-crown, y - 0.45 * w), (crown, y - 0.45 * w), (crown, y), (-crown, y)], BAND)
    pen.oval(0, y, 1.2 * w, 0.24 * w, HAT)


def scarf(pen: Pen, _head: str, width: float) -> None:
    w, y = max(0.32, min(width * 0.86, 0.46)), NECK
    x, drop = 0.34 * w, y + 0.46
    pen.shape([(x - 0.02, y), (x + 0.22, y), (x + 0.26, drop), (x, drop)], SCARF)
    pen.shape([(x - 0.005, drop - 0.12), (x + 0.25, drop - 0.12), (x + 0.26, drop), (x, drop)], FRINGE)
    pen.limb([(-w, y - 0.04), (-0.5 * w, y + 0.06), (0.5 * w, y + 0.06), (w, y - 0.04)], 0.22, SCARF)


def glasses(pen: Pen, head: str, _width: float) -> None:
    y, spread = EYES.get(head, EYES_ELSEWHERE)
    r = max(0.16, 0.8 * spread)
    spread = max(spread, r * 1.1)
    pen.line([(-spread - r * 1.3, y - 0.06), (spread + r * 1.3, y - 0.06)], 0.09, INK)
    for s in (-1, 1):
        pen.oval(s * spread, y, r, r * 0.88, LENS)
        pen.line([(s * spread - 0.5 * r, y + 0.05 * r), (s * spread + 0.05 * r, y - 0.5 * r)], 0.065, WHITE)


def balloon(pen: Pen, _head: str, width: float) -> None:
    pen.line([(width, 0.2), (1.16, 0.06), (1.22, -0.42)], 0.045, INK)
    pen.shape([(1.22, -0.56), (1.32, -0.4), (1.12, -0.4)], BALLOON)
    pen.oval(1.22, -0.96, 0.34, 0.42, BALLOON)
    pen.oval(1.1, -1.12, 0.075, 0.12, WHITE, tilt=30, rim=False)


WEAR: dict[str, Callable[[Pen, str, float], None]] = {
    "scarf": scarf,
    "glasses": glasses,
    "hat": hat,
    "balloon": balloon,
}
"""In drawing order: later ones cover earlier ones."""


STROKES: dict[str, tuple[tuple[Point, ...], ...]] = {
    "A": (((-0.8, 1), (0, -1), (0.8, 1)), ((-0.45, 0.3), (0.45, 0.3))),
    "K": (((-0.6, -1), (-0.6, 1)), ((0.7, -1), (-0.5, 0.05), (0.7, 1))),
    "M": (((-0.8, 1), (-0.7, -1), (0, 0.3), (0.7, -1), (0.8, 1)),),
    "R": (
        ((-0.6, 1), (-0.6, -1), (0.4, -0.9), (0.55, -0.4), (0.3, 0.0), (-0.5, 0.1)),
        ((-0.1, 0.1), (0.7, 1)),
    ),
    "X": (((-0.7, -1), (0.7, 1)), ((0.7, -1), (-0.7, 1))),
    "Z": (((-0.7, -0.95), (0.7, -0.95), (-0.7, 0.95), (0.7, 0.95)),),
}


def _mark_body(pen: Pen, mark: Mark) -> None:
    """Signs on the chest, on a white patch so that any coat shows them."""
    y, r = 0.27, 0.21
    if mark.kind in ("star", "heart", "moon", "letter"):
        pen.oval(0, y, 0.33, 0.31, WHITE)
    if mark.kind == "star":
        points = [arc(0, y, k, k, -90 + 36 * i, -90 + 36 * i, 1)[0] for i, k in enumerate((0.27, 0.12) * 5)]
        pen.shape(points, mark.colour, rim=False)
    elif mark.kind == "heart":
        half = ((0, y + 0.23), (0.24, y - 0.02), (0.2, y - 0.18), (0.08, y - 0.19), (0, y - 0.1))
        pen.shape([*half, *((-a, b) for a, b in reversed(half[1:-1]))], mark.colour, rim=False)
    elif mark.kind == "moon":
        pen.oval(0, y, 0.22, 0.22, mark.colour, rim=False)
        pen.oval(0.1, y - 0.05, 0.17, 0.18, WHITE, rim=False)
    elif mark.kind == "letter":
        for stroke in STROKES[mark.letter]:
            pen.line([(a * r * 0.9, y + b * r) for a, b in stroke], 0.1, mark.colour)
    elif mark.kind == "scar":
        pen.line([(-0.26, y - 0.2), (-0.06, y - 0.04), (0.06, y + 0.04), (0.26, y + 0.2)], 0.09, mark.colour)
        for t in (-0.8, -0.3, 0.3, 0.8):
            x = 0.24 * t
            pen.line([(x - 0.09, y + 0.18 * t + 0.1), (x + 0.09, y + 0.18 * t - 0.1)], 0.06, mark.colour)


def _recolour(pen: Pen, mark: Mark, first_label: int) -> None:
    """Odd socks (one foot) and heads of two colours: the light part of what is drawn there takes the mark's colour."""
    slot = {"socks": "base", "half": "head"}.get(mark.kind)
    if slot is None:
        return
    labels, image = pen.canvas.labels, pen.canvas.image
    (cx, cy), h = pen.centre, pen.half
    region = (
        (cx, cy - 1.2 * h, cx + 1.2 * h, cy + 1.2 * h)
        if slot == "head"
        else (cx, cy + 0.56 * h, cx + 1.2 * h, cy + 1.2 * h)
    )
    number = first_label + SLOTS.index(slot)
    window = Image.new("L", labels.size, 0)
    ImageDraw.Draw(window).rectangle(region, 255)
    here = ImageChops.darker(labels.point([255 * (k == number) for k in range(256)]), window)
    light = image.convert("L").point([255 * (k > 76) for k in range(256)])
    image.paste(mix(mark.colour, WHITE, 0.08), (0, 0), ImageChops.darker(here, light))
