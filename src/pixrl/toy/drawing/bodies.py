"""The bodies of all kinds, from the neck at y = -0.2 to the hip at y = 0.64."""

from collections.abc import Callable

from pixrl.toy.drawing.heads import CREAM, GLASS, GOLD, STEEL, WOOD
from pixrl.toy.drawing.pen import INK, SIDES, WHITE, Pen, arc, box, mirrored, mix

WIDTHS: dict[str, float] = {
    "owl": 0.48, "snail": 0.3, "frog": 0.46, "cat": 0.38, "fish": 0.46, "turtle": 0.44, "bee": 0.44, "pig": 0.54,
    "rabbit": 0.38, "penguin": 0.5, "butterfly": 0.2, "crab": 0.64, "lion": 0.42, "elephant": 0.58, "octopus": 0.4,
    "peacock": 0.4, "mushroom": 0.3, "house": 0.62, "car": 0.7, "cup": 0.56, "tree": 0.24, "pineapple": 0.46,
    "teapot": 0.62, "guitar": 0.46, "rocket": 0.42, "cactus": 0.36, "lamp": 0.36, "boat": 0.66, "robot": 0.5,
    "windmill": 0.44, "sunflower": 0.14, "clock": 0.58,
}  # fmt: skip
"""Half of a body's width where things are fixed to its sides."""


def _pear(pen: Pen, shoulder: float, belly: float) -> None:
    """The coated trunk that most animals share."""
    outline = mirrored((0, -0.24), (shoulder, -0.16), (belly, 0.26), (belly * 0.82, 0.58), (0, 0.68))
    pen.blob(outline, pen.primary, coat=True)


def owl(pen: Pen) -> None:
    _pear(pen, 0.38, 0.5)
    pen.oval(0, 0.28, 0.36, 0.36, pen.secondary, rim=False)
    feather = mix(pen.secondary, pen.primary, 0.75)
    for y, xs in ((0.1, (-0.14, 0.14)), (0.28, (-0.24, 0.0, 0.24)), (0.46, (-0.14, 0.14))):
        for x in xs:
            pen.line([(x - 0.08, y - 0.04), (x, y + 0.05), (x + 0.08, y - 0.04)], 0.05, feather)


def snail(pen: Pen) -> None:
    pen.blob(
        [(-0.26, -0.22), (0.26, -0.22), (0.34, 0.2), (0.32, 0.66), (-0.42, 0.66), (-0.34, 0.2)],
        pen.primary,
        coat=True,
    )
    fold = mix(pen.primary, INK, 0.2)
    for y in (0.06, 0.22, 0.38, 0.54):
        pen.line(arc(0, y - 0.06, 0.22, 0.09, 20, 160), 0.05, fold)


def frog(pen: Pen) -> None:
    _pear(pen, 0.32, 0.48)
    pen.oval(0, 0.28, 0.32, 0.34, pen.secondary, rim=False)
    for s in SIDES:
        pen.oval(s * 0.38, 0.06, 0.06, 0.06, pen.deep, rim=False)
        pen.oval(s * 0.42, 0.34, 0.045, 0.045, pen.deep, rim=False)


def cat(pen: Pen) -> None:
    _pear(pen, 0.3, 0.4)
    pen.blob([(-0.2, -0.1), (0.2, -0.1), (0.18, 0.2), (0, 0.36), (-0.18, 0.2)], pen.secondary, rim=False)
    for s in SIDES:
        for y in (0.28, 0.42):
            pen.line([(s * 0.38, y), (s * 0.22, y + 0.04)], 0.05, pen.deep)


def fish(pen: Pen) -> None:
    pen.blob(
        mirrored((0, -0.26), (0.4, -0.1), (0.48, 0.2), (0.28, 0.52), (0.12, 0.68)), pen.primary, coat=True
    )
    scale = mix(pen.primary, INK, 0.3)
    for row, y in enumerate((0.06, 0.2, 0.34, 0.48)):
        reach = 0.34 - 0.06 * row
        for x in (-0.24, -0.08, 0.08, 0.24) if row % 2 else (-0.16, 0.0, 0.16):
            if abs(x) <= reach:
                pen.line(arc(x, y - 0.05, 0.09, 0.1, 15, 165, 6), 0.04, scale)


