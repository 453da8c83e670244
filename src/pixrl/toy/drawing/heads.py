"""The heads, or tops, of all kinds: drawn last, over the neck at y = -0.12, reaching up to -1."""

from collections.abc import Callable

from pixrl.toy.drawing.faces import cheeks, eye, eyes, mouth
from pixrl.toy.drawing.pen import INK, SIDES, WHITE, Pen, arc, box, mirrored, mix
from pixrl.toy.vocabulary import RGB

BEAK: RGB = (246, 168, 58)
CREAM: RGB = (252, 243, 224)
GLASS: RGB = (190, 228, 246)
STEEL: RGB = (182, 190, 202)
WOOD: RGB = (150, 102, 62)
LEAF: RGB = (84, 160, 78)
GOLD: RGB = (250, 206, 84)
PINK: RGB = (250, 160, 176)
COFFEE: RGB = (122, 78, 52)


def owl(pen: Pen) -> None:
    for s in SIDES:
        pen.shape([(s * 0.16, -0.82), (s * 0.52, -1.0), (s * 0.54, -0.56)], pen.deep)
    pen.blob(
        mirrored((0, -0.88), (0.42, -0.8), (0.58, -0.46), (0.42, -0.1), (0, 0.02)), pen.primary, coat=True
    )
    for s in SIDES:
        pen.oval(s * 0.23, -0.46, 0.26, 0.28, pen.secondary, rim=False)
    eyes(pen, -0.47, 0.23, 0.18)
    pen.shape([(-0.1, -0.36), (0.1, -0.36), (0, -0.16)], BEAK)


def snail(pen: Pen) -> None:
    for s in SIDES:
        pen.limb([(s * 0.14, -0.4), (s * 0.24, -0.66), (s * 0.3, -0.82)], 0.1, pen.primary)
        eye(pen, s * 0.3, -0.84, 0.14, s)
    pen.blob(
        mirrored((0, -0.58), (0.32, -0.5), (0.38, -0.22), (0.26, -0.02), (0, 0.02)), pen.primary, coat=True
    )
    cheeks(pen, -0.22, 0.22)
    mouth(pen, 0, -0.22, 0.13)


def frog(pen: Pen) -> None:
    for s in SIDES:
        pen.oval(s * 0.34, -0.7, 0.22, 0.22, pen.primary)
    outline = mirrored((0, -0.66), (0.42, -0.62), (0.66, -0.36), (0.5, -0.08), (0, 0.0))
    pen.blob(outline, pen.primary, coat=True)
    eyes(pen, -0.72, 0.34, 0.15)
    cheeks(pen, -0.28, 0.46)
    mouth(pen, 0, -0.32, 0.32, 0.065)
    for s in SIDES:
        pen.oval(s * 0.07, -0.46, 0.025, 0.025, INK, rim=False)


def cat(pen: Pen) -> None:
    for s in SIDES:
        pen.shape([(s * 0.12, -0.72), (s * 0.46, -1.0), (s * 0.54, -0.5)], pen.primary)
        pen.shape([(s * 0.26, -0.72), (s * 0.42, -0.86), (s * 0.46, -0.6)], PINK, rim=False)
    pen.blob(mirrored((0, -0.8), (0.4, -0.74), (0.56, -0.42), (0.4, -0.1), (0, 0.0)), pen.primary, coat=True)
    pen.oval(0, -0.2, 0.24, 0.16, pen.secondary, rim=False)
    eyes(pen, -0.46, 0.23, 0.14)
    pen.shape([(-0.06, -0.3), (0.06, -0.3), (0, -0.22)], PINK, rim=False)
    for s in SIDES:
        mouth(pen, s * 0.08, -0.19, 0.08)
        pen.line([(s * 0.34, -0.26), (s * 0.68, -0.32)], 0.03)
        pen.line([(s * 0.34, -0.19), (s * 0.68, -0.15)], 0.03)


