"""Eyes and mouths, which show the mood."""

from pixrl.toy.drawing.pen import INK, SIDES, WHITE, Pen, arc, mix
from pixrl.toy.vocabulary import RGB

BLUSH: RGB = (250, 150, 150)
MOUTH: RGB = (150, 56, 70)


def eyes(pen: Pen, y: float, spread: float, radius: float, *, white: RGB = WHITE) -> None:
    """A pair of eyes beside x = 0: open, or as the mood has them."""
    for side in SIDES:
        eye(pen, side * spread, y, radius, side, white=white)


def eye(pen: Pen, x: float, y: float, radius: float, side: int, *, white: RGB = WHITE) -> None:
    """One eye; `side` is -1 for the left one, whose brow slants the other way."""
    if pen.mood == "happy":
        pen.line(arc(x, y + 0.3 * radius, radius * 0.9, radius, 190, 350), 0.075)
        return
    pen.oval(x, y, radius, radius, white)
    pen.oval(x - 0.08 * side * radius, y + 0.08 * radius, radius * 0.62, radius * 0.66, INK, rim=False)
    pen.oval(x + 0.14 * radius, y - 0.24 * radius, radius * 0.24, radius * 0.24, WHITE, rim=False)
    if pen.mood == "sleepy":
        lid = mix(pen.primary, INK, 0.2)
        pen.shape(arc(x, y, radius, radius, 175, 365), lid)
        pen.line([(x - radius, y + 0.1 * radius), (x + radius, y + 0.1 * radius)], 0.07)
    elif pen.mood == "angry":
        slant = [(x - side * 1.15 * radius, y - 0.1 * radius), (x + side * 1.15 * radius, y - 1.05 * radius)]
        pen.shape([*slant, (x, y - 1.3 * radius)], mix(pen.primary, INK, 0.35), rim=False)
        pen.line(slant, 0.1)


def mouth(pen: Pen, x: float, y: float, width: float, thickness: float = 0.055) -> None:
    """A mouth of that half width whose corners lie at y."""
    if pen.mood == "happy":
        pen.shape([*arc(x, y, width, width * 0.85, 0, 180), (x - width, y)], MOUTH)
        pen.oval(x, y + 0.55 * width, width * 0.5, width * 0.22, (240, 120, 130), rim=False)
    elif pen.mood == "angry":
        pen.line(arc(x, y + 0.5 * width, width * 0.9, width * 0.55, 200, 340), thickness)
    elif pen.mood == "sleepy":
        pen.oval(x, y + 0.3 * width, width * 0.34, width * 0.42, MOUTH)
    else:
        pen.line(arc(x, y - 0.1 * width, width, width * 0.6, 20, 160), thickness)


def cheeks(pen: Pen, y: float, spread: float, radius: float = 0.075) -> None:
    """Two rosy spots."""
    for side in SIDES:
        pen.oval(side * spread, y, radius * 1.2, radius * 0.8, mix(pen.primary, BLUSH, 0.7), rim=False)
