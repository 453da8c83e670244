"""The twelve animals: drawn from shared parts (torso, head, face) in a common frame."""

import math

from pixrl.toy.drawing.pen import INK, WHITE, Pen, Point, mirrored, mix
from pixrl.toy.vocabulary import RGB

BEAK: RGB = (248, 160, 40)
BLUSH: RGB = (244, 140, 150)
SIDES = (-1, 1)


def torso(pen: Pen, y: float, rx: float, ry: float, belly: float = 0.6) -> None:
    """A sitting body with a belly of the second colour."""
    pen.oval(0, y, rx, ry, pen.primary, coat=True)
    pen.oval(0, y + 0.12 * ry, rx * belly, ry * belly, pen.secondary, rim=False)


def feet(pen: Pen, y: float, spread: float, rx: float, ry: float, fill: RGB) -> None:
    for side in SIDES:
        pen.oval(side * spread, y, rx, ry, fill)


def eyes(pen: Pen, y: float, spread: float, radius: float) -> None:
    for side in SIDES:
        pen.eye(side * spread, y, radius)


def smile(pen: Pen, x: float, y: float, width: float, width_px: float = 0.05) -> None:
    curve = [(x + width * t / 6, y + 0.35 * width * (1 - (t / 6) ** 2)) for t in range(-6, 7)]
    pen.line(curve, width_px)


def owl(pen: Pen) -> None:
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