def fish(pen: Pen) -> None:
    for k, x in enumerate((-0.2, 0.0, 0.2)):
        pen.shape([(x - 0.16, -0.66), (x, -0.9 - 0.09 * (k == 1)), (x + 0.16, -0.66)], pen.deep)
    pen.blob(
        mirrored((0, -0.78), (0.36, -0.72), (0.54, -0.42), (0.42, -0.12), (0, 0.0)), pen.primary, coat=True
    )
    for s in SIDES:
        eye(pen, s * 0.34, -0.5, 0.17, s)
        pen.line(arc(s * 0.3, -0.16, 0.12, 0.16, 300 if s > 0 else 240, 420 if s > 0 else 120), 0.045)
    pen.oval(0, -0.22, 0.19, 0.13, mix(PINK, pen.primary, 0.2))
    if pen.mood == "happy":
        pen.oval(0, -0.2, 0.11, 0.08, (150, 56, 70), rim=False)
    else:
        pen.line([(-0.13, -0.21), (0.13, -0.21)], 0.05)


def turtle(pen: Pen) -> None:
    pen.limb([(0, -0.3), (0, 0.0)], 0.3, pen.primary)
    pen.blob(
        mirrored((0, -0.86), (0.32, -0.78), (0.42, -0.5), (0.32, -0.22), (0, -0.14)), pen.primary, coat=True
    )
    for x, y, r in ((-0.1, -0.74, 0.07), (0.1, -0.7, 0.055), (0.0, -0.6, 0.045)):
        pen.oval(x, y, r, r * 0.8, pen.deep, rim=False)
    eyes(pen, -0.48, 0.2, 0.11)
    cheeks(pen, -0.34, 0.26, 0.06)
    mouth(pen, 0, -0.3, 0.16)


def bee(pen: Pen) -> None:
    for s in SIDES:
        pen.line([(s * 0.12, -0.7), (s * 0.18, -0.86), (s * 0.32, -0.92)], 0.06)
        pen.oval(s * 0.34, -0.92, 0.075, 0.075, INK, rim=False)
    pen.oval(0, -0.4, 0.48, 0.4, pen.primary, coat=True)
    pen.shape([*arc(0, -0.4, 0.48, 0.4, 200, 340), (0.3, -0.62), (-0.3, -0.62)], (70, 58, 66), rim=False)
    for s in SIDES:
        pen.oval(
            s * 0.23, -0.4, 0.15, 0.2, WHITE if pen.mood != "happy" else pen.primary, rim=pen.mood != "happy"
        )
    eyes(pen, -0.38, 0.23, 0.13)
    cheeks(pen, -0.18, 0.3)
    mouth(pen, 0, -0.18, 0.1)


def pig(pen: Pen) -> None:
    for s in SIDES:
        pen.shape([(s * 0.14, -0.76), (s * 0.5, -0.94), (s * 0.6, -0.56), (s * 0.4, -0.5)], pen.deep)
    pen.blob(
        mirrored((0, -0.82), (0.4, -0.76), (0.58, -0.42), (0.42, -0.08), (0, 0.02)), pen.primary, coat=True
    )
    eyes(pen, -0.52, 0.26, 0.11)
    cheeks(pen, -0.3, 0.4)
    pen.oval(0, -0.32, 0.21, 0.16, pen.secondary)
    for s in SIDES:
        pen.oval(s * 0.08, -0.32, 0.04, 0.065, mix(pen.primary, INK, 0.55), rim=False)
    mouth(pen, 0, -0.13, 0.1)


def rabbit(pen: Pen) -> None:
    for s in SIDES:
        pen.oval(s * 0.22, -0.74, 0.14, 0.3, pen.primary, tilt=s * 10)
        pen.oval(s * 0.22, -0.72, 0.065, 0.2, PINK, tilt=s * 10, rim=False)
    pen.blob(
        mirrored((0, -0.66), (0.36, -0.6), (0.48, -0.32), (0.36, -0.04), (0, 0.02)), pen.primary, coat=True
    )
    eyes(pen, -0.38, 0.2, 0.115)
    cheeks(pen, -0.2, 0.32)
    pen.shape([(-0.055, -0.26), (0.055, -0.26), (0, -0.19)], PINK, rim=False)
    pen.shape(box(-0.07, -0.12, 0.07, 0.0), WHITE)
    pen.line([(0, -0.12), (0, 0.0)], 0.03)
    for s in SIDES:
        mouth(pen, s * 0.075, -0.16, 0.075)


