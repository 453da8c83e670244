"""This module knows which function draws a kind, where its accessories sit, and how all of it fits into a box."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from pixrl.toy.drawing import kinds
from pixrl.toy.drawing.pen import INK, WHITE, Coat, Pen, Point
from pixrl.toy.vocabulary import RGB

Anchor = tuple[float, float, float]
"""x, y and half width in the kind's frame."""

HAT: RGB = (72, 66, 84)
BAND: RGB = (246, 206, 84)
SCARF: RGB = (0, 164, 156)
FRINGE: RGB = (206, 244, 236)
BALLOON: RGB = (64, 206, 226)
LENS: RGB = (40, 40, 54)


@dataclass(frozen=True, slots=True)
class Sprite:
    """A sprite is a kind's drawing with the places on it for a hat, glasses, a scarf and a balloon's string."""

    draw: Callable[[Pen], None]
    head: Anchor
    eyes: Anchor
    neck: Anchor
    hand: Point


SPRITES: dict[str, Sprite] = {
    "owl": Sprite(kinds.owl, (0, -0.72, 0.46), (0, -0.26, 0.31), (0, 0.12, 0.62), (0.66, 0.2)),
    "snail": Sprite(kinds.snail, (0.68, -0.68, 0.36), (0.68, -0.64, 0.18), (0.68, 0.3, 0.28), (0.9, 0.3)),
    "frog": Sprite(kinds.frog, (0, -0.82, 0.36), (0, -0.6, 0.44), (0, 0.24, 0.5), (0.66, 0.4)),
    "cat": Sprite(kinds.cat, (0, -0.7, 0.42), (0, -0.3, 0.32), (0, 0.24, 0.44), (0.44, 0.5)),
    "fish": Sprite(kinds.fish, (0.3, -0.56, 0.4), (0.62, -0.14, 0.2), (0.2, 0.02, 0.5), (0.2, 0.5)),
    "turtle": Sprite(kinds.turtle, (0.7, -0.28, 0.32), (0.76, -0.1, 0.16), (0.62, 0.24, 0.26), (0.7, 0.2)),
    "bee": Sprite(kinds.bee, (0.6, -0.14, 0.34), (0.62, 0.1, 0.17), (0.42, 0.5, 0.3), (0.5, 0.4)),
    "pig": Sprite(kinds.pig, (0, -0.76, 0.44), (0, -0.34, 0.36), (0, 0.34, 0.54), (0.56, 0.5)),
    "rabbit": Sprite(kinds.rabbit, (0, -0.42, 0.4), (0, -0.1, 0.28), (0, 0.42, 0.42), (0.44, 0.5)),
    "penguin": Sprite(kinds.penguin, (0, -0.86, 0.44), (0, -0.46, 0.22), (0, 0.0, 0.56), (0.66, 0.3)),
    "butterfly": Sprite(kinds.butterfly, (0, -0.56, 0.36), (0, -0.46, 0.15), (0, -0.2, 0.2), (0.1, 0.2)),
    "crab": Sprite(kinds.crab, (0, -0.52, 0.36), (0, -0.4, 0.22), (0, 0.46, 0.5), (0.84, -0.5)),
    "mushroom": Sprite(kinds.mushroom, (0, -0.88, 0.4), (0, -0.26, 0.3), (0, 0.34, 0.28), (0.3, 0.5)),
    "house": Sprite(kinds.house, (0, -0.84, 0.4), (0, 0.24, 0.46), (0, -0.12, 0.7), (0.72, 0.4)),
    "car": Sprite(kinds.car, (-0.02, -0.52, 0.4), (0, -0.22, 0.28), (0, 0.1, 0.6), (0.3, -0.4)),
    "cup": Sprite(kinds.cup, (-0.05, -0.4, 0.5), (-0.05, 0.06, 0.3), (-0.05, 0.5, 0.52), (0.8, 0.1)),
    "tree": Sprite(kinds.tree, (0, -0.9, 0.4), (0, -0.3, 0.32), (0, 0.48, 0.2), (0.2, 0.6)),
    "pineapple": Sprite(kinds.pineapple, (0, -0.84, 0.36), (0, 0.16, 0.28), (0, -0.2, 0.36), (0.5, 0.3)),
    "teapot": Sprite(kinds.teapot, (0, -0.6, 0.4), (0, 0.12, 0.3), (0, 0.5, 0.56), (0.8, -0.1)),
    "guitar": Sprite(kinds.guitar, (0.72, -0.8, 0.36), (-0.16, 0.16, 0.3), (0.34, -0.34, 0.2), (0.3, 0.1)),
    "rocket": Sprite(kinds.rocket, (0, -0.84, 0.36), (0, -0.1, 0.26), (0, 0.3, 0.36), (0.5, 0.4)),
    "cactus": Sprite(kinds.cactus, (0, -0.86, 0.38), (0, -0.5, 0.24), (0, 0.2, 0.32), (0.62, -0.2)),
    "lamp": Sprite(kinds.lamp, (0, -0.86, 0.42), (0, -0.4, 0.28), (0, 0.4, 0.2), (0.5, -0.2)),
    "boat": Sprite(kinds.boat, (0, -0.84, 0.34), (0, 0.58, 0.3), (0, 0.24, 0.5), (0.8, 0.4)),
}


