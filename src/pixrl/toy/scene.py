"""This module knows what a scene is, how it is drawn, and how random ones are made.

Objects live in square boxes that keep MIN_GAP of each other, and everything drawn of an object, its
accessories too, stays in its box. So an object's mask is the ink inside its box.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixrl.toy.drawing.backgrounds import VARIANTS, backdrop
from pixrl.toy.drawing.pen import Coat
from pixrl.toy.drawing.sprites import draw_object
from pixrl.toy.vocabulary import (
    ACCESSORIES,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    NATURAL,
    PATTERNS,
    RELATIONS,
    RGB,
    Palette,
)

SUPERSAMPLE = 4
MARGIN = 0.01
MIN_GAP = 0.0625
CELL = (1 - 2 * MARGIN - MIN_GAP) / 2
SUBJECT_SEED = 20250

Point = tuple[float, float]
Masks = NDArray[np.bool_]


class Task(StrEnum):
    """A task is one of GenEval's six tags, or a picture of a subject (whose identity no caption tells)."""

    SINGLE_OBJECT = "single_object"
    TWO_OBJECT = "two_object"
    COUNTING = "counting"
    COLORS = "colors"
    POSITION = "position"
    COLOR_ATTR = "color_attr"
    SUBJECT = "subject"


@dataclass(frozen=True, slots=True)
class SceneObject:
    """A scene object is a kind with its looks, its place and its size, both as fractions of the picture's side.

    `accessory` is what captions mention, `own` what only the picture shows.
    """

    kind: str
    palette: Palette
    colour: str | None = None
    pattern: str = "plain"
    accessory: str | None = None
    own: str | None = None
    centre: Point = (0.5, 0.5)
    size: float = 0.7

    @property
    def worn(self) -> tuple[str, ...]:
        """Return the accessories that the picture shows, whether captions mention them or not."""
        return tuple(name for name in (self.accessory, self.own) if name is not None)


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene is a picture's content; in position scenes `relation` is that of the first object to the second."""

    objects: tuple[SceneObject, ...]
    background: str
    task: Task
    mentions_background: bool
    relation: str | None = None
    backdrop: int = 0


@dataclass(frozen=True, slots=True)
class ToySubject:
    """A toy subject is an individual: a kind with its own palette, pattern and perhaps an accessory it always has."""

    kind: str
    palette: Palette
    pattern: str = "plain"
    accessory: str | None = None


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Return the scene as an RGB picture of `size` pixels a side."""
    return _reduced(_paint(scene, size))


def masks(scene: Scene, size: int = 64) -> Masks:
    """Return the pixels of every object, accessories included: a boolean array [objects, size, size]."""
    return _split(scene, _paint(scene, size))


def render_with_masks(scene: Scene, size: int = 64) -> tuple[Image.Image, Masks]:
    """Return the RGB picture of the scene and its objects' pixels [objects, size, size]; the scene is drawn once."""
    painted = _paint(scene, size)
    return _reduced(painted), _split(scene, painted)


def _reduced(painted: Image.Image) -> Image.Image:
    # Without alpha first: PIL weights colours by alpha when it reduces, and the background's is 0.
    return painted.convert("RGB").reduce(SUPERSAMPLE)


def _paint(scene: Scene, size: int) -> Image.Image:
    side = size * SUPERSAMPLE
    image = backdrop(scene.background, side, scene.backdrop).copy()
    for thing in scene.objects:
        coat = Coat(thing.palette, thing.pattern)
        draw_object(
            image,
            thing.kind,
            coat,
            thing.worn,
            (thing.centre[0] * side, thing.centre[1] * side),
            thing.size * side,
        )
    return image