def penguin(pen: Pen) -> None:
    pen.blob(mirrored((0, -0.9), (0.38, -0.8), (0.5, -0.46), (0.42, -0.12), (0, 0.0)), pen.primary, coat=True)
    for s in SIDES:
        pen.oval(s * 0.18, -0.42, 0.22, 0.25, WHITE, rim=False)
    pen.oval(0, -0.26, 0.26, 0.16, WHITE, rim=False)
    eyes(pen, -0.46, 0.18, 0.1)
    cheeks(pen, -0.28, 0.28, 0.06)
    pen.blob([(-0.15, -0.32), (0, -0.37), (0.15, -0.32), (0, -0.2)], BEAK)


def butterfly(pen: Pen) -> None:
    for s in SIDES:
        pen.line(
            [(s * 0.08, -0.52), (s * 0.14, -0.78), *arc(s * 0.28, -0.82, 0.1, 0.1, 180, 180 + s * 300, 10)],
            0.05,
        )
    pen.oval(0, -0.32, 0.3, 0.28, mix(pen.primary, (120, 90, 80), 0.7), coat=True)
    eyes(pen, -0.36, 0.13, 0.1)
    cheeks(pen, -0.22, 0.2, 0.05)
    mouth(pen, 0, -0.22, 0.09)


def crab(pen: Pen) -> None:
    for s in SIDES:
        pen.limb([(s * 0.2, -0.3), (s * 0.26, -0.6)], 0.1, pen.primary)
        eye(pen, s * 0.27, -0.72, 0.17, s)
    pen.blob(
        mirrored((0, -0.46), (0.42, -0.42), (0.56, -0.22), (0.4, -0.02), (0, 0.02)), pen.primary, coat=True
    )
    cheeks(pen, -0.18, 0.36)
    mouth(pen, 0, -0.24, 0.2)


def lion(pen: Pen) -> None:
    mane = [
        (0.62 * c * k, -0.44 + 0.54 * s * k)
        for i, (c, s) in enumerate((arc(0, 0, 1, 1, 18 * j, 18 * j, 1)[0]) for j in range(20))
        for k in ((1.0,) if i % 2 else (0.86,))
    ]
    pen.blob(mane, pen.secondary)
    for s in SIDES:
        pen.oval(s * 0.34, -0.76, 0.13, 0.13, pen.primary)
    pen.blob(
        mirrored((0, -0.76), (0.32, -0.68), (0.4, -0.42), (0.3, -0.14), (0, -0.06)), pen.primary, coat=True
    )
    eyes(pen, -0.5, 0.18, 0.105)
    pen.oval(0, -0.24, 0.2, 0.13, mix(pen.primary, WHITE, 0.65), rim=False)
    pen.shape([(-0.09, -0.36), (0.09, -0.36), (0, -0.26)], (120, 70, 60))
    for s in SIDES:
        mouth(pen, s * 0.075, -0.22, 0.075)


def elephant(pen: Pen) -> None:
    for s in SIDES:
        pen.blob(
            [(s * 0.3, -0.78), (s * 0.74, -0.82), (s * 0.9, -0.46), (s * 0.66, -0.12), (s * 0.34, -0.26)],
            pen.deep,
        )
        pen.blob([(s * 0.4, -0.66), (s * 0.68, -0.68), (s * 0.76, -0.44), (s * 0.6, -0.26)], PINK, rim=False)
    pen.blob(
        mirrored((0, -0.86), (0.34, -0.78), (0.44, -0.48), (0.32, -0.16), (0, -0.08)), pen.primary, coat=True
    )
    eyes(pen, -0.54, 0.22, 0.1)
    for s in SIDES:
        pen.shape([(s * 0.13, -0.22), (s * 0.27, -0.24), (s * 0.24, 0.02)], WHITE)
    pen.limb([(0, -0.42), (0, -0.1), (0.02, 0.1), (0.14, 0.2), (0.27, 0.13)], 0.19, pen.primary)
    for y in (-0.28, -0.14, 0.0):
        pen.line([(-0.07, y), (0.07, y)], 0.03, pen.deep)