def hat(pen: Pen, sprite: Sprite) -> None:
    """Draw a hat with a band on the kind's head."""
    x, y, w = sprite.head
    crown = 0.66 * w
    pen.shape([(x - crown, y), (x - crown, y - 1.2 * w), (x + crown, y - 1.2 * w), (x + crown, y)], HAT)
    pen.shape([(x - crown, y - 0.42 * w), (x + crown, y - 0.42 * w), (x + crown, y), (x - crown, y)], BAND)
    pen.oval(x, y, 1.15 * w, 0.22 * w, HAT)


def scarf(pen: Pen, sprite: Sprite) -> None:
    """Draw a scarf around the kind's neck, one end of it hanging down with a fringe."""
    x, y, w = sprite.neck
    drop = max(0.36, 0.7 * w)
    pen.shape(
        [(x + 0.3 * w, y), (x + 0.3 * w + 0.24, y), (x + 0.3 * w + 0.28, y + drop), (x + 0.3 * w, y + drop)],
        SCARF,
    )
    end = y + drop
    pen.shape(
        [
            (x + 0.3 * w, end - 0.12),
            (x + 0.3 * w + 0.27, end - 0.12),
            (x + 0.3 * w + 0.28, end),
            (x + 0.3 * w, end),
        ],
        FRINGE,
    )
    pen.limb(
        [(x - w, y - 0.04), (x - 0.5 * w, y + 0.05), (x + 0.5 * w, y + 0.05), (x + w, y - 0.04)], 0.24, SCARF
    )


def glasses(pen: Pen, sprite: Sprite) -> None:
    """Draw dark glasses over the kind's eyes."""
    x, y, w = sprite.eyes
    r = max(0.16, 0.78 * w)
    spread = max(w, r * 1.08)
    pen.line([(x - spread - r, y - 0.05), (x + spread + r, y - 0.05)], 0.1, INK)
    for side in (-1, 1):
        cx = x + side * spread
        pen.oval(cx, y, r, r * 0.9, LENS)
        pen.line([(cx - 0.5 * r, y + 0.05 * r), (cx + 0.05 * r, y - 0.5 * r)], 0.07, WHITE)


def balloon(pen: Pen, sprite: Sprite) -> None:
    """Draw a balloon on a string that ends in the kind's hand."""
    x, y = sprite.hand
    pen.line([(x, y), (1.28, -0.1), (1.34, -0.5)], 0.05, INK)
    pen.shape([(1.34, -0.62), (1.44, -0.46), (1.24, -0.46)], BALLOON)
    pen.oval(1.34, -1.02, 0.36, 0.43, BALLOON)
    pen.oval(1.22, -1.18, 0.08, 0.12, WHITE, tilt=30, rim=False)


WEAR: dict[str, Callable[[Pen, Sprite], None]] = {
    "scarf": scarf,
    "glasses": glasses,
    "hat": hat,
    "balloon": balloon,
}
"""In drawing order: later ones cover earlier ones."""


def extent(sprite: Sprite, worn: tuple[str, ...]) -> tuple[float, float, float, float]:
    """Return the left, top, right and bottom of the kind with what it wears, in the kind's own frame."""
    left, top, right, bottom = -1.0, -1.0, 1.0, 1.0
    if "hat" in worn:
        x, y, w = sprite.head
        left, top, right = min(left, x - 1.2 * w), min(top, y - 1.25 * w), max(right, x + 1.2 * w)
    if "glasses" in worn:
        x, _, w = sprite.eyes
        right = max(right, x + 2.1 * max(w, 0.175))
    if "scarf" in worn:
        x, y, w = sprite.neck
        right, bottom = max(right, x + w + 0.14), max(bottom, y + max(0.36, 0.7 * w) + 0.02)
    if "balloon" in worn:
        top, right = min(top, -1.46), max(right, 1.72)
    return left, top, right, bottom


def draw_object(
    image: Image.Image, kind: str, coat: Coat, worn: tuple[str, ...], centre: Point, side: float
) -> None:
    """Draw a kind with what it wears, all of it inside the square of the given centre and side (both in pixels)."""
    sprite = SPRITES[kind]
    left, top, right, bottom = extent(sprite, worn)
    rim = max(1.5, 0.015 * side)
    half = (side / 2 - rim - 1) / (max(right - left, bottom - top) / 2)
    middle = (centre[0] - half * (left + right) / 2, centre[1] - half * (top + bottom) / 2)
    pen = Pen(image, coat, middle, half, rim)
    sprite.draw(pen)
    for name, wear in WEAR.items():
        if name in worn:
            wear(pen, sprite)
