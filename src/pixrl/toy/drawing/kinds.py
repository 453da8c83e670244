"""The twelve animals and the twelve things that the toy world knows, each drawn by one function in a common frame.

The frame of a kind reaches from -1 to 1 in both directions, x to the right and y downwards (pixrl.toy.drawing.pen).
"""

import math

from pixrl.toy.drawing.pen import INK, WHITE, Pen, Point, mirrored, mix
from pixrl.toy.vocabulary import RGB

BEAK: RGB = (248, 160, 40)
BLUSH: RGB = (244, 140, 150)
WOOD: RGB = (140, 94, 56)
LEAF: RGB = (66, 148, 66)
GLASS: RGB = (190, 226, 244)
STEEL: RGB = (176, 182, 192)
TYRE: RGB = (58, 56, 64)
CREAM: RGB = (250, 240, 218)
GOLD: RGB = (248, 204, 74)
SIDES = (-1, 1)


def torso(pen: Pen, y: float, rx: float, ry: float, belly: float = 0.6) -> None:
    """Draw a sitting body around (0, y) with a belly of the second colour, `belly` of the body's radii in size."""
    pen.oval(0, y, rx, ry, pen.primary, coat=True)
    pen.oval(0, y + 0.12 * ry, rx * belly, ry * belly, pen.secondary, rim=False)


def feet(pen: Pen, y: float, spread: float, rx: float, ry: float, fill: RGB) -> None:
    """Draw two oval feet of radii `rx` and `ry` at height `y`, `spread` to the left and right of the middle."""
    for side in SIDES:
        pen.oval(side * spread, y, rx, ry, fill)


def eyes(pen: Pen, y: float, spread: float, radius: float) -> None:
    """Draw two eyes of one radius at height `y`, `spread` to the left and right of the middle."""
    for side in SIDES:
        pen.eye(side * spread, y, radius)


def smile(pen: Pen, x: float, y: float, width: float, width_px: float = 0.05) -> None:
    """Draw a mouth, a parabola that hangs from (x - width, y) to (x + width, y), in a line `width_px` thick."""
    curve = [(x + width * t / 6, y + 0.35 * width * (1 - (t / 6) ** 2)) for t in range(-6, 7)]
    pen.line(curve, width_px)


def owl(pen: Pen) -> None:
    """Draw an owl from the front, with ear tufts, wings and large ringed eyes."""
    feet(pen, 0.88, 0.26, 0.16, 0.09, BEAK)
    for side in SIDES:
        pen.shape([(side * 0.12, -0.62), (side * 0.62, -0.97), (side * 0.68, -0.38)], pen.primary)
    outline = mirrored((0, -0.76), (0.5, -0.66), (0.7, -0.25), (0.66, 0.4), (0.4, 0.8), (0, 0.88))
    pen.blob(outline, pen.primary, coat=True)
    pen.oval(0, 0.42, 0.38, 0.38, pen.secondary, rim=False)
    for x, y in ((-0.18, 0.36), (0.18, 0.36), (0, 0.54)):
        smile(pen, x, y, 0.1, 0.045)
    for side in SIDES:
        pen.oval(side * 0.64, 0.32, 0.14, 0.38, pen.deep, tilt=side * -12)
        pen.oval(side * 0.31, -0.26, 0.31, 0.31, pen.secondary)
        pen.oval(side * 0.29, -0.26, 0.21, 0.21, WHITE)
        pen.oval(side * 0.27, -0.25, 0.135, 0.135, INK, rim=False)
        pen.oval(side * 0.27 - 0.05, -0.31, 0.05, 0.05, WHITE, rim=False)
    pen.shape([(-0.11, -0.1), (0.11, -0.1), (0, 0.12)], BEAK)