def turtle(pen: Pen) -> None:
    outline = mirrored((0, -0.24), (0.36, -0.14), (0.46, 0.2), (0.38, 0.56), (0, 0.68))
    pen.blob(outline, pen.secondary, coat=pen.coat.pattern != "plain")
    seam = mix(pen.secondary, INK, 0.35)
    pen.line([(0, -0.2), (0, 0.66)], 0.045, seam)
    for y, reach in ((0.04, 0.42), (0.24, 0.45), (0.44, 0.42)):
        pen.line([(-reach, y), (reach, y)], 0.045, seam)


def bee(pen: Pen) -> None:
    outline = mirrored((0, -0.24), (0.36, -0.14), (0.46, 0.2), (0.34, 0.54), (0, 0.68))
    pen.blob(outline, pen.primary, coat=True)
    band = (66, 56, 64)
    for y, reach, tall in ((0.02, 0.42, 0.14), (0.28, 0.45, 0.14), (0.52, 0.34, 0.1)):
        pen.shape(box(-reach, y - tall / 2, reach, y + tall / 2), band, rim=False)
    pen.line([(-0.3, -0.1), (-0.38, 0.14)], 0.05, mix(pen.primary, WHITE, 0.6))


def pig(pen: Pen) -> None:
    _pear(pen, 0.42, 0.56)
    pen.oval(0, 0.3, 0.34, 0.3, pen.secondary, rim=False)
    pen.line([(-0.05, 0.24), (0.05, 0.34)], 0.045, pen.deep)
    pen.line([(0.05, 0.24), (-0.05, 0.34)], 0.045, pen.deep)


def rabbit(pen: Pen) -> None:
    _pear(pen, 0.28, 0.4)
    fluff = [
        (-0.26, 0.0),
        (-0.2, 0.16),
        (-0.24, 0.28),
        (-0.1, 0.32),
        (0, 0.46),
        (0.1, 0.32),
        (0.24, 0.28),
        (0.2, 0.16),
        (0.26, 0.0),
        (0, -0.12),
    ]
    pen.shape(fluff, pen.secondary, rim=False)
    pen.line(fluff[:-1], 0.035, pen.deep)


def penguin(pen: Pen) -> None:
    _pear(pen, 0.4, 0.52)
    pen.blob(mirrored((0, -0.14), (0.28, -0.04), (0.38, 0.3), (0.26, 0.56), (0, 0.62)), WHITE, rim=False)
    for s in SIDES:
        pen.shape([(0, 0.0), (s * 0.14, -0.07), (s * 0.14, 0.07)], (236, 92, 86))
    pen.oval(0, 0.0, 0.045, 0.045, (190, 60, 66))


def butterfly(pen: Pen) -> None:
    pen.blob(
        mirrored((0, -0.22), (0.16, -0.14), (0.2, 0.2), (0.13, 0.56), (0, 0.68)),
        mix(pen.primary, (120, 90, 80), 0.7),
        coat=True,
    )
    for y in (0.02, 0.18, 0.34, 0.5):
        pen.line([(-0.15, y), (0.15, y)], 0.06, pen.secondary)


def crab(pen: Pen) -> None:
    shell = mirrored((0, -0.22), (0.5, -0.14), (0.7, 0.16), (0.54, 0.48), (0.2, 0.6), (0, 0.62))
    pen.blob(shell, pen.primary, coat=True)
    for x, y, r in (
        (-0.34, 0.1, 0.07),
        (0.0, 0.06, 0.09),
        (0.34, 0.1, 0.07),
        (-0.18, 0.26, 0.05),
        (0.18, 0.26, 0.05),
    ):
        pen.oval(x, y, r, r * 0.8, pen.secondary, rim=False)
    pen.line(arc(0, 0.2, 0.46, 0.26, 20, 160), 0.045, pen.deep)


def lion(pen: Pen) -> None:
    _pear(pen, 0.34, 0.44)
    tuft = [(-0.24, -0.1), (-0.2, 0.12), (-0.1, 0.06), (0, 0.26), (0.1, 0.06), (0.2, 0.12), (0.24, -0.1)]
    pen.shape(tuft, pen.secondary)
    pen.oval(0, 0.44, 0.24, 0.16, mix(pen.primary, WHITE, 0.5), rim=False)


def elephant(pen: Pen) -> None:
    _pear(pen, 0.44, 0.6)
    pen.blob(mirrored((0, 0.0), (0.4, 0.02), (0.56, 0.2), (0.5, 0.44), (0, 0.5)), pen.secondary)
    pen.limb([(-0.5, 0.43), (-0.26, 0.49), (0.0, 0.51), (0.26, 0.49), (0.5, 0.43)], 0.075, GOLD)
    pen.shape([(0, 0.1), (0.12, 0.25), (0, 0.4), (-0.12, 0.25)], GOLD)