def _split(scene: Scene, painted: Image.Image) -> Masks:
    ink = np.asarray(painted.getchannel("A").reduce(SUPERSAMPLE)) >= 128
    found = np.zeros((len(scene.objects), *ink.shape), dtype=np.bool_)
    for mask, thing in zip(found, scene.objects, strict=True):
        reach = thing.size / 2
        left, right = (round((thing.centre[0] + sign * reach) * ink.shape[1]) for sign in (-1, 1))
        top, bottom = (round((thing.centre[1] + sign * reach) * ink.shape[0]) for sign in (-1, 1))
        window = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)
        mask[window] = ink[window]
    return found


def random_scene(rng: np.random.Generator, task: Task) -> Scene:
    """Return a random scene of a task; what its caption does not fix varies freely."""
    if task is Task.SUBJECT:
        return subject_scene(random_subject(rng), rng)
    relation = None
    if task in (Task.SINGLE_OBJECT, Task.COLORS):
        thing = _dressed(rng, _pick(rng, KINDS), named=task is Task.COLORS)
        pattern = _pick(rng, PATTERNS[1:]) if rng.random() < 0.3 else "plain"
        accessory = _pick(rng, ACCESSORIES) if rng.random() < 0.3 else None
        objects = [_placed(rng, replace(thing, pattern=pattern, accessory=accessory))]
    elif task is Task.COUNTING:
        objects = _counted(rng)
    else:
        objects, relation = _pair(rng, task)
    return _with_background(rng, objects, task, relation)


def _with_background(
    rng: np.random.Generator, objects: Sequence[SceneObject], task: Task, relation: str | None = None
) -> Scene:
    mentions = bool(rng.random() < 0.4)
    background = "plain" if not mentions and rng.random() < 0.5 else _pick(rng, BACKGROUNDS)
    return Scene(tuple(objects), background, task, mentions, relation, int(rng.integers(VARIANTS)))


def _counted(rng: np.random.Generator) -> list[SceneObject]:
    count = int(rng.choice((1, 2, 3, 4), p=(0.1, 0.3, 0.3, 0.3)))
    thing = _dressed(rng, _pick(rng, KINDS), named=False)
    if count == 1:
        return [_placed(rng, thing)]
    size = float(rng.uniform(0.39, 0.45) if count == 2 else rng.uniform(0.36, 0.42))
    if count == 2:
        return _spread(rng, [replace(thing, size=size)] * 2, axis=int(rng.integers(2)), sway=1.0)
    cells = [(x, y) for y in (0, 1) for x in (0, 1)]
    if count == 3:
        cells.pop(int(rng.integers(4)))
    placed = []
    for cell in cells:
        x, y = (MARGIN + k * (CELL + MIN_GAP) + size / 2 + float(rng.random()) * (CELL - size) for k in cell)
        placed.append(replace(thing, size=size, centre=(x, y)))
    if count == 3 and rng.random() < 0.5:
        # The object that has its row to itself moves to the middle of that row.
        lower = [thing.centre[1] > 0.5 for thing in placed]
        alone = lower.index(sum(lower) == 1)
        middle = float(rng.uniform(0.42, 0.58)), placed[alone].centre[1]
        placed[alone] = replace(placed[alone], centre=middle)
    return placed


def _pair(rng: np.random.Generator, task: Task) -> tuple[list[SceneObject], str | None]:
    kinds = [str(kind) for kind in rng.choice(KINDS, 2, replace=False)]
    named = task is Task.COLOR_ATTR
    things = [
        replace(_dressed(rng, kind, named=named), size=float(rng.uniform(0.40, 0.45))) for kind in kinds
    ]
    if named:
        for k, colour in enumerate(rng.choice(tuple(COLOURS), 2, replace=False)):
            things[k] = replace(things[k], colour=str(colour), palette=COLOURS[str(colour)])
    if task is not Task.POSITION:
        placed = _spread(rng, things, axis=int(rng.integers(2)), sway=1.0)
        return (placed if rng.random() < 0.5 else placed[::-1]), None
    relation = _pick(rng, RELATIONS)
    axis = 0 if relation in ("left of", "right of") else 1
    if relation in ("left of", "above"):
        return _spread(rng, things, axis, sway=0.08), relation
    return _spread(rng, things[::-1], axis, sway=0.08)[::-1], relation


