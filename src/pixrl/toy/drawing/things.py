"""The twelve things."""

import math

from pixrl.toy.drawing.pen import INK, WHITE, Pen, mirrored, mix
from pixrl.toy.vocabulary import RGB

WOOD: RGB = (140, 94, 56)
LEAF: RGB = (66, 148, 66)
GLASS: RGB = (190, 226, 244)
STEEL: RGB = (176, 182, 192)
TYRE: RGB = (58, 56, 64)
CREAM: RGB = (250, 240, 218)
GOLD: RGB = (248, 204, 74)
SIDES = (-1, 1)


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def mushroom(pen: Pen) -> None:
    pen.blob(
        [(-0.24, -0.1), (0.24, -0.1), (0.26, 0.4), (0.38, 0.84), (0, 0.92), (-0.38, 0.84), (-0.26, 0.4)],
        CREAM,
    )
    cap = mirrored((0, -0.92), (0.44, -0.8), (0.8, -0.4), (0.92, 0.08), (0.5, 0.2), (0, 0.24))
    pen.blob(cap, pen.primary, coat=True)
    if pen.coat.pattern == "plain":
        for x, y, r in ((-0.5, -0.3, 0.14), (0.02, -0.58, 0.17), (0.5, -0.28, 0.15), (0.04, -0.06, 0.13)):
            pen.oval(x, y, r, r * 0.9, CREAM, rim=False)


def house(pen: Pen) -> None:
    roof = mix(pen.secondary, INK, 0.12)
    pen.shape(box(0.36, -0.84, 0.58, -0.3), pen.deep)
    pen.shape(box(-0.72, -0.22, 0.72, 0.92), pen.primary, coat=True)
    pen.shape([(-0.95, -0.16), (0, -0.94), (0.95, -0.16)], roof)
    pen.shape(box(-0.2, 0.36, 0.16, 0.92), WOOD)
    pen.oval(0.08, 0.66, 0.04, 0.04, GOLD, rim=False)
    for x in (-0.48, 0.46):
        pen.shape(box(x - 0.15, 0.08, x + 0.15, 0.4), GLASS)
        pen.line([(x, 0.08), (x, 0.4)])
        pen.line([(x - 0.15, 0.24), (x + 0.15, 0.24)])


def car(pen: Pen) -> None:
    pen.blob(
        [(-0.6, 0.0), (-0.42, -0.42), (-0.24, -0.56), (0.2, -0.56), (0.36, -0.42), (0.62, 0.0)], pen.primary
    )
    pen.shape([(-0.46, -0.04), (-0.32, -0.4), (-0.05, -0.4), (-0.05, -0.04)], GLASS)
    pen.shape([(0.06, -0.04), (0.06, -0.4), (0.24, -0.4), (0.48, -0.04)], GLASS)
    hood = ((-0.94, 0.3), (-0.9, 0.02), (-0.5, -0.06), (0.4, -0.06), (0.84, 0.06), (0.95, 0.3))
    pen.blob([*hood, (0.9, 0.46), (0, 0.5), (-0.9, 0.46)], pen.primary, coat=True)
    pen.oval(0.84, 0.18, 0.08, 0.1, GOLD)
    pen.line([(-0.05, 0.0), (-0.05, 0.42)], 0.04, pen.deep)
    pen.line([(0.06, 0.12), (0.2, 0.12)], 0.06)
    for x in (-0.5, 0.5):
        pen.oval(x, 0.48, 0.25, 0.25, TYRE)
        pen.oval(x, 0.48, 0.12, 0.12, STEEL, rim=False)