def snail(pen: Pen) -> None:
    """Draw a snail that crawls to the right, its shell in the coat's colours and its body in the second colour."""
    skin = pen.secondary
    for x in (0.5, 0.86):
        pen.limb([(0.62, -0.05), (x, -0.62)], 0.08, skin)
        pen.oval(x, -0.66, 0.1, 0.1, INK)
        pen.oval(x - 0.03, -0.69, 0.035, 0.035, WHITE, rim=False)
    tail_and_belly = ((0.7, 0.74), (0.2, 0.82), (-0.5, 0.82), (-0.95, 0.76), (-0.5, 0.5), (0.2, 0.46))
    throat_and_face = ((0.4, 0.1), (0.56, -0.14), (0.84, -0.12), (0.94, 0.12), (0.86, 0.42))
    pen.blob([*tail_and_belly, *throat_and_face], skin)
    smile(pen, 0.78, 0.14, 0.12)
    pen.oval(-0.2, -0.02, 0.66, 0.64, pen.primary, coat=True)
    spiral = []
    for k in range(40):
        angle, radius = k * 0.36, 0.5 * (1 - k / 42)
        spiral.append((-0.2 + radius * math.cos(angle + 1.2), 0.0 + radius * math.sin(angle + 1.2)))
    pen.line(spiral, 0.085, mix(pen.primary, INK, 0.6))


def frog(pen: Pen) -> None:
    """Draw a sitting frog from the front, with eyes on top of its head."""
    for side in SIDES:
        pen.oval(side * 0.62, 0.5, 0.3, 0.34, pen.primary, tilt=side * 25)
        pen.oval(side * 0.66, 0.84, 0.28, 0.1, pen.primary)
    torso(pen, 0.42, 0.56, 0.46)
    for side in SIDES:
        pen.limb([(side * 0.3, 0.45), (side * 0.28, 0.82)], 0.14, pen.primary)
        pen.oval(side * 0.28, 0.86, 0.17, 0.08, pen.primary)
        pen.oval(side * 0.44, -0.6, 0.28, 0.28, pen.primary)
    pen.oval(0, -0.2, 0.82, 0.46, pen.primary, coat=True)
    for side in SIDES:
        pen.oval(side * 0.44, -0.56, 0.22, 0.2, pen.primary, rim=False)
        pen.eye(side * 0.44, -0.62, 0.2)
        pen.oval(side * 0.6, -0.06, 0.1, 0.06, BLUSH, rim=False)
        pen.oval(side * 0.08, -0.28, 0.03, 0.03, INK, rim=False)
    smile(pen, 0, -0.14, 0.56, 0.07)


def cat(pen: Pen) -> None:
    """Draw a sitting cat from the front, with whiskers and a raised tail."""
    pen.limb([(0.4, 0.75), (0.72, 0.72), (0.84, 0.5), (0.78, 0.22), (0.86, 0.08)], 0.17, pen.primary)
    torso(pen, 0.5, 0.46, 0.46)
    feet(pen, 0.88, 0.22, 0.17, 0.1, pen.secondary)
    for side in SIDES:
        pen.shape([(side * 0.12, -0.6), (side * 0.58, -0.98), (side * 0.7, -0.3)], pen.primary)
        pen.shape([(side * 0.3, -0.62), (side * 0.54, -0.82), (side * 0.58, -0.45)], BLUSH, rim=False)
    pen.oval(0, -0.26, 0.7, 0.5, pen.primary, coat=True)
    pen.oval(0, -0.06, 0.27, 0.2, pen.secondary, rim=False)
    eyes(pen, -0.3, 0.32, 0.15)
    pen.shape([(-0.08, -0.14), (0.08, -0.14), (0, -0.05)], BLUSH)
    for side in SIDES:
        smile(pen, side * 0.09, 0.0, 0.09)
        pen.line([(side * 0.34, -0.06), (side * 0.86, -0.14)])
        pen.line([(side * 0.34, 0.02), (side * 0.84, 0.08)])