def octopus(pen: Pen) -> None:
    pen.blob(
        mirrored((0, -0.24), (0.3, -0.16), (0.36, 0.16), (0.48, 0.56), (0, 0.68)), pen.primary, coat=True
    )
    for y, xs in ((0.08, (0.0,)), (0.28, (-0.14, 0.14)), (0.48, (-0.24, 0.0, 0.24))):
        for x in xs:
            pen.oval(x, y, 0.085, 0.085, pen.secondary)
            pen.oval(x, y, 0.035, 0.035, pen.deep, rim=False)


def peacock(pen: Pen) -> None:
    pen.blob(
        mirrored((0, -0.24), (0.2, -0.16), (0.42, 0.26), (0.32, 0.58), (0, 0.68)), pen.primary, coat=True
    )
    for row, (y, xs) in enumerate(
        ((0.04, (-0.1, 0.1)), (0.2, (-0.2, 0.0, 0.2)), (0.36, (-0.12, 0.12)), (0.5, (0.0,)))
    ):
        for x in xs:
            pen.line(
                [*arc(x, y - 0.04, 0.1, 0.12, 0, 180, 8)],
                0.05,
                pen.secondary if row % 2 else mix(pen.secondary, WHITE, 0.4),
            )


def mushroom(pen: Pen) -> None:
    pen.blob(
        [(-0.26, -0.2), (0.26, -0.2), (0.24, 0.2), (0.36, 0.64), (-0.36, 0.64), (-0.24, 0.2)],
        CREAM,
        coat=pen.coat.pattern != "plain",
    )
    skirt = mix(CREAM, (170, 130, 90), 0.35)
    pen.shape(
        [(-0.26, 0.04), (0.26, 0.04), (0.4, 0.2), (0.2, 0.17), (0, 0.24), (-0.2, 0.17), (-0.4, 0.2)], skirt
    )
    for x in (-0.12, 0.1):
        pen.line([(x, 0.34), (x * 1.3, 0.54)], 0.04, skirt)


def house(pen: Pen) -> None:
    pen.shape(box(-0.62, -0.18, 0.62, 0.68), pen.primary, coat=True)
    brick = mix(pen.primary, INK, 0.22)
    for x, y in ((-0.52, 0.5), (-0.3, 0.58), (0.44, 0.56), (0.0, -0.06), (0.52, 0.0), (-0.54, 0.02)):
        pen.line([(x - 0.07, y), (x + 0.07, y)], 0.045, brick)
    for s in SIDES:
        pen.shape(box(s * 0.32 - 0.17, 0.06, s * 0.32 + 0.17, 0.4), GLASS)
        pen.line([(s * 0.32, 0.06), (s * 0.32, 0.4)], 0.045)
        pen.line([(s * 0.32 - 0.17, 0.23), (s * 0.32 + 0.17, 0.23)], 0.045)
        pen.limb([(s * 0.32 - 0.2, 0.43), (s * 0.32 + 0.2, 0.43)], 0.065, pen.secondary)


def car(pen: Pen) -> None:
    hood = mirrored((0, -0.14), (0.52, -0.12), (0.72, 0.1), (0.74, 0.5), (0.6, 0.64), (0, 0.66))
    pen.blob(hood, pen.primary, coat=True)
    for s in SIDES:
        pen.oval(s * 0.48, 0.2, 0.17, 0.17, pen.secondary)
        pen.oval(s * 0.48, 0.2, 0.1, 0.1, GOLD, rim=False)
    pen.shape(box(-0.24, 0.14, 0.24, 0.42), (70, 74, 86))
    for y in (0.21, 0.28, 0.35):
        pen.line([(-0.2, y), (0.2, y)], 0.035, STEEL)
    pen.line([(-0.3, 0.0), (0.3, 0.0)], 0.04, pen.deep)


def cup(pen: Pen) -> None:
    bowl = mirrored((0, -0.1), (0.58, -0.2), (0.6, 0.04), (0.48, 0.46), (0.3, 0.68), (0, 0.7))
    pen.blob(bowl, pen.primary, coat=True)
    if pen.coat.pattern == "plain":
        pen.blob(
            [
                (0, 0.44),
                (-0.2, 0.22),
                (-0.16, 0.08),
                (-0.06, 0.08),
                (0, 0.15),
                (0.06, 0.08),
                (0.16, 0.08),
                (0.2, 0.22),
            ],
            pen.secondary,
        )
    pen.line([(-0.44, 0.1), (-0.38, 0.4)], 0.06, mix(pen.primary, WHITE, 0.7))