def octopus(pen: Pen) -> None:
    dome = mirrored((0, -0.98), (0.4, -0.9), (0.6, -0.56), (0.52, -0.24), (0.3, -0.04), (0, 0.0))
    pen.blob(dome, pen.primary, coat=True)
    for x, y, r in ((-0.28, -0.74, 0.09), (0.06, -0.82, 0.07), (0.32, -0.66, 0.06)):
        pen.oval(x, y, r, r, pen.secondary, rim=False)
    eyes(pen, -0.4, 0.23, 0.16)
    cheeks(pen, -0.18, 0.36)
    if pen.mood in ("happy", "angry"):
        mouth(pen, 0, -0.18, 0.12)
    else:
        pen.oval(0, -0.14, 0.07, 0.075, (150, 56, 70))


def peacock(pen: Pen) -> None:
    for x, y in ((-0.26, -0.86), (0, -0.93), (0.26, -0.86)):
        pen.line([(0.25 * x, -0.62), (x, y)], 0.045)
        pen.oval(x, y, 0.085, 0.085, pen.secondary)
    pen.limb([(0, -0.3), (0, 0.06)], 0.3, pen.primary)
    pen.blob(
        mirrored((0, -0.74), (0.26, -0.68), (0.34, -0.46), (0.24, -0.24), (0, -0.18)), pen.primary, coat=True
    )
    for s in SIDES:
        pen.oval(s * 0.16, -0.48, 0.14, 0.12, WHITE, rim=False)
    eyes(pen, -0.49, 0.16, 0.095)
    pen.shape([(-0.09, -0.4), (0.09, -0.4), (0, -0.22)], BEAK)


def mushroom(pen: Pen) -> None:
    cap = mirrored((0, -0.96), (0.4, -0.88), (0.7, -0.54), (0.8, -0.14), (0.44, -0.02), (0, 0.02))
    pen.blob(cap, pen.primary, coat=True)
    if pen.coat.pattern == "plain":
        for x, y, r in (
            (-0.46, -0.36, 0.13),
            (0.0, -0.66, 0.16),
            (0.44, -0.4, 0.14),
            (0.04, -0.2, 0.11),
            (-0.3, -0.7, 0.08),
        ):
            pen.oval(x, y, r, r * 0.9, CREAM, rim=False)


def house(pen: Pen) -> None:
    pen.shape([(-0.84, -0.08), (0, -0.94), (0.84, -0.08)], pen.secondary, coat=pen.coat.pattern != "plain")
    tile = mix(pen.secondary, INK, 0.25)
    for row, y in enumerate((-0.62, -0.42, -0.22)):
        reach = (y + 0.94) * 0.9
        pen.line([(-reach, y), (reach, y)], 0.035, tile)
        for k in range(-4, 5):
            x = (k + 0.5 * (row % 2)) * 0.26
            if abs(x) < reach - 0.05:
                pen.line([(x, y), (x, y + 0.16)], 0.035, tile)
    pen.limb([(-0.86, -0.08), (0.86, -0.08)], 0.09, mix(pen.secondary, WHITE, 0.3))
    pen.oval(0, -0.5, 0.13, 0.13, GLASS)
    pen.line([(-0.12, -0.5), (0.12, -0.5)], 0.035)
    pen.line([(0, -0.62), (0, -0.38)], 0.035)


def car(pen: Pen) -> None:
    cabin = [(-0.6, -0.04), (-0.46, -0.66), (-0.32, -0.76), (0.32, -0.76), (0.46, -0.66), (0.6, -0.04)]
    pen.shape(cabin, pen.primary, coat=True)
    pen.shape([(-0.48, -0.12), (-0.37, -0.6), (0.37, -0.6), (0.48, -0.12)], GLASS)
    pen.shape(
        [(-0.3, -0.16), (-0.12, -0.56), (0.04, -0.56), (-0.14, -0.16)], mix(GLASS, WHITE, 0.7), rim=False
    )
    pen.line([(-0.05, -0.12), (-0.34, -0.24)], 0.04)
    pen.line([(0.3, -0.12), (0.02, -0.24)], 0.04)