def fish(pen: Pen) -> None:
    """Draw a fish that swims to the right, its fins in the second colour."""
    fin = pen.secondary
    pen.blob([(-0.4, 0.0), (-0.94, -0.5), (-0.84, 0.0), (-0.94, 0.5)], fin)
    pen.blob([(-0.3, -0.4), (-0.06, -0.82), (0.36, -0.72), (0.34, -0.4)], fin)
    pen.blob([(-0.1, 0.46), (-0.2, 0.78), (0.14, 0.74), (0.2, 0.46)], fin)
    back = ((-0.62, 0), (-0.3, -0.4), (0.2, -0.56), (0.7, -0.4), (0.95, 0))
    pen.blob([*back, (0.7, 0.4), (0.2, 0.56), (-0.3, 0.4)], pen.primary, coat=True)
    pen.blob([(-0.02, 0.02), (-0.34, -0.04), (-0.36, 0.26), (-0.06, 0.24)], fin)
    pen.line([(0.3, -0.44), (0.22, -0.2), (0.22, 0.2), (0.3, 0.44)], 0.06, pen.deep)
    pen.eye(0.56, -0.14, 0.19, look=(0.15, 0.0))
    pen.line([(0.92, 0.14), (0.78, 0.2), (0.7, 0.16)], 0.06)


def turtle(pen: Pen) -> None:
    """Draw a turtle that walks to the right, its shell in the coat's colours and its skin in the second colour."""
    skin = pen.secondary
    pen.shape([(-0.7, 0.4), (-0.97, 0.62), (-0.55, 0.62)], skin)
    for x in (-0.46, 0.28):
        pen.blob([(x - 0.16, 0.36), (x + 0.16, 0.36), (x + 0.2, 0.82), (x - 0.2, 0.82)], skin)
    pen.limb([(0.48, 0.4), (0.7, 0.08)], 0.24, skin)
    pen.oval(0.7, -0.06, 0.26, 0.27, skin)
    pen.eye(0.76, -0.12, 0.12)
    smile(pen, 0.84, 0.06, 0.09)
    dome = (
        (-0.88, 0.42),
        (-0.76, -0.1),
        (-0.46, -0.5),
        (-0.12, -0.62),
        (0.22, -0.5),
        (0.48, -0.1),
        (0.58, 0.42),
    )
    pen.blob([*dome, (-0.14, 0.52)], pen.primary, coat=True)
    seam = mix(pen.primary, INK, 0.5)
    plate: list[Point] = [(-0.4, -0.22), (0.1, -0.22), (0.22, 0.1), (-0.15, 0.3), (-0.52, 0.1)]
    pen.line([*plate, plate[0]], 0.055, seam)
    for inner, outer in zip(
        plate, [(-0.5, -0.44), (0.2, -0.44), (0.5, 0.12), (-0.15, 0.48), (-0.8, 0.12)], strict=True
    ):
        pen.line([inner, outer], 0.055, seam)
    pen.limb([(-0.84, 0.44), (-0.14, 0.52), (0.54, 0.44)], 0.1, skin)


def bee(pen: Pen) -> None:
    """Draw a bee that flies to the right, with pale wings and dark bands."""
    wing = (214, 236, 248)
    pen.oval(-0.36, -0.5, 0.26, 0.42, wing, tilt=-24)
    pen.oval(0.14, -0.54, 0.27, 0.42, wing, tilt=14)
    pen.shape([(-0.7, 0.06), (-0.98, 0.22), (-0.7, 0.38)], INK)
    pen.oval(-0.1, 0.22, 0.72, 0.48, pen.primary, coat=True)
    for x, height in ((-0.5, 0.36), (-0.2, 0.44), (0.1, 0.44)):
        top, bottom = 0.22 - height, 0.22 + height
        band = [(x - 0.07, top), (x + 0.07, top), (x + 0.1, 0.22), (x + 0.07, bottom), (x - 0.07, bottom)]
        pen.blob([*band, (x - 0.04, 0.22)], INK, rim=False)
    for x in (0.5, 0.84):
        pen.line([(0.6, -0.1), (x, -0.44)], 0.06)
        pen.oval(x, -0.46, 0.06, 0.06, INK, rim=False)
    pen.oval(0.58, 0.18, 0.36, 0.37, pen.primary)
    pen.eye(0.48, 0.1, 0.12)
    pen.eye(0.78, 0.1, 0.12)
    smile(pen, 0.64, 0.3, 0.14)