def tree(pen: Pen) -> None:
    bark = pen.secondary
    pen.shape([(-0.2, -0.2), (0.2, -0.2), (0.22, 0.3), (0.3, 0.66), (-0.3, 0.66), (-0.22, 0.3)], bark)
    line = mix(bark, INK, 0.35)
    pen.oval(0.02, 0.24, 0.09, 0.12, mix(bark, INK, 0.5))
    for x, y, z in ((-0.12, -0.02, 0.2), (0.12, -0.06, 0.06), (-0.14, 0.36, 0.54), (0.14, 0.44, 0.6)):
        pen.line([(x, y), (x, z)], 0.04, line)


def pineapple(pen: Pen) -> None:
    pen.blob(
        mirrored((0, -0.22), (0.36, -0.14), (0.5, 0.22), (0.36, 0.58), (0, 0.68)), pen.primary, coat=True
    )
    seam = mix(pen.primary, INK, 0.4)
    for s in SIDES:
        for a, b in (
            ((-0.44, 0.02), (0.3, 0.56)),
            ((-0.3, -0.14), (0.44, 0.4)),
            ((-0.06, -0.18), (0.47, 0.2)),
            ((-0.46, 0.26), (0.1, 0.64)),
        ):
            pen.line([(s * a[0], a[1]), (s * b[0], b[1])], 0.04, seam)


def teapot(pen: Pen) -> None:
    pen.blob(
        mirrored((0, -0.2), (0.44, -0.12), (0.66, 0.24), (0.46, 0.58), (0, 0.68)), pen.primary, coat=True
    )
    if pen.coat.pattern == "plain":
        for x, y in ((0, 0.08), (0.16, 0.2), (0.1, 0.38), (-0.1, 0.38), (-0.16, 0.2)):
            pen.oval(x, y, 0.1, 0.1, pen.secondary)
        pen.oval(0, 0.25, 0.085, 0.085, GOLD)
    pen.line([(-0.5, 0.1), (-0.46, 0.36)], 0.06, mix(pen.primary, WHITE, 0.6))


def guitar(pen: Pen) -> None:
    waist = mirrored((0, -0.22), (0.34, -0.2), (0.48, 0.06), (0.38, 0.34), (0.42, 0.66), (0, 0.68))
    pen.blob(waist, pen.primary, coat=True)
    pen.oval(0, 0.2, 0.2, 0.2, mix(pen.primary, CREAM, 0.6))
    pen.oval(0, 0.2, 0.14, 0.14, (70, 50, 48))
    for x in (-0.05, 0.05):
        pen.line([(x, -0.22), (x, 0.66)], 0.022, CREAM)


def rocket(pen: Pen) -> None:
    pen.blob(mirrored((0, -0.22), (0.4, -0.2), (0.44, 0.2), (0.36, 0.62), (0, 0.68)), pen.primary, coat=True)
    pen.oval(0, 0.12, 0.22, 0.22, STEEL)
    pen.oval(0, 0.12, 0.145, 0.145, (96, 160, 214))
    pen.line(arc(0, 0.12, 0.09, 0.09, 180, 270, 6), 0.045, WHITE)
    pen.line([(-0.3, 0.5), (0.3, 0.5)], 0.06, pen.secondary)


def cactus(pen: Pen) -> None:
    pen.blob(mirrored((0, -0.22), (0.34, -0.2), (0.38, 0.2), (0.34, 0.64), (0, 0.66)), pen.primary, coat=True)
    for x in (-0.2, 0.0, 0.2):
        pen.line([(x, -0.18), (x, 0.62)], 0.035, pen.deep)
    for x, y in ((-0.1, 0.0), (0.1, 0.12), (-0.1, 0.28), (0.1, 0.42), (-0.29, 0.14), (0.29, 0.3)):
        pen.line([(x - 0.055, y - 0.05), (x, y), (x + 0.055, y - 0.05)], 0.035, CREAM)