def cup(pen: Pen) -> None:
    for x in (-0.3, 0.0, 0.3):
        curl = [(x, -0.42), (x + 0.12, -0.54), (x - 0.02, -0.68), (x + 0.1, -0.8), (x + 0.02, -0.94)]
        pen.limb(curl, 0.1, (236, 240, 246))
    pen.oval(0, -0.2, 0.62, 0.2, mix(pen.primary, WHITE, 0.4), coat=True)
    pen.oval(0, -0.18, 0.5, 0.13, COFFEE)
    pen.oval(-0.12, -0.2, 0.16, 0.035, mix(COFFEE, WHITE, 0.5), rim=False)


def tree(pen: Pen) -> None:
    crown = (
        (0, -0.98),
        (0.36, -0.9),
        (0.52, -0.66),
        (0.8, -0.5),
        (0.82, -0.18),
        (0.52, 0.02),
        (0.22, -0.04),
        (0, 0.04),
    )
    pen.blob(mirrored(*crown), pen.primary, coat=True)
    for x, y in ((-0.42, -0.34), (0.06, -0.62), (0.4, -0.28), (-0.1, -0.2)):
        pen.line(arc(x, y - 0.1, 0.14, 0.12, 20, 160), 0.05, pen.deep)


def pineapple(pen: Pen) -> None:
    leaf = pen.secondary
    for tip, foot in (
        ((-0.66, -0.56), -0.2),
        ((0.66, -0.56), 0.2),
        ((-0.46, -0.82), -0.14),
        ((0.46, -0.82), 0.14),
    ):
        pen.blob(
            [
                (foot - 0.16, -0.04),
                (foot + (tip[0] - foot) * 0.6 - 0.1, tip[1] * 0.55),
                tip,
                (foot + 0.16, -0.04),
            ],
            leaf,
        )
    for tip, foot in (((-0.2, -0.96), -0.06), ((0.2, -0.96), 0.06), ((0, -0.8), 0.0)):
        pen.blob(
            [
                (foot - 0.16, 0.0),
                (tip[0] - 0.1, tip[1] * 0.5),
                tip,
                (tip[0] + 0.1, tip[1] * 0.5),
                (foot + 0.16, 0.0),
            ],
            leaf,
        )
    pen.line([(0, -0.66), (0, -0.1)], 0.04, mix(leaf, INK, 0.3))


def teapot(pen: Pen) -> None:
    pen.blob(
        [(-0.56, -0.04), (-0.42, -0.34), (0, -0.48), (0.42, -0.34), (0.56, -0.04), (0, 0.04)],
        pen.primary,
        coat=True,
    )
    pen.oval(0, -0.06, 0.56, 0.09, pen.secondary)
    pen.limb([(0, -0.5), (0, -0.58)], 0.14, pen.secondary)
    pen.oval(0, -0.72, 0.18, 0.16, pen.secondary)
    pen.oval(-0.05, -0.77, 0.05, 0.04, WHITE, rim=False)


def guitar(pen: Pen) -> None:
    neck = pen.secondary
    pen.shape([(-0.14, 0.02), (-0.11, -0.62), (0.11, -0.62), (0.14, 0.02)], neck)
    for s in SIDES:
        for y in (-0.92, -0.78, -0.66):
            pen.limb([(s * 0.16, y), (s * 0.3, y)], 0.085, STEEL)
    pen.shape([(-0.2, -0.98), (0.2, -0.98), (0.16, -0.58), (-0.16, -0.58)], mix(pen.primary, neck, 0.4))
    for y in (-0.5, -0.36, -0.22, -0.08):
        pen.line([(-0.12, y), (0.12, y)], 0.035, STEEL)
    for x in (-0.05, 0.05):
        pen.line([(x, -0.86), (x, 0.0)], 0.02, CREAM)


def rocket(pen: Pen) -> None:
    cone = mirrored((0, -0.99), (0.2, -0.76), (0.36, -0.4), (0.42, -0.04), (0, 0.02))
    pen.blob(cone, pen.secondary, coat=True)
    pen.limb([(-0.4, -0.08), (0.4, -0.08)], 0.1, STEEL)
    pen.limb([(0, -0.99), (0, -0.94)], 0.09, GOLD)
    pen.line([(-0.14, -0.66), (-0.24, -0.34)], 0.06, mix(pen.secondary, WHITE, 0.5))