def pig(pen: Pen) -> None:
    """Draw a sitting pig from the front, with drooping ears and a curly tail."""
    pen.limb(
        [(0.5, 0.56), (0.74, 0.58), (0.84, 0.44), (0.74, 0.34), (0.68, 0.46), (0.92, 0.6)], 0.06, pen.deep
    )
    torso(pen, 0.46, 0.58, 0.48, belly=0.62)
    feet(pen, 0.88, 0.28, 0.17, 0.1, pen.deep)
    pen.oval(0, -0.24, 0.76, 0.6, pen.primary, coat=True)
    for side in SIDES:
        pen.blob(
            [
                (side * x, y)
                for x, y in ((0.24, -0.74), (0.46, -0.9), (0.8, -0.92), (0.78, -0.62), (0.62, -0.46))
            ],
            pen.deep,
        )
        pen.oval(side * 0.36, -0.34, 0.09, 0.11, INK, rim=False)
        pen.oval(side * 0.38, -0.38, 0.035, 0.035, WHITE, rim=False)
        pen.oval(side * 0.54, -0.08, 0.12, 0.08, BLUSH, rim=False)
    pen.oval(0, -0.08, 0.32, 0.23, pen.secondary)
    for side in SIDES:
        pen.oval(side * 0.12, -0.08, 0.06, 0.1, mix(pen.primary, INK, 0.6), rim=False)
    smile(pen, 0, 0.2, 0.16)


def rabbit(pen: Pen) -> None:
    """Draw a sitting rabbit from the front, with upright ears and two front teeth."""
    for side in SIDES:
        pen.oval(side * 0.27, -0.6, 0.16, 0.38, pen.primary, tilt=side * 10, coat=True)
        pen.oval(side * 0.27, -0.58, 0.08, 0.28, BLUSH, tilt=side * 10, rim=False)
    pen.oval(0.52, 0.62, 0.18, 0.18, WHITE)
    torso(pen, 0.54, 0.46, 0.4)
    feet(pen, 0.88, 0.26, 0.24, 0.1, pen.primary)
    pen.oval(0, -0.04, 0.58, 0.46, pen.primary, coat=True)
    pen.oval(0, 0.14, 0.24, 0.18, pen.secondary, rim=False)
    eyes(pen, -0.1, 0.28, 0.13)
    pen.oval(0, 0.06, 0.075, 0.055, BLUSH)
    pen.shape([(-0.07, 0.2), (0.07, 0.2), (0.07, 0.34), (-0.07, 0.34)], WHITE)
    pen.line([(0, 0.2), (0, 0.34)], 0.03)
    for side in SIDES:
        smile(pen, side * 0.08, 0.15, 0.08)


def penguin(pen: Pen) -> None:
    """Draw a standing penguin from the front, with a white face and belly."""
    for side in SIDES:
        pen.oval(side * 0.28, 0.88, 0.24, 0.1, BEAK)
        pen.oval(side * 0.62, 0.26, 0.15, 0.42, pen.deep, tilt=side * -24)
    upper = ((0, -0.96), (0.38, -0.84), (0.52, -0.46), (0.6, 0.1))
    pen.blob(mirrored(*upper, (0.58, 0.56), (0.34, 0.86), (0, 0.9)), pen.primary, coat=True)
    pen.oval(0, 0.4, 0.4, 0.44, WHITE, rim=False)
    for side in SIDES:
        pen.oval(side * 0.19, -0.42, 0.22, 0.24, WHITE, rim=False)
        pen.oval(side * 0.2, -0.46, 0.085, 0.1, INK, rim=False)
        pen.oval(side * 0.2 - 0.03, -0.5, 0.035, 0.035, WHITE, rim=False)
    pen.shape([(-0.16, -0.3), (0.16, -0.3), (0, -0.08)], BEAK)