def lamp(pen: Pen) -> None:
    vase = pen.secondary
    pen.blob(
        mirrored((0, -0.2), (0.14, -0.18), (0.16, 0.0), (0.38, 0.22), (0.34, 0.48), (0.16, 0.66), (0, 0.68)),
        vase,
        coat=pen.coat.pattern != "plain",
    )
    glaze = mix(vase, WHITE, 0.65)
    pen.limb([(-0.34, 0.26), (0, 0.3), (0.34, 0.26)], 0.06, glaze)
    pen.limb([(-0.3, 0.46), (0, 0.5), (0.3, 0.46)], 0.06, glaze)


def boat(pen: Pen) -> None:
    hull = [(-0.78, -0.16), (0.78, -0.16), (0.7, 0.24), (0.5, 0.6), (0, 0.68), (-0.5, 0.6), (-0.7, 0.24)]
    pen.shape(hull, pen.primary, coat=True)
    pen.limb([(-0.78, -0.14), (0.78, -0.14)], 0.1, pen.secondary)
    for x in (-0.38, 0.0, 0.38):
        pen.oval(x, 0.16, 0.11, 0.11, STEEL)
        pen.oval(x, 0.16, 0.06, 0.06, (96, 160, 214), rim=False)
    pen.line([(-0.58, 0.4), (0.58, 0.4)], 0.06, pen.secondary)


def robot(pen: Pen) -> None:
    pen.shape(box(-0.5, -0.18, 0.5, 0.66), pen.primary, coat=True)
    pen.shape(box(-0.34, -0.04, 0.34, 0.26), (48, 62, 84))
    pen.line(
        [(-0.28, 0.12), (-0.14, 0.12), (-0.06, 0.0), (0.04, 0.22), (0.12, 0.12), (0.28, 0.12)],
        0.05,
        pen.secondary,
    )
    for x, colour in ((-0.24, (240, 84, 80)), (0.0, GOLD), (0.24, (100, 190, 110))):
        pen.oval(x, 0.45, 0.085, 0.085, colour)


def windmill(pen: Pen) -> None:
    pen.shape([(-0.38, -0.2), (0.38, -0.2), (0.52, 0.68), (-0.52, 0.68)], pen.primary, coat=True)
    stone = mix(pen.primary, INK, 0.22)
    for x, y in ((-0.24, -0.04), (0.26, 0.04), (-0.34, 0.3), (0.34, 0.36), (-0.3, 0.54), (0.2, 0.58)):
        pen.line([(x - 0.08, y), (x + 0.08, y)], 0.045, stone)
    pen.blob([(-0.13, 0.42), (-0.13, 0.14), (0, 0.02), (0.13, 0.14), (0.13, 0.42)], WOOD)
    pen.line([(0, 0.06), (0, 0.42)], 0.035, mix(WOOD, INK, 0.5))


def sunflower(pen: Pen) -> None:
    stem = pen.secondary
    pen.limb([(0, -0.2), (0.02, 0.2), (0, 0.64)], 0.22, stem)
    for y in (0.0, 0.22, 0.44):
        pen.line([(-0.06, y), (0.0, y + 0.07), (0.06, y)], 0.045, mix(stem, INK, 0.35))


def clock(pen: Pen) -> None:
    pen.oval(0, 0.22, 0.6, 0.47, pen.primary, coat=True)
    pen.oval(0, 0.22, 0.46, 0.36, pen.secondary)
    for k in range(12):
        a, b = arc(0, 0.22, 0.41, 0.315, 30 * k, 30 * k, 1)[0], arc(0, 0.22, 0.34, 0.26, 30 * k, 30 * k, 1)[0]
        pen.line([a, b], 0.05 if k % 3 == 0 else 0.03)
    pen.line([(0, 0.22), (0, -0.02)], 0.06)
    pen.line([(0, 0.22), (0.19, 0.32)], 0.06)
    pen.oval(0, 0.22, 0.05, 0.05, (226, 70, 66), rim=False)


BODIES: dict[str, Callable[[Pen], None]] = {
    "owl": owl, "snail": snail, "frog": frog, "cat": cat, "fish": fish, "turtle": turtle, "bee": bee, "pig": pig,
    "rabbit": rabbit, "penguin": penguin, "butterfly": butterfly, "crab": crab, "lion": lion, "elephant": elephant,
    "octopus": octopus, "peacock": peacock, "mushroom": mushroom, "house": house, "car": car, "cup": cup, "tree": tree,
    "pineapple": pineapple, "teapot": teapot, "guitar": guitar, "rocket": rocket, "cactus": cactus, "lamp": lamp,
    "boat": boat, "robot": robot, "windmill": windmill, "sunflower": sunflower, "clock": clock,
}  # fmt: skip
