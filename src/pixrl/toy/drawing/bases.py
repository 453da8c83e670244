"""What every kind stands on, from the hip at y = 0.58 down to 0.98; `w` is half the width of the body above."""

import math
from collections.abc import Callable

from pixrl.toy.drawing.heads import BEAK, CREAM, GOLD, LEAF, PINK, STEEL
from pixrl.toy.drawing.pen import INK, SIDES, WHITE, Pen, arc, box, mirrored, mix
from pixrl.toy.vocabulary import RGB

TYRE: RGB = (66, 64, 74)
STONE: RGB = (186, 180, 182)
SOIL: RGB = (128, 88, 62)


def _apart(w: float, least: float = 0.18, share: float = 0.55) -> float:
    """How far from the middle a foot stands under a body of that half width."""
    return max(least, share * w)


def owl(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * _apart(w)
        pen.limb([(x, 0.5), (x, 0.82)], 0.13, BEAK)
        for toe in (-0.16, 0.0, 0.16):
            pen.limb([(x, 0.8), (x + toe, 0.93)], 0.11, BEAK)


def snail(pen: Pen, w: float) -> None:
    foot = [
        (-0.95, 0.92),
        (-0.6, 0.7),
        (-w, 0.56),
        (w, 0.56),
        (0.66, 0.68),
        (0.9, 0.74),
        (0.94, 0.92),
        (0.5, 0.97),
        (-0.5, 0.97),
    ]
    pen.blob(foot, pen.primary, coat=True)
    wave = mix(pen.primary, INK, 0.2)
    for x in (-0.6, -0.3, 0.0, 0.3, 0.6):
        pen.line(arc(x, 0.86, 0.09, 0.06, 200, 340, 6), 0.045, wave)


def frog(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (_apart(w) + 0.2)
        pen.oval(x, 0.66, 0.25, 0.2, pen.primary, tilt=s * -24, coat=True)
        toes = [
            (x - s * 0.16, 0.82),
            (x + s * 0.42, 0.98),
            (x + s * 0.24, 0.98),
            (x + s * 0.1, 0.94),
            (x - s * 0.04, 0.98),
            (x - s * 0.22, 0.98),
        ]
        pen.shape(toes, mix(pen.primary, pen.secondary, 0.4))


def cat(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * _apart(w, 0.17, 0.5)
        pen.limb([(x, 0.54), (x, 0.84)], 0.2, pen.primary)
        pen.oval(x, 0.88, 0.2, 0.1, pen.secondary)
        for toe in (-0.06, 0.06):
            pen.line([(x + toe, 0.86), (x + toe, 0.95)], 0.03)


def fish(pen: Pen, w: float) -> None:
    for s in SIDES:
        fluke = [
            (0, 0.56),
            (s * 0.2, 0.62),
            (s * 0.66, 0.78),
            (s * 0.74, 0.98),
            (s * 0.4, 0.94),
            (s * 0.12, 0.86),
            (0, 0.8),
        ]
        pen.shape(fluke, pen.deep)
        for x, y in ((0.34, 0.78), (0.5, 0.88)):
            pen.line([(s * 0.12, 0.7), (s * x, y)], 0.04, pen.light)
    pen.limb([(0, 0.54), (0, 0.7)], 0.22, pen.primary)


def turtle(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (_apart(w) + 0.14)
        pen.blob(
            [(x - s * 0.24, 0.54), (x + s * 0.1, 0.54), (x + s * 0.24, 0.92), (x - s * 0.14, 0.96)],
            pen.primary,
            coat=True,
        )
        for nail in (-0.08, 0.05, 0.18):
            pen.oval(x + s * nail, 0.93, 0.05, 0.05, CREAM)


def bee(pen: Pen, w: float) -> None:
    band = (66, 56, 64)
    pen.shape([(-0.36, 0.5), (0.36, 0.5), (0.06, 0.98), (-0.06, 0.98)], band)
    pen.shape([(-0.27, 0.62), (0.27, 0.62), (0.19, 0.74), (-0.19, 0.74)], pen.primary, rim=False)
    for s in SIDES:
        pen.limb([(s * 0.3, 0.54), (s * 0.5, 0.72), (s * 0.46, 0.88)], 0.07, band)


def pig(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * _apart(w, 0.2)
        pen.limb([(x, 0.52), (x, 0.78)], 0.26, pen.primary)
        hoof = mix(pen.primary, INK, 0.6)
        pen.shape(
            [
                (x - 0.15, 0.8),
                (x + 0.15, 0.8),
                (x + 0.19, 0.97),
                (x + 0.03, 0.97),
                (x, 0.88),
                (x - 0.03, 0.97),
                (x - 0.19, 0.97),
            ],
            hoof,
        )


def rabbit(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (_apart(w, 0.22) + 0.08)
        pen.oval(x, 0.8, 0.24, 0.18, pen.primary, tilt=s * 14, coat=True)
        pen.oval(x, 0.84, 0.11, 0.07, PINK, rim=False)
        for toe in (-0.1, 0.0, 0.1):
            pen.oval(x + toe, 0.7, 0.04, 0.04, PINK, rim=False)


def penguin(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * _apart(w, 0.2, 0.5)
        foot = [
            (x - s * 0.1, 0.64),
            (x + s * 0.1, 0.64),
            (x + s * 0.34, 0.94),
            (x + s * 0.17, 0.9),
            (x + s * 0.06, 0.97),
            (x - s * 0.06, 0.9),
            (x - s * 0.18, 0.94),
        ]
        pen.shape(foot, BEAK)


def butterfly(pen: Pen, w: float) -> None:
    pen.limb([(0, 0.6), (0, 0.95)], 0.08, LEAF)
    for k in range(6):
        x, y = arc(0, 0.8, 0.34, 0.1, 60 * k + 30, 60 * k + 30, 1)[0]
        pen.oval(
            x,
            y,
            0.19,
            0.09,
            (244, 130, 170),
            tilt=24 * math.cos(math.radians(60 * k + 30)) * (1 if y > 0.8 else -1),
        )
    pen.oval(0, 0.8, 0.15, 0.08, GOLD)


def crab(pen: Pen, w: float) -> None:
    for s in SIDES:
        for k, x in enumerate((0.2, 0.5, 0.8)):
            root = s * min(w, 0.5) * (0.5 + 0.25 * k)
            pen.limb([(root, 0.5), (s * x, 0.62 + 0.03 * k), (s * (x + 0.06), 0.8)], 0.11, pen.deep)
            pen.shape([(s * x, 0.78), (s * (x + 0.13), 0.78), (s * (x + 0.05), 0.97)], pen.deep)


def lion(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (_apart(w, 0.24) + 0.06)
        pen.oval(x, 0.8, 0.28, 0.17, pen.primary, coat=True)
        for toe in (-0.14, 0.0, 0.14):
            pen.shape([(x + toe - 0.045, 0.86), (x + toe + 0.045, 0.86), (x + toe, 0.98)], WHITE)


def elephant(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * _apart(w, 0.2)
        pen.shape(
            [(x - 0.19, 0.5), (x + 0.19, 0.5), (x + 0.23, 0.96), (x - 0.23, 0.96)], pen.primary, coat=True
        )
        for nail in (-0.12, 0.0, 0.12):
            pen.shape([*arc(x + nail, 0.96, 0.055, 0.08, 180, 360, 6)], CREAM)


def octopus(pen: Pen, w: float) -> None:
    for s in SIDES:
        curls = (
            ((0.36, 0.56), (0.62, 0.7), (0.84, 0.9), (0.96, 0.8)),
            ((0.2, 0.58), (0.36, 0.8), (0.5, 0.94), (0.66, 0.92)),
            ((0.07, 0.6), (0.1, 0.84), (0.2, 0.94), (0.31, 0.9)),
        )
        for curl in curls:
            pen.limb([(s * x, y) for x, y in curl], 0.16, pen.primary)
        for x, y in ((0.6, 0.7), (0.8, 0.87), (0.36, 0.8), (0.11, 0.82)):
            pen.oval(s * x, y, 0.045, 0.045, pen.secondary, rim=False)


def peacock(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * _apart(w, 0.13, 0.35)
        pen.limb([(x, 0.52), (x, 0.9)], 0.075, (224, 140, 60))
        for toe in (-0.13, 0.0, 0.13):
            pen.limb([(x, 0.88), (x + toe, 0.96)], 0.065, (224, 140, 60))
        pen.oval(x, 0.62, 0.13, 0.13, pen.primary)


def mushroom(pen: Pen, w: float) -> None:
    pen.oval(0, 0.76, max(0.4, w + 0.06), 0.19, CREAM)
    for x, y in (
        (-0.74, 0.72),
        (-0.5, 0.6),
        (-0.26, 0.74),
        (0.0, 0.78),
        (0.26, 0.74),
        (0.5, 0.6),
        (0.74, 0.72),
    ):
        pen.shape([(x * 0.9 - 0.13, 0.97), (x, y), (x * 0.9 + 0.13, 0.97)], LEAF)


def house(pen: Pen, w: float) -> None:
    for k, reach in enumerate((0.5, 0.7, 0.92)):
        pen.shape(box(-reach, 0.6 + 0.13 * k, reach, 0.72 + 0.13 * k), mix(STONE, WHITE, 0.3 - 0.15 * k))
    pen.shape([(-0.2, 0.48), (0.2, 0.48), (0.24, 0.97), (-0.24, 0.97)], (214, 92, 84))
    for y in (0.68, 0.82):
        pen.line([(-0.2, y), (0.2, y)], 0.035, (164, 60, 62))


def car(pen: Pen, w: float) -> None:
    reach = max(0.5, w * 0.78)
    for s in SIDES:
        pen.shape(
            box(min(s * reach - 0.16, s * reach + 0.16), 0.56, max(s * reach - 0.16, s * reach + 0.16), 0.98),
            TYRE,
        )
        for y in (0.68, 0.8, 0.9):
            pen.line([(s * reach - 0.12, y), (s * reach + 0.12, y)], 0.035, (104, 102, 114))
    pen.limb([(-reach - 0.04, 0.66), (reach + 0.04, 0.66)], 0.15, STEEL)
    pen.shape(box(-0.17, 0.6, 0.17, 0.76), WHITE)
    pen.line([(-0.1, 0.68), (0.1, 0.68)], 0.06, (80, 90, 120))


def cup(pen: Pen, w: float) -> None:
    pen.oval(0, 0.8, 0.92, 0.17, pen.primary)
    pen.oval(0, 0.76, 0.6, 0.1, mix(pen.primary, pen.secondary, 0.55), rim=False)
    pen.oval(0, 0.7, 0.36, 0.14, pen.primary)


def tree(pen: Pen, w: float) -> None:
    bark = pen.secondary
    for s in SIDES:
        pen.shape(
            [
                (0, 0.54),
                (s * (w * 0.5 + 0.16), 0.56),
                (s * 0.5, 0.8),
                (s * 0.88, 0.9),
                (s * 0.84, 0.98),
                (s * 0.4, 0.94),
                (s * 0.3, 0.97),
                (s * 0.12, 0.86),
                (0, 0.97),
            ],
            bark,
        )
        pen.line([(s * 0.14, 0.66), (s * 0.4, 0.86)], 0.04, mix(bark, INK, 0.35))


def pineapple(pen: Pen, w: float) -> None:
    pen.oval(0, 0.8, 0.74, 0.18, pen.primary)
    pen.oval(0, 0.78, 0.58, 0.12, mix(pen.primary, WHITE, 0.55), rim=False)
    for k in range(10):
        a, b = arc(0, 0.78, 0.54, 0.11, 36 * k, 36 * k, 1)[0], arc(0, 0.78, 0.34, 0.07, 36 * k, 36 * k, 1)[0]
        pen.line([a, b], 0.035, mix(pen.primary, INK, 0.15))
    pen.oval(0, 0.76, 0.2, 0.06, mix(pen.primary, INK, 0.35))


def teapot(pen: Pen, w: float) -> None:
    pen.shape(
        [(-0.22, 0.56), (0.22, 0.56), (0.3, 0.74), (0.52, 0.96), (-0.52, 0.96), (-0.3, 0.74)], pen.secondary
    )
    pen.limb([(-0.28, 0.74), (0.28, 0.74)], 0.08, pen.primary)
    pen.limb([(-0.5, 0.93), (0.5, 0.93)], 0.09, pen.primary)


def guitar(pen: Pen, w: float) -> None:
    pen.blob(mirrored((0, 0.42), (0.42, 0.46), (0.7, 0.68), (0.56, 0.94), (0, 0.98)), pen.primary, coat=True)
    pen.shape(box(-0.32, 0.74, 0.32, 0.86), pen.secondary)
    for x in (-0.2, -0.07, 0.07, 0.2):
        pen.oval(x, 0.8, 0.035, 0.035, CREAM, rim=False)


def rocket(pen: Pen, w: float) -> None:
    pen.blob(
        [(-0.4, 0.68), (0.4, 0.68), (0.3, 0.86), (0.16, 0.84), (0, 0.99), (-0.16, 0.84), (-0.3, 0.86)],
        (248, 130, 50),
    )
    pen.blob([(-0.2, 0.7), (0.2, 0.7), (0.1, 0.8), (0, 0.9), (-0.1, 0.8)], GOLD, rim=False)
    pen.shape([(-0.28, 0.52), (0.28, 0.52), (0.42, 0.72), (-0.42, 0.72)], STEEL)


def cactus(pen: Pen, w: float) -> None:
    clay = pen.secondary
    pen.shape([(-0.5, 0.66), (0.5, 0.66), (0.38, 0.98), (-0.38, 0.98)], clay)
    pen.shape(box(-0.58, 0.54, 0.58, 0.7), mix(clay, WHITE, 0.18))
    pen.line([(-0.38, 0.78), (0.38, 0.78)], 0.045, mix(clay, INK, 0.3))


def lamp(pen: Pen, w: float) -> None:
    brass = (206, 164, 84)
    pen.limb([(0, 0.56), (0, 0.84)], 0.16, brass)
    pen.oval(0, 0.76, 0.16, 0.07, brass)
    pen.oval(0, 0.9, 0.54, 0.09, brass)
    pen.oval(-0.14, 0.88, 0.2, 0.025, mix(brass, WHITE, 0.5), rim=False)


def boat(pen: Pen, w: float) -> None:
    crest = [
        (-0.95, 0.72),
        (-0.76, 0.6),
        (-0.57, 0.72),
        (-0.38, 0.6),
        (-0.19, 0.72),
        (0, 0.6),
        (0.19, 0.72),
        (0.38, 0.6),
        (0.57, 0.72),
        (0.76, 0.6),
        (0.95, 0.72),
    ]
    pen.shape([*crest, (0.9, 0.97), (-0.9, 0.97)], (86, 164, 214))
    for y, shift in ((0.8, 0.0), (0.89, 0.16)):
        for x in (-0.6, -0.2, 0.2, 0.6):
            pen.line(arc(x + shift - 0.08, y + 0.03, 0.1, 0.06, 200, 340, 6), 0.045, (214, 238, 250))


def robot(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * _apart(w, 0.3, 0.62)
        outline = [
            (x - 0.2, 0.6),
            (x + 0.2, 0.6),
            (x + 0.28, 0.79),
            (x + 0.2, 0.97),
            (x - 0.2, 0.97),
            (x - 0.28, 0.79),
        ]
        pen.blob(outline, TYRE)
        for wheel in (-0.12, 0.12):
            pen.oval(x + wheel, 0.79, 0.085, 0.1, STEEL, rim=False)
            pen.oval(x + wheel, 0.79, 0.03, 0.035, TYRE, rim=False)
    pen.limb([(-0.2, 0.6), (0.2, 0.6)], 0.1, STEEL)


def windmill(pen: Pen, w: float) -> None:
    pen.blob(
        [
            (-0.97, 0.96),
            (-0.6, 0.74),
            (-0.2, 0.62),
            (0.2, 0.62),
            (0.6, 0.74),
            (0.97, 0.96),
            (0.4, 0.98),
            (-0.4, 0.98),
        ],
        (138, 192, 92),
    )
    for x, colour in ((-0.66, (226, 70, 66)), (-0.36, GOLD), (0.36, (226, 70, 66)), (0.66, GOLD)):
        pen.line([(x, 0.94), (x, 0.84)], 0.045, (70, 130, 66))
        pen.oval(x, 0.81, 0.06, 0.065, colour)


def sunflower(pen: Pen, w: float) -> None:
    pen.blob(
        [(-0.72, 0.96), (-0.5, 0.76), (-0.2, 0.66), (0.2, 0.66), (0.5, 0.76), (0.72, 0.96), (0, 0.98)], SOIL
    )
    for x, y in ((-0.42, 0.86), (-0.14, 0.8), (0.16, 0.88), (0.42, 0.84)):
        pen.oval(x, y, 0.055, 0.04, mix(SOIL, WHITE, 0.3), rim=False)
    for s in SIDES:
        pen.blob([(s * 0.5, 0.8), (s * 0.62, 0.6), (s * 0.8, 0.58), (s * 0.7, 0.74)], LEAF)


def clock(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * _apart(w, 0.2)
        pen.limb([(x * 0.8, 0.52), (x + s * 0.16, 0.86)], 0.13, STEEL)
        pen.oval(x + s * 0.18, 0.88, 0.13, 0.09, GOLD)


BASES: dict[str, Callable[[Pen, float], None]] = {
    "owl": owl, "snail": snail, "frog": frog, "cat": cat, "fish": fish, "turtle": turtle, "bee": bee, "pig": pig,
    "rabbit": rabbit, "penguin": penguin, "butterfly": butterfly, "crab": crab, "lion": lion, "elephant": elephant,
    "octopus": octopus, "peacock": peacock, "mushroom": mushroom, "house": house, "car": car, "cup": cup, "tree": tree,
    "pineapple": pineapple, "teapot": teapot, "guitar": guitar, "rocket": rocket, "cactus": cactus, "lamp": lamp,
    "boat": boat, "robot": robot, "windmill": windmill, "sunflower": sunflower, "clock": clock,
}  # fmt: skip
