"""What every kind has besides: wings, tails, shells, handles; `w` is half the width of the body it is fixed to."""

from collections.abc import Callable

from pixrl.toy.drawing.heads import CREAM, GOLD, STEEL, WOOD
from pixrl.toy.drawing.pen import INK, SIDES, WHITE, Pen, arc, mirrored, mix, spiral
from pixrl.toy.vocabulary import RGB

WING: RGB = (214, 238, 250)


def owl(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (w - 0.04)
        pen.blob(
            [(x, -0.12), (x + s * 0.3, 0.04), (x + s * 0.36, 0.34), (x + s * 0.18, 0.6), (x - s * 0.04, 0.4)],
            pen.deep,
            coat=True,
        )
        for y in (0.12, 0.27, 0.42):
            pen.line(arc(x + s * 0.17, y - 0.06, 0.11, 0.12, 20, 160, 6), 0.045, mix(pen.primary, WHITE, 0.3))


def snail(pen: Pen, w: float) -> None:
    x, y, r = -w - 0.2, 0.1, 0.5
    pen.oval(x + 0.0, y, r, r, pen.secondary, coat=pen.coat.pattern != "plain")
    pen.line(spiral(x, y, r * 0.86, 2.2, 20), 0.085, mix(pen.secondary, INK, 0.45))


def frog(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (w - 0.06)
        pen.limb([(x, 0.14), (x + s * 0.24, 0.24), (x + s * 0.32, 0.0)], 0.14, pen.primary)
        for tip in ((0.14, -0.2), (0.34, -0.28), (0.5, -0.14)):
            pen.limb([(x + s * 0.32, 0.0), (x + s * tip[0], tip[1])], 0.075, pen.primary)
            pen.oval(x + s * tip[0], tip[1], 0.075, 0.075, mix(pen.primary, pen.secondary, 0.5))


def cat(pen: Pen, w: float) -> None:
    tail = [(w - 0.1, 0.5), (w + 0.22, 0.52), (w + 0.36, 0.28), (w + 0.22, 0.04), (w + 0.34, -0.18)]
    pen.limb(tail, 0.19, pen.primary)
    pen.limb(tail[-1:] * 2, 0.19, pen.secondary)
    for a, b in (((0.27, 0.38), (0.43, 0.42)), ((0.22, 0.16), (0.38, 0.12))):
        pen.line([(w + a[0], a[1]), (w + b[0], b[1])], 0.06, pen.deep)


def fish(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (w - 0.1)
        pen.shape(
            [
                (x, 0.0),
                (x + s * 0.52, -0.2),
                (x + s * 0.46, 0.02),
                (x + s * 0.56, 0.2),
                (x + s * 0.4, 0.32),
                (x + s * 0.38, 0.52),
                (x, 0.36),
            ],
            pen.deep,
        )
        for tip in ((0.42, -0.08), (0.46, 0.2), (0.3, 0.4)):
            pen.line([(x + s * 0.08, 0.16), (x + s * tip[0], tip[1])], 0.04, pen.light)


def turtle(pen: Pen, w: float) -> None:
    shell = mix(pen.primary, (96, 74, 48), 0.55)
    pen.blob(mirrored((0, -0.42), (w + 0.12, -0.26), (w + 0.34, 0.16), (w + 0.2, 0.54), (0, 0.7)), shell)
    plate = mix(shell, WHITE, 0.3)
    for s in SIDES:
        for y in (-0.1, 0.16, 0.4):
            pen.oval(s * (w + 0.16 + 0.06 * (y == 0.16)), y, 0.1, 0.1, plate, rim=False)


def bee(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (w - 0.14)
        pen.oval(x + s * 0.34, -0.04, 0.4, 0.22, WING, tilt=s * -36)
        pen.oval(x + s * 0.3, 0.26, 0.28, 0.14, WING, tilt=s * 8)
        pen.line([(x, 0.12), (x + s * 0.5, -0.16)], 0.035, (156, 196, 220))


def pig(pen: Pen, w: float) -> None:
    x, y = w + 0.18, 0.2
    pen.limb([(w - 0.1, 0.36), *spiral(x, y, 0.17, 1.1, 90, 18)[::-1], (x + 0.22, y - 0.22)], 0.12, pen.deep)


def rabbit(pen: Pen, w: float) -> None:
    x, y = w + 0.16, 0.42
    for k in range(7):
        (px, py) = arc(x, y, 0.16, 0.16, 51 * k, 51 * k, 1)[0]
        pen.oval(px, py, 0.12, 0.12, pen.secondary)
    pen.oval(x, y, 0.19, 0.19, pen.secondary, rim=False)


def penguin(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (w - 0.06)
        pen.blob(
            [(x, -0.1), (x + s * 0.22, 0.06), (x + s * 0.4, 0.42), (x + s * 0.34, 0.5), (x + s * 0.04, 0.3)],
            pen.deep,
            coat=True,
        )


def butterfly(pen: Pen, w: float) -> None:
    for s in SIDES:
        upper = [
            (s * 0.05, 0.16),
            (s * 0.2, -0.3),
            (s * 0.66, -0.6),
            (s * 0.97, -0.46),
            (s * 0.94, -0.06),
            (s * 0.5, 0.2),
        ]
        lower = [
            (s * 0.05, 0.1),
            (s * 0.5, 0.14),
            (s * 0.82, 0.3),
            (s * 0.74, 0.62),
            (s * 0.36, 0.6),
            (s * 0.1, 0.42),
        ]
        for wing in (lower, upper):
            pen.blob(wing, pen.primary, coat=True)
        pen.oval(s * 0.72, -0.26, 0.15, 0.16, pen.secondary)
        pen.oval(s * 0.58, 0.4, 0.1, 0.1, pen.secondary)
        for x, y in ((0.87, -0.02), (0.48, -0.36)):
            pen.oval(s * x, y, 0.04, 0.04, WHITE, rim=False)


def crab(pen: Pen, w: float) -> None:
    for s in SIDES:
        reach = min(w + 0.16, 0.8)
        pen.limb([(s * (w - 0.12), 0.14), (s * (reach + 0.06), 0.06), (s * reach, -0.24)], 0.14, pen.primary)
        claw = [
            (reach - 0.16, -0.24),
            (reach - 0.2, -0.56),
            (reach - 0.06, -0.8),
            (reach - 0.01, -0.5),
            (reach + 0.13, -0.74),
            (reach + 0.19, -0.44),
            (reach + 0.1, -0.22),
        ]
        pen.shape([(s * x, y) for x, y in claw], pen.primary, coat=True)


def lion(pen: Pen, w: float) -> None:
    pen.limb([(w - 0.1, 0.44), (w + 0.26, 0.5), (w + 0.38, 0.22), (w + 0.3, 0.0)], 0.1, pen.primary)
    x, y = w + 0.3, -0.1
    pen.blob(
        [
            (x - 0.12, y + 0.12),
            (x - 0.2, y - 0.08),
            (x - 0.04, y - 0.28),
            (x + 0.16, y - 0.14),
            (x + 0.14, y + 0.1),
        ],
        pen.secondary,
    )


def elephant(pen: Pen, w: float) -> None:
    pen.limb([(-w + 0.1, 0.2), (-w - 0.18, 0.3), (-w - 0.24, 0.56)], 0.1, pen.primary)
    x, y = -w - 0.24, 0.62
    pen.shape(
        [
            (x - 0.05, y - 0.06),
            (x + 0.06, y - 0.06),
            (x + 0.13, y + 0.2),
            (x, y + 0.14),
            (x - 0.13, y + 0.22),
        ],
        (84, 88, 110),
    )


def octopus(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (w - 0.08)
        arm = [(x, 0.2), (x + s * 0.3, 0.3), (x + s * 0.46, 0.04), (x + s * 0.34, -0.2), (x + s * 0.2, -0.1)]
        pen.limb(arm, 0.17, pen.primary)
        for px, py in ((0.26, 0.28), (0.43, 0.08), (0.36, -0.14)):
            pen.oval(x + s * px, py, 0.05, 0.05, pen.secondary, rim=False)


def peacock(pen: Pen, w: float) -> None:
    for ring, (reach, count, size) in enumerate(((0.86, 9, 0.15), (0.62, 6, 0.12))):
        for k in range(count):
            angle = 190 + 160 * k / (count - 1)
            x, y = arc(0, 0.3, reach, reach, angle, angle, 1)[0]
            pen.limb([(0, 0.34), (x, y)], 0.12, pen.secondary if ring else mix(pen.secondary, INK, 0.15))
            pen.oval(x, y, size, size, pen.secondary)
            pen.oval(x, y, size * 0.6, size * 0.6, GOLD, rim=False)
            pen.oval(x, y, size * 0.34, size * 0.34, pen.deep, rim=False)


def mushroom(pen: Pen, w: float) -> None:
    x = w + 0.26
    pen.shape([(x - 0.09, 0.4), (x + 0.09, 0.4), (x + 0.12, 0.84), (x - 0.12, 0.84)], CREAM)
    pen.blob(
        [(x - 0.28, 0.46), (x - 0.2, 0.2), (x, 0.1), (x + 0.2, 0.2), (x + 0.28, 0.46), (x, 0.5)],
        pen.primary,
        coat=True,
    )
    for px, py in ((-0.1, 0.3), (0.11, 0.36)):
        pen.oval(x + px, py, 0.055, 0.05, CREAM, rim=False)


def house(pen: Pen, w: float) -> None:
    brick = mix(pen.secondary, (120, 90, 90), 0.3)
    for x, y, r in ((0.74, -0.9, 0.1), (0.6, -0.8, 0.12)):
        pen.oval(x, y, r, r * 0.8, (226, 228, 236))
    pen.shape([(0.38, 0.0), (0.38, -0.62), (0.68, -0.62), (0.68, 0.2)], brick)
    pen.limb([(0.36, -0.62), (0.7, -0.62)], 0.1, mix(brick, WHITE, 0.25))
    for x, y in ((0.46, -0.44), (0.6, -0.32), (0.47, -0.2), (0.6, -0.06)):
        pen.line([(x - 0.05, y), (x + 0.05, y)], 0.04, mix(brick, INK, 0.35))


def car(pen: Pen, w: float) -> None:
    wing = mix(pen.primary, INK, 0.12)
    for s in SIDES:
        pen.shape([(s * 0.34, -0.3), (s * 0.46, -0.3), (s * 0.56, 0.1), (s * 0.4, 0.1)], STEEL)
        pen.shape([(s * 0.8, -0.54), (s * 0.94, -0.54), (s * 0.94, -0.1), (s * 0.8, -0.1)], wing)
    pen.shape([(-0.88, -0.42), (0.88, -0.42), (0.88, -0.24), (-0.88, -0.24)], wing, coat=True)
    pen.line([(-0.72, -0.34), (0.72, -0.34)], 0.05, mix(pen.primary, WHITE, 0.6))


def cup(pen: Pen, w: float) -> None:
    pen.limb(
        [(w - 0.1, 0.02), (w + 0.2, -0.02), (w + 0.34, 0.18), (w + 0.22, 0.4), (w - 0.14, 0.46)],
        0.15,
        pen.primary,
    )


def tree(pen: Pen, w: float) -> None:
    for s, y in ((-1, 0.3), (1, 0.16)):
        x = s * (w + 0.42)
        pen.limb([(s * (w - 0.1), y + 0.16), (s * (w + 0.2), y + 0.1), (x, y - 0.06)], 0.12, pen.secondary)
        pen.blob(
            [
                (x - 0.22, y),
                (x - 0.18, y - 0.24),
                (x, y - 0.32),
                (x + 0.18, y - 0.24),
                (x + 0.22, y),
                (x, y + 0.08),
            ],
            pen.primary,
            coat=True,
        )


def pineapple(pen: Pen, w: float) -> None:
    for s in SIDES:
        for tip, mid in (
            ((0.5, -0.22), (0.24, -0.06)),
            ((0.56, 0.16), (0.28, 0.12)),
            ((0.46, 0.46), (0.22, 0.28)),
        ):
            x = s * (w - 0.12)
            pen.blob(
                [
                    (x, mid[1] + 0.06),
                    (x + s * mid[0], mid[1] - 0.08),
                    (x + s * tip[0], tip[1]),
                    (x + s * mid[0], mid[1] + 0.16),
                    (x, mid[1] + 0.24),
                ],
                pen.secondary,
            )


def teapot(pen: Pen, w: float) -> None:
    pen.limb(
        [(-w + 0.1, 0.02), (-w - 0.2, 0.0), (-w - 0.28, 0.2), (-w - 0.18, 0.42), (-w + 0.12, 0.46)],
        0.14,
        pen.secondary,
    )
    spout = [
        (w - 0.14, 0.16),
        (w + 0.1, 0.1),
        (w + 0.14, -0.14),
        (w + 0.34, -0.2),
        (w + 0.26, 0.16),
        (w + 0.14, 0.4),
        (w - 0.14, 0.52),
    ]
    pen.blob(spout, pen.primary, coat=True)


def guitar(pen: Pen, w: float) -> None:
    strap = [(-0.1, -0.5), (-w - 0.1, -0.4), (-w - 0.36, 0.04), (-w - 0.3, 0.46), (-w + 0.06, 0.66)]
    pen.limb(strap, 0.19, (214, 72, 92))
    pen.line(strap, 0.045, GOLD)


def rocket(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (w - 0.08)
        pen.shape(
            [(x, 0.04), (x + s * 0.42, 0.4), (x + s * 0.46, 0.82), (x + s * 0.2, 0.66), (x, 0.62)],
            pen.secondary,
            coat=True,
        )
        pen.line([(x + s * 0.12, 0.3), (x + s * 0.34, 0.56)], 0.05, mix(pen.secondary, WHITE, 0.5))


def cactus(pen: Pen, w: float) -> None:
    for s, low, high in ((-1, 0.3, -0.16), (1, 0.14, -0.34)):
        x = s * (w + 0.3)
        pen.limb([(s * (w - 0.1), low), (x - s * 0.06, low), (x, low - 0.08), (x, high)], 0.24, pen.primary)
        for y in (high + 0.04, high + 0.2):
            pen.line([(x - 0.055, y - 0.05), (x, y), (x + 0.055, y - 0.05)], 0.035, CREAM)


def lamp(pen: Pen, w: float) -> None:
    cord = [(-w + 0.1, 0.5), (-w - 0.16, 0.6), (-w - 0.34, 0.44), (-w - 0.22, 0.26), (-w - 0.36, 0.08)]
    pen.limb(cord, 0.085, (96, 90, 104))
    x, y = cord[-1]
    pen.shape([(x - 0.13, y), (x + 0.13, y), (x + 0.13, y - 0.2), (x - 0.13, y - 0.2)], (240, 240, 244))
    for px in (-0.065, 0.065):
        pen.limb([(x + px, y - 0.22), (x + px, y - 0.34)], 0.055, STEEL)


def boat(pen: Pen, w: float) -> None:
    stripe = mix(pen.secondary, (226, 70, 66), 0.75)
    pen.blob(
        [(0.1, -0.84), (0.5, -0.74), (0.9, -0.36), (0.96, 0.06), (0.5, 0.0), (0.1, 0.06)],
        pen.secondary,
        coat=pen.coat.pattern != "plain",
    )
    pen.blob(
        [(-0.1, -0.66), (-0.44, -0.6), (-0.76, -0.3), (-0.9, 0.06), (-0.5, 0.0), (-0.1, 0.06)],
        mix(pen.secondary, pen.primary, 0.25),
    )
    for y, start, end in ((-0.5, 0.12, 0.72), (-0.26, 0.12, 0.86)):
        pen.line([(start, y), (end, y)], 0.085, stripe)
        pen.line([(-start, y + 0.06), (-end + 0.12, y + 0.06)], 0.085, stripe)


def robot(pen: Pen, w: float) -> None:
    for s in SIDES:
        x = s * (w - 0.04)
        pen.limb([(x, 0.04), (x + s * 0.26, 0.1), (x + s * 0.26, 0.34)], 0.12, STEEL)
        pen.oval(x + s * 0.26, 0.1, 0.1, 0.1, pen.primary)
        cx, cy = x + s * 0.26, 0.5
        pen.limb(arc(cx, cy, 0.15, 0.15, 130, 410, 14), 0.1, pen.primary)


def windmill(pen: Pen, w: float) -> None:
    for k in range(4):
        angle = 45 + 90 * k
        x, y = arc(0, 0, 1, 1, angle, angle, 1)[0]
        cx, cy = 0.0, -0.12
        nx, ny = -y, x
        inner, outer, broad = 0.3, 1.12, 0.3
        sail = [
            (cx + x * inner, cy + y * inner * 0.72),
            (cx + x * outer, cy + y * outer * 0.72),
            (cx + x * outer + nx * broad, cy + (y * outer + ny * broad) * 0.72),
            (cx + x * inner + nx * broad, cy + (y * inner + ny * broad) * 0.72),
        ]
        pen.shape(sail, CREAM)
        for t in (0.45, 0.65, 0.85):
            r = inner + (outer - inner) * t
            pen.line(
                [
                    (cx + x * r, cy + y * r * 0.72),
                    (cx + x * r + nx * broad, cy + (y * r + ny * broad) * 0.72),
                ],
                0.035,
                WOOD,
            )
        pen.limb([(cx, cy), (cx + x * outer, cy + y * outer * 0.72)], 0.06, WOOD)


def sunflower(pen: Pen, w: float) -> None:
    for s, y in ((-1, 0.2), (1, 0.06)):
        x = s * (w - 0.04)
        pen.blob(
            [
                (x, y + 0.26),
                (x + s * 0.2, y - 0.02),
                (x + s * 0.56, y - 0.12),
                (x + s * 0.74, y + 0.02),
                (x + s * 0.5, y + 0.28),
                (x + s * 0.2, y + 0.36),
            ],
            pen.secondary,
            coat=pen.coat.pattern != "plain",
        )
        pen.line([(x + s * 0.08, y + 0.24), (x + s * 0.6, y + 0.04)], 0.045, mix(pen.secondary, INK, 0.35))


def clock(pen: Pen, w: float) -> None:
    pen.limb([(w - 0.1, 0.2), (w + 0.16, 0.2)], 0.11, STEEL)
    for s in SIDES:
        pen.oval(w + 0.24, 0.2 + s * 0.15, 0.14, 0.13, GOLD)
        pen.oval(w + 0.24, 0.2 + s * 0.15, 0.05, 0.045, mix(GOLD, INK, 0.6), rim=False)


EXTRAS: dict[str, Callable[[Pen, float], None]] = {
    "owl": owl, "snail": snail, "frog": frog, "cat": cat, "fish": fish, "turtle": turtle, "bee": bee, "pig": pig,
    "rabbit": rabbit, "penguin": penguin, "butterfly": butterfly, "crab": crab, "lion": lion, "elephant": elephant,
    "octopus": octopus, "peacock": peacock, "mushroom": mushroom, "house": house, "car": car, "cup": cup, "tree": tree,
    "pineapple": pineapple, "teapot": teapot, "guitar": guitar, "rocket": rocket, "cactus": cactus, "lamp": lamp,
    "boat": boat, "robot": robot, "windmill": windmill, "sunflower": sunflower, "clock": clock,
}  # fmt: skip

IN_FRONT = frozenset({"owl", "penguin", "robot", "frog", "crab", "octopus"})
"""Extras that lie before the body instead of behind it."""

REACH: dict[str, float] = {
    "owl": 0.33, "snail": 0.72, "frog": 0.56, "cat": 0.46, "fish": 0.47, "turtle": 0.35, "bee": 0.6, "pig": 0.41,
    "rabbit": 0.44, "penguin": 0.35, "lion": 0.47, "elephant": 0.38, "octopus": 0.5, "mushroom": 0.55, "cup": 0.42,
    "tree": 0.65, "pineapple": 0.45, "teapot": 0.37, "guitar": 0.46, "rocket": 0.4, "cactus": 0.43, "lamp": 0.5,
    "robot": 0.47, "sunflower": 0.72, "clock": 0.39,
}  # fmt: skip
"""How far these reach beyond the body's side; beside wide bodies they are fixed further in, to stay in the frame."""