def cup(pen: Pen) -> None:
    for x in (-0.36, -0.02, 0.3):
        pen.line([(x, -0.56), (x + 0.08, -0.68), (x - 0.06, -0.8), (x + 0.02, -0.92)], 0.07, (172, 178, 190))
    pen.limb([(0.46, -0.12), (0.8, -0.16), (0.88, 0.14), (0.74, 0.42), (0.4, 0.48)], 0.14, pen.primary)
    right = ((0.6, -0.36), (0.62, 0.1), (0.46, 0.66), (0.2, 0.86))
    left = ((-0.3, 0.86), (-0.56, 0.66), (-0.72, 0.1), (-0.7, -0.36))
    pen.blob([*right, *left], pen.primary, coat=True)
    pen.oval(-0.05, -0.36, 0.66, 0.17, mix(pen.primary, WHITE, 0.35))
    pen.oval(-0.05, -0.33, 0.52, 0.1, (112, 72, 48), rim=False)


def tree(pen: Pen) -> None:
    pen.shape([(-0.16, 0.2), (0.16, 0.2), (0.26, 0.94), (-0.26, 0.94)], WOOD)
    crown = ((0, -0.95), (0.42, -0.82), (0.6, -0.5), (0.88, -0.26))
    pen.blob(mirrored(*crown, (0.84, 0.16), (0.46, 0.36), (0, 0.32)), pen.primary, coat=True)
    for x, y in ((-0.42, -0.2), (0.1, -0.52), (0.4, -0.06)):
        pen.line([(x - 0.14, y), (x, y + 0.08), (x + 0.14, y)], 0.06, pen.deep)


def pineapple(pen: Pen) -> None:
    for tip, width in (
        ((-0.52, -0.74), 0.2),
        ((0.52, -0.74), 0.2),
        ((-0.26, -0.92), 0.2),
        ((0.26, -0.92), 0.2),
        ((0, -0.98), 0.16),
    ):
        pen.shape([(-width, -0.24), tip, (width, -0.24)], LEAF)
    pen.oval(0, 0.32, 0.54, 0.62, pen.primary, coat=True)
    seam = mix(pen.primary, INK, 0.42)
    for offset in (-0.66, -0.33, 0.0, 0.33, 0.66):
        for side in SIDES:
            pen.line(_chord(offset, side), 0.045, seam)


def _chord(offset: float, side: int) -> list[tuple[float, float]]:
    """A diagonal of the pineapple's oval, cut a little inside its rim."""
    across = math.sqrt(0.9 - offset**2) / math.sqrt(2)
    shift = offset / math.sqrt(2)
    ends = ((shift - across, -shift - across), (shift + across, -shift + across))
    return [(side * 0.54 * x, 0.32 + 0.62 * y) for x, y in ends]


def teapot(pen: Pen) -> None:
    pen.limb([(-0.5, -0.16), (-0.84, -0.14), (-0.9, 0.2), (-0.72, 0.48), (-0.46, 0.5)], 0.13, pen.primary)
    pen.shape([(0.4, 0.44), (0.62, 0.0), (0.78, -0.36), (0.97, -0.3), (0.86, 0.1), (0.5, 0.66)], pen.primary)
    pen.oval(0, 0.82, 0.36, 0.09, pen.deep)
    pen.oval(0, 0.26, 0.64, 0.58, pen.primary, coat=True)
    pen.oval(0, -0.6, 0.12, 0.12, pen.secondary)
    pen.blob(
        [(-0.42, -0.26), (-0.26, -0.44), (0, -0.5), (0.26, -0.44), (0.42, -0.26), (0, -0.18)], pen.secondary
    )


def guitar(pen: Pen) -> None:
    pen.shape([(0.5, -0.98), (0.97, -0.5), (0.78, -0.44), (0.44, -0.78)], (96, 62, 44))
    pen.limb([(-0.3, 0.3), (0.66, -0.66)], 0.17, (120, 80, 54))
    right = ((0.2, -0.28), (0.34, -0.02), (0.22, 0.24), (0.2, 0.56), (-0.04, 0.86), (-0.44, 0.92))
    left = ((-0.82, 0.76), (-0.93, 0.4), (-0.8, 0.06), (-0.5, -0.18), (-0.24, -0.22), (-0.06, -0.38))
    pen.blob([*right, *left], pen.primary, coat=True)
    pen.oval(-0.16, 0.16, 0.19, 0.19, (74, 52, 44))
    pen.shape([(-0.68, 0.4), (-0.38, 0.7), (-0.46, 0.78), (-0.76, 0.48)], (96, 62, 44))
    for shift in (-0.05, 0.05):
        pen.line([(-0.57 + shift, 0.57 + shift), (0.7 + shift, -0.7 + shift)], 0.03, CREAM)