def cactus(pen: Pen) -> None:
    pen.blob(
        mirrored((0, -0.72), (0.24, -0.66), (0.36, -0.4), (0.36, -0.02), (0, 0.04)), pen.primary, coat=True
    )
    for x in (-0.18, 0.0, 0.18):
        pen.line([(x, -0.56), (x, -0.04)], 0.035, pen.deep)
    for x, y in ((0, -0.96), (0.17, -0.84), (0.11, -0.66), (-0.11, -0.66), (-0.17, -0.84)):
        pen.oval(x, y + 0.02, 0.115, 0.115, (246, 116, 160))
    pen.oval(0, -0.79, 0.1, 0.1, GOLD)


def lamp(pen: Pen) -> None:
    pen.oval(0, -0.04, 0.26, 0.12, (255, 250, 214))
    pen.shape([(-0.36, -0.92), (0.36, -0.92), (0.72, -0.1), (-0.72, -0.1)], pen.primary, coat=True)
    trim = mix(pen.primary, INK, 0.3)
    pen.limb([(-0.7, -0.11), (0.7, -0.11)], 0.075, trim)
    pen.limb([(-0.36, -0.9), (0.36, -0.9)], 0.065, trim)
    for x in (-0.2, 0.2):
        pen.line([(x, -0.84), (2 * x, -0.18)], 0.035, mix(pen.primary, WHITE, 0.5))


def boat(pen: Pen) -> None:
    pen.limb([(0, -0.94), (0, 0.0)], 0.1, WOOD)
    pen.blob(
        [(0.05, -0.97), (0.26, -0.9), (0.48, -0.95), (0.44, -0.74), (0.24, -0.7), (0.05, -0.76)],
        (226, 70, 66),
    )
    pen.shape([(-0.2, -0.5), (0.2, -0.5), (0.15, -0.32), (-0.15, -0.32)], mix(WOOD, CREAM, 0.25))
    pen.limb([(-0.22, -0.5), (0.22, -0.5)], 0.075, WOOD)
    for s in SIDES:
        pen.line([(s * 0.14, -0.36), (s * 0.26, -0.06)], 0.04, mix(WOOD, INK, 0.4))


def robot(pen: Pen) -> None:
    pen.line([(0, -0.74), (0, -0.88)], 0.07)
    pen.oval(0, -0.92, 0.085, 0.085, (240, 84, 80))
    for s in SIDES:
        pen.shape(box(min(s * 0.48, s * 0.6), -0.52, max(s * 0.48, s * 0.6), -0.28), STEEL)
    pen.shape(box(-0.48, -0.74, 0.48, -0.06), pen.primary, coat=True)
    pen.shape(box(-0.36, -0.62, 0.36, -0.18), (48, 62, 84))
    for s in SIDES:
        pen.oval(s * 0.17, -0.45, 0.085, 0.1, pen.secondary, rim=False)
    pen.line([(-0.16, -0.27), (0.16, -0.27)], 0.06, pen.secondary)
    for x in (-0.08, 0.0, 0.08):
        pen.line([(x, -0.31), (x, -0.23)], 0.03, (48, 62, 84))


def windmill(pen: Pen) -> None:
    pen.blob(
        [
            (-0.5, -0.02),
            (-0.46, -0.36),
            (-0.24, -0.64),
            (0, -0.72),
            (0.24, -0.64),
            (0.46, -0.36),
            (0.5, -0.02),
        ],
        pen.secondary,
        coat=True,
    )
    pen.limb([(-0.48, -0.05), (0.48, -0.05)], 0.08, CREAM)
    pen.oval(0, -0.38, 0.15, 0.15, WOOD)
    pen.oval(0, -0.38, 0.06, 0.06, GOLD, rim=False)


def sunflower(pen: Pen) -> None:
    for k in range(12):
        ((x, y),) = {arc(0, -0.46, 0.4, 0.36, 30 * k, 30 * k, 1)[0]}
        pen.oval(x, y, 0.2, 0.11, pen.primary, tilt=30 * k)
    pen.oval(0, -0.46, 0.31, 0.28, (130, 82, 50), coat=True)
    seed = (92, 58, 40)
    for offset in (-0.2, 0.0, 0.2):
        for s in SIDES:
            pen.line(
                [(-0.17 + offset * 0.6, -0.46 - s * 0.16), (0.17 + offset * 0.6, -0.46 + s * 0.16)],
                0.03,
                seed,
            )