def _spread(
    rng: np.random.Generator, things: Sequence[SceneObject], axis: int, sway: float
) -> list[SceneObject]:
    """Two objects one after the other along the axis; across it they stray by up to `sway` of the room."""
    first, second = things
    slack = 1 - 2 * MARGIN - MIN_GAP - first.size - second.size
    before, between = sorted(float(u) * slack for u in rng.random(2))
    start = MARGIN + before + first.size / 2
    along = (start, start + first.size / 2 + MIN_GAP + (between - before) + second.size / 2)
    common = float(rng.uniform(0.34, 0.66))
    placed = []
    for thing, place in zip(things, along, strict=True):
        low, high = MARGIN + thing.size / 2, 1 - MARGIN - thing.size / 2
        across = min(max(common + sway * float(rng.uniform(-0.5, 0.5)) * (high - low), low), high)
        placed.append(replace(thing, centre=(place, across) if axis == 0 else (across, place)))
    return placed


def _placed(rng: np.random.Generator, thing: SceneObject) -> SceneObject:
    size = float(rng.uniform(0.55, 0.80))
    low, high = MARGIN + size / 2, 1 - MARGIN - size / 2
    return replace(thing, size=size, centre=(float(rng.uniform(low, high)), float(rng.uniform(low, high))))


def _dressed(rng: np.random.Generator, kind: str, *, named: bool) -> SceneObject:
    """The kind in a colour the caption names, or in its natural palette half the time and any colour else."""
    if not named and rng.random() < 0.5:
        return SceneObject(kind, NATURAL[kind])
    colour = _pick(rng, tuple(COLOURS))
    return SceneObject(kind, COLOURS[colour], colour)


def _pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def random_subject(rng: np.random.Generator) -> ToySubject:
    """Return an individual of a random kind, with colours and a pattern of its own."""
    accessory = _pick(rng, ACCESSORIES) if rng.random() < 0.3 else None
    kind = _pick(rng, KINDS)
    primary = secondary = _random_colour(rng)
    while math.dist(primary, secondary) < 130:
        secondary = _random_colour(rng)
    return ToySubject(kind, Palette(primary, secondary), _pick(rng, PATTERNS), accessory)


def _random_colour(rng: np.random.Generator) -> RGB:
    hue, saturation, value = float(rng.random()), float(rng.uniform(0.3, 0.95)), float(rng.uniform(0.4, 1.0))
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def subject_scene(subject: ToySubject, rng: np.random.Generator, *, added_accessory: float = 0.3) -> Scene:
    """Return the subject in a new place and size before a new background.

    With probability `added_accessory` the subject wears something besides its own accessory, which captions mention.
    """
    thing = SceneObject(subject.kind, subject.palette, pattern=subject.pattern, own=subject.accessory)
    if rng.random() < added_accessory:
        others = [name for name in ACCESSORIES if name != subject.accessory]
        thing = replace(thing, accessory=_pick(rng, others))
    return _with_background(rng, [_placed(rng, thing)], Task.SUBJECT)


_RNG = np.random.default_rng(SUBJECT_SEED)
SUBJECTS = tuple(replace(random_subject(_RNG), kind=KINDS[k % len(KINDS)]) for k in range(30))
"""Thirty individuals that no training picture shows: every kind once, the first six twice."""

SUBJECT_DISTANCE = 70.0


def resembles_held_out(subject: ToySubject) -> bool:
    """Return whether the subject could pass for one of SUBJECTS: the same kind in nearly the same main colour."""
    return any(
        subject.kind == other.kind
        and math.dist(subject.palette.primary, other.palette.primary) < SUBJECT_DISTANCE
        for other in SUBJECTS
    )