def rocket(pen: Pen) -> None:
    pen.blob([(-0.22, 0.6), (0.22, 0.6), (0.12, 0.8), (0, 0.97), (-0.12, 0.8)], (250, 150, 40))
    pen.blob([(-0.1, 0.6), (0.1, 0.6), (0, 0.82)], GOLD, rim=False)
    for side in SIDES:
        pen.shape(
            [(side * 0.3, 0.06), (side * 0.72, 0.44), (side * 0.72, 0.8), (side * 0.26, 0.58)], pen.secondary
        )
    hull = mirrored((0, -0.97), (0.28, -0.6), (0.4, -0.1), (0.36, 0.36), (0.26, 0.64))
    pen.blob(hull, pen.primary, coat=True)
    pen.blob(
        [(0, -0.97), (0.28, -0.6), (0.27, -0.5), (0, -0.46), (-0.27, -0.5), (-0.28, -0.6)], pen.secondary
    )
    pen.oval(0, -0.1, 0.21, 0.21, STEEL)
    pen.oval(0, -0.1, 0.13, 0.13, (90, 150, 200), rim=False)


def cactus(pen: Pen) -> None:
    for side, low, high in ((-1, 0.2, -0.34), (1, 0.0, -0.52)):
        pen.limb(
            [(0, low), (side * 0.56, low), (side * 0.62, low - 0.06), (side * 0.62, high)], 0.26, pen.primary
        )
    trunk = mirrored((0, -0.95), (0.22, -0.84), (0.29, -0.5), (0.29, 0.56))
    pen.blob(trunk, pen.primary, coat=True)
    for x, y in ((-0.1, -0.6), (0.12, -0.36), (-0.1, -0.1), (0.12, 0.14), (-0.62, -0.14), (0.62, -0.32)):
        pen.line([(x - 0.06, y - 0.06), (x, y), (x + 0.06, y - 0.06)], 0.04, mix(pen.primary, INK, 0.65))
    pen.shape([(-0.4, 0.5), (0.4, 0.5), (0.3, 0.94), (-0.3, 0.94)], (204, 112, 70))
    pen.shape(box(-0.47, 0.4, 0.47, 0.56), (220, 130, 84))


def lamp(pen: Pen) -> None:
    pen.oval(0, 0.86, 0.46, 0.1, (110, 96, 92))
    pen.limb([(0, 0.1), (0, 0.82)], 0.12, (150, 130, 116))
    pen.line([(0.34, 0.1), (0.34, 0.36)], 0.05)
    pen.oval(0.34, 0.4, 0.06, 0.06, GOLD)
    pen.oval(0, 0.1, 0.2, 0.2, (255, 246, 190))
    pen.shape([(-0.4, -0.92), (0.4, -0.92), (0.84, 0.12), (-0.84, 0.12)], pen.primary, coat=True)
    pen.line([(-0.78, 0.02), (0.78, 0.02)], 0.08, pen.deep)
    pen.line([(-0.42, -0.84), (0.42, -0.84)], 0.08, pen.deep)


def boat(pen: Pen) -> None:
    pen.limb([(0, -0.9), (0, 0.4)], 0.08, WOOD)
    pen.shape([(0.1, -0.84), (0.78, 0.18), (0.1, 0.18)], CREAM)
    pen.shape([(-0.1, -0.7), (-0.1, 0.18), (-0.66, 0.18)], mix(CREAM, pen.secondary, 0.6))
    hull = mirrored((0, 0.34), (0.6, 0.32), (0.95, 0.3), (0.8, 0.62), (0.5, 0.88), (0, 0.92))
    pen.blob(hull, pen.primary, coat=True)
    pen.line([(-0.84, 0.44), (0.84, 0.44)], 0.07, pen.secondary)