def clock(pen: Pen) -> None:
    for s in SIDES:
        pen.oval(s * 0.36, -0.5, 0.27, 0.2, GOLD, tilt=s * 32)
        pen.oval(s * 0.36 - 0.08, -0.58, 0.06, 0.04, WHITE, tilt=s * 32, rim=False)
    pen.limb([(0, -0.2), (0, -0.64)], 0.09, STEEL)
    pen.oval(0, -0.7, 0.12, 0.1, STEEL)
    pen.line(arc(0, -0.66, 0.3, 0.28, 190, 350), 0.075)
    pen.blob(
        [(-0.5, -0.04), (-0.36, -0.28), (0, -0.36), (0.36, -0.28), (0.5, -0.04), (0, 0.02)],
        pen.primary,
        coat=True,
    )


HEADS: dict[str, Callable[[Pen], None]] = {
    "owl": owl, "snail": snail, "frog": frog, "cat": cat, "fish": fish, "turtle": turtle, "bee": bee, "pig": pig,
    "rabbit": rabbit, "penguin": penguin, "butterfly": butterfly, "crab": crab, "lion": lion, "elephant": elephant,
    "octopus": octopus, "peacock": peacock, "mushroom": mushroom, "house": house, "car": car, "cup": cup, "tree": tree,
    "pineapple": pineapple, "teapot": teapot, "guitar": guitar, "rocket": rocket, "cactus": cactus, "lamp": lamp,
    "boat": boat, "robot": robot, "windmill": windmill, "sunflower": sunflower, "clock": clock,
}  # fmt: skip

TOPS: dict[str, tuple[float, float]] = {
    "owl": (-0.82, 0.36), "snail": (-0.54, 0.28), "frog": (-0.66, 0.34), "cat": (-0.76, 0.36), "fish": (-0.74, 0.34),
    "turtle": (-0.8, 0.3), "bee": (-0.74, 0.34), "pig": (-0.78, 0.36), "rabbit": (-0.62, 0.3), "penguin": (-0.84, 0.34),
    "butterfly": (-0.54, 0.26), "crab": (-0.44, 0.3), "lion": (-0.84, 0.36), "elephant": (-0.8, 0.34),
    "octopus": (-0.92, 0.36), "peacock": (-0.68, 0.26), "mushroom": (-0.9, 0.34), "house": (-0.86, 0.3),
    "car": (-0.74, 0.36), "cup": (-0.34, 0.4), "tree": (-0.92, 0.34), "pineapple": (-0.84, 0.28),
    "teapot": (-0.82, 0.26), "guitar": (-0.96, 0.26), "rocket": (-0.92, 0.24), "cactus": (-0.88, 0.28),
    "lamp": (-0.9, 0.36), "boat": (-0.9, 0.26), "robot": (-0.76, 0.36), "windmill": (-0.68, 0.32),
    "sunflower": (-0.84, 0.34), "clock": (-0.66, 0.34),
}  # fmt: skip
"""Where a hat sits on the head: its y and half width."""

EYES: dict[str, tuple[float, float]] = {
    "owl": (-0.47, 0.23), "snail": (-0.84, 0.3), "frog": (-0.72, 0.34), "cat": (-0.46, 0.23), "fish": (-0.5, 0.34),
"""Where glasses sit: their y and half distance; elsewhere, on tops without eyes, they sit as EYES_ELSEWHERE says."""
    "butterfly": (-0.36, 0.16), "crab": (-0.72, 0.27), "lion": (-0.5, 0.19), "elephant": (-0.54, 0.22),
    "octopus": (-0.4, 0.23), "peacock": (-0.49, 0.18), "robot": (-0.45, 0.19), "clock": (-0.5, 0.3),
}  # fmt: skip
"""Where glasses sit: their y and half distance; EYES_ELSEWHERE for tops without eyes."""
EYES_ELSEWHERE = (-0.3, 0.22)