def butterfly(pen: Pen) -> None:
    """Draw a butterfly with its four wings spread."""
    lower = ((0.05, 0.05), (0.5, 0.08), (0.76, 0.36), (0.62, 0.8), (0.3, 0.76), (0.08, 0.4))
    upper = ((0.05, 0.14), (0.08, -0.3), (0.4, -0.78), (0.82, -0.84), (0.94, -0.46), (0.66, 0.08))
    for side in SIDES:
        for wing in (lower, upper):
            pen.blob([(side * x, y) for x, y in wing], pen.primary, coat=True)
        pen.oval(side * 0.62, -0.44, 0.18, 0.2, pen.secondary)
        pen.oval(side * 0.46, 0.46, 0.13, 0.15, pen.secondary)
        pen.line([(side * 0.04, -0.5), (side * 0.12, -0.74), (side * 0.3, -0.9)], 0.06)
        pen.oval(side * 0.3, -0.9, 0.06, 0.06, INK, rim=False)
    pen.oval(0, 0.16, 0.11, 0.56, (92, 70, 66))
    pen.oval(0, -0.44, 0.16, 0.17, (92, 70, 66))
    for side in SIDES:
        pen.oval(side * 0.07, -0.46, 0.05, 0.06, WHITE, rim=False)


def crab(pen: Pen) -> None:
    """Draw a crab from the front, with raised claws and eyes on stalks."""
    for side in SIDES:
        for k, y in enumerate((0.3, 0.5, 0.68)):
            pen.limb(
                [(side * 0.4, y - 0.1), (side * (0.86 - 0.1 * k), y), (side * (0.9 - 0.1 * k), y + 0.2)],
                0.1,
                pen.deep,
            )
        pen.limb([(side * 0.5, 0.1), (side * 0.78, -0.1), (side * 0.74, -0.36)], 0.15, pen.primary)
        claw = (
            (0.62, -0.26),
            (0.5, -0.56),
            (0.58, -0.86),
            (0.7, -0.54),
            (0.94, -0.8),
            (0.95, -0.44),
            (0.84, -0.24),
        )
        pen.shape([(side * x, y) for x, y in claw], pen.primary)
        pen.limb([(side * 0.2, -0.05), (side * 0.22, -0.34)], 0.08, pen.primary)
    shell = mirrored((0, -0.18), (0.46, -0.1), (0.7, 0.18), (0.56, 0.5), (0, 0.66))
    pen.blob(shell, pen.primary, coat=True)
    eyes(pen, -0.4, 0.22, 0.17)
    smile(pen, 0, 0.26, 0.28, 0.07)
    for side in SIDES:
        pen.oval(side * 0.42, 0.22, 0.09, 0.06, pen.secondary, rim=False)


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """Return the four corners of an upright rectangle, clockwise from the upper left."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def mushroom(pen: Pen) -> None:
    """Draw a mushroom; its cap carries the coat, or pale spots where the coat has no pattern."""
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
    """Draw a house from the front, with a gable roof, a chimney, a door and two windows."""
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
    """Draw a car that drives to the right."""
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
    """Draw a steaming cup of coffee with its handle to the right."""
    for x in (-0.36, -0.02, 0.3):
        pen.line([(x, -0.56), (x + 0.08, -0.68), (x - 0.06, -0.8), (x + 0.02, -0.92)], 0.07, (172, 178, 190))
    pen.limb([(0.46, -0.12), (0.8, -0.16), (0.88, 0.14), (0.74, 0.42), (0.4, 0.48)], 0.14, pen.primary)
    right = ((0.6, -0.36), (0.62, 0.1), (0.46, 0.66), (0.2, 0.86))
    left = ((-0.3, 0.86), (-0.56, 0.66), (-0.72, 0.1), (-0.7, -0.36))
    pen.blob([*right, *left], pen.primary, coat=True)
    pen.oval(-0.05, -0.36, 0.66, 0.17, mix(pen.primary, WHITE, 0.35))
    pen.oval(-0.05, -0.33, 0.52, 0.1, (112, 72, 48), rim=False)


def tree(pen: Pen) -> None:
    """Draw a tree with one round crown."""
    pen.shape([(-0.16, 0.2), (0.16, 0.2), (0.26, 0.94), (-0.26, 0.94)], WOOD)
    crown = ((0, -0.95), (0.42, -0.82), (0.6, -0.5), (0.88, -0.26))
    pen.blob(mirrored(*crown, (0.84, 0.16), (0.46, 0.36), (0, 0.32)), pen.primary, coat=True)
    for x, y in ((-0.42, -0.2), (0.1, -0.52), (0.4, -0.06)):
        pen.line([(x - 0.14, y), (x, y + 0.08), (x + 0.14, y)], 0.06, pen.deep)


def pineapple(pen: Pen) -> None:
    """Draw a pineapple, its skin cut into lozenges by diagonal seams."""
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
        # The diagonals of the oval at this distance from its middle, cut a little inside its rim.
        across, shift = math.sqrt(0.9 - offset**2) / math.sqrt(2), offset / math.sqrt(2)
        ends = ((shift - across, -shift - across), (shift + across, -shift + across))
        for side in SIDES:
            pen.line([(side * 0.54 * x, 0.32 + 0.62 * y) for x, y in ends], 0.045, seam)


def teapot(pen: Pen) -> None:
    """Draw a teapot with its spout to the right."""
    pen.limb([(-0.5, -0.16), (-0.84, -0.14), (-0.9, 0.2), (-0.72, 0.48), (-0.46, 0.5)], 0.13, pen.primary)
    pen.shape([(0.4, 0.44), (0.62, 0.0), (0.78, -0.36), (0.97, -0.3), (0.86, 0.1), (0.5, 0.66)], pen.primary)
    pen.oval(0, 0.82, 0.36, 0.09, pen.deep)
    pen.oval(0, 0.26, 0.64, 0.58, pen.primary, coat=True)
    pen.oval(0, -0.6, 0.12, 0.12, pen.secondary)
    pen.blob(
        [(-0.42, -0.26), (-0.26, -0.44), (0, -0.5), (0.26, -0.44), (0.42, -0.26), (0, -0.18)], pen.secondary
    )


def guitar(pen: Pen) -> None:
    """Draw a guitar that leans to the right."""
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
    """Draw a rocket that flies upwards, with a flame below it."""
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
    """Draw a potted cactus with two arms."""
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
    """Draw a table lamp with a pull cord."""
    pen.oval(0, 0.86, 0.46, 0.1, (110, 96, 92))
    pen.limb([(0, 0.1), (0, 0.82)], 0.12, (150, 130, 116))
    pen.line([(0.34, 0.1), (0.34, 0.36)], 0.05)
    pen.oval(0.34, 0.4, 0.06, 0.06, GOLD)
    pen.oval(0, 0.1, 0.2, 0.2, (255, 246, 190))
    pen.shape([(-0.4, -0.92), (0.4, -0.92), (0.84, 0.12), (-0.84, 0.12)], pen.primary, coat=True)
    pen.line([(-0.78, 0.02), (0.78, 0.02)], 0.08, pen.deep)
    pen.line([(-0.42, -0.84), (0.42, -0.84)], 0.08, pen.deep)


def boat(pen: Pen) -> None:
    """Draw a sailing boat from the side."""
    pen.limb([(0, -0.9), (0, 0.4)], 0.08, WOOD)
    pen.shape([(0.1, -0.84), (0.78, 0.18), (0.1, 0.18)], CREAM)
    pen.shape([(-0.1, -0.7), (-0.1, 0.18), (-0.66, 0.18)], mix(CREAM, pen.secondary, 0.6))
    hull = mirrored((0, 0.34), (0.6, 0.32), (0.95, 0.3), (0.8, 0.62), (0.5, 0.88), (0, 0.92))
    pen.blob(hull, pen.primary, coat=True)
    pen.line([(-0.84, 0.44), (0.84, 0.44)], 0.07, pen.secondary)
