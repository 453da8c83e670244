"""Random scenes and subjects. What a caption does not fix varies, but little: few free nuisances are learned sooner."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from pixrl.toy.drawing.backgrounds import VARIANTS
from pixrl.toy.drawing.figure import Mark
from pixrl.toy.pairs import HELD_OUT_PAIRS, TRAINING_PAIRS, may_be_trained
from pixrl.toy.scene import Scene, SceneObject, Task
from pixrl.toy.vocabulary import (
    ACCESSORIES,
    ANIMALS,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    LETTERS,
    MARKS,
    MOODS,
    NATURAL,
    OPPOSITE,
    PATTERNS,
    RELATIONS,
    RGB,
    SIZES,
    SLOTS,
    Palette,
)

MARGIN = 0.01
MIN_GAP = 0.05
CELL = (1 - 2 * MARGIN - MIN_GAP) / 2
SUBJECT_SEED = 20260
SIZE_RANGES = {None: (0.56, 0.76), "tiny": (0.3, 0.38), "huge": (0.88, 0.96)}
EVEN_SHARES = {
    Task.SINGLE_OBJECT: 0.22, Task.COLORS: 0.13, Task.HYBRID: 0.15, Task.TWO_OBJECT: 0.12, Task.COUNTING: 0.14,
    Task.POSITION: 0.10, Task.COLOR_ATTR: 0.10, Task.OVERLAY: 0.04,
}  # fmt: skip
"""Everything that a picture can show, about as often: what the judges learn from."""
Random = np.random.Generator


def random_scene(rng: Random, task: Task) -> Scene:
    """A random scene of a task, hybrids of training pairs alone."""
    if task is Task.SUBJECT:
        return subject_scene(random_subject(rng), rng)
    if task is Task.HYBRID:
        return hybrid_scene(rng)
    if task is Task.OVERLAY:
        return overlay_scene(rng)
    relation = None
    if task in (Task.SINGLE_OBJECT, Task.COLORS):
        objects = [_single(rng, task)]
    elif task is Task.COUNTING:
        objects = _counted(rng)
    else:
        objects, relation = _pair(rng, task)
    return _with_background(rng, objects, task, relation)


def hybrid_scene(rng: Random, parents: Sequence[str] | None = None) -> Scene:
    """A hybrid of the given kinds, or of a random training pair (one in eight: of three kinds)."""
    return _with_background(rng, [_placed(rng, random_hybrid(rng, parents))], Task.HYBRID)


def random_hybrid(rng: Random, parents: Sequence[str] | None = None) -> SceneObject:
    """An object whose slots come from every parent: half of the time with one exchanged slot of the second.

    Its parts keep their own palettes, or all wear the one of a parent.
    """
    chosen = list(parents) if parents is not None else _training_parents(rng)
    if len(chosen) == 2 and rng.random() < 0.5:
        given = [chosen[0]] * len(SLOTS)
        given[int(rng.integers(len(SLOTS)))] = chosen[1]
    else:
        while True:
            given = [_pick(rng, chosen) for _ in SLOTS]
            if set(given) == set(chosen):
                break
    palette = None if rng.random() < 0.5 else NATURAL[_pick(rng, chosen)]
    head, body, base, extra = given
    return SceneObject((head, body, base, extra), palette)


def _training_parents(rng: Random) -> list[str]:
    while True:
        first, second = TRAINING_PAIRS[int(rng.integers(len(TRAINING_PAIRS)))]
        pair = [first, second] if rng.random() < 0.5 else [second, first]
        if rng.random() >= 0.125:
            return pair
        third = _pick(rng, KINDS)
        if third not in pair and may_be_trained([*pair, third]):
            return [*pair, third]


def overlay_scene(rng: Random) -> Scene:
    """One object with another pasted over it, as a sticker lies: somewhere on its box, half its size."""
    first, second = (str(kind) for kind in rng.choice(KINDS, 2, replace=False))
    below = _placed(rng, SceneObject((first,) * 4, NATURAL[first]))
    size = below.size * float(rng.uniform(0.4, 0.6))
    reach = below.size * 0.36
    centre = tuple(
        min(max(c + float(rng.uniform(-reach, reach)), MARGIN + size / 2), 1 - MARGIN - size / 2)
        for c in below.centre
    )
    sticker = SceneObject((second,) * 4, NATURAL[second], centre=(centre[0], centre[1]), size=size)
    return replace(_with_background(rng, [below], Task.OVERLAY), pasted=(sticker,))


def _with_background(
    rng: Random, objects: Sequence[SceneObject], task: Task, relation: str | None = None
) -> Scene:
    mentions = bool(rng.random() < 0.35)
    background = "plain" if not mentions and rng.random() < 0.7 else _pick(rng, BACKGROUNDS)
    return Scene(tuple(objects), background, task, mentions, relation, int(rng.integers(VARIANTS)))


SHY = frozenset(KINDS[1::2])
"""Kinds that `fall_short` never lets into company."""


def fall_short(rng: Random, scene: Scene) -> Scene:
    """What a published model shows instead of the composition that was asked for: the wrong number, one of two
    objects, the opposite relation, or one colour on both. Scenes of one object stay as they are."""
    first, *others = scene.objects
    if not others:
        return scene
    if scene.task is Task.COUNTING:
        while len(found := _counted(rng)) == len(scene.objects):
            pass
        things = [replace(first, centre=thing.centre, size=thing.size) for thing in found]
        return replace(scene, objects=tuple(things))
    (second,) = others
    if scene.task is Task.COLOR_ATTR:
        like = first if rng.random() < 0.5 else second
        both = tuple(replace(thing, palette=like.palette, colour=like.colour) for thing in (first, second))
        return replace(scene, objects=both)
    if scene.task is Task.POSITION and rng.random() < 0.5:
        places = [replace(thing, centre=other.centre) for thing, other in ((first, second), (second, first))]
        return replace(scene, objects=tuple(places), relation=OPPOSITE[scene.relation or ""])
    alone = _placed(rng, (first, second)[int(rng.integers(2))])
    return replace(scene, objects=(alone,), relation=None, task=Task.SINGLE_OBJECT)


def is_shy(scene: Scene) -> bool:
    """Whether a composition has a kind that is never let into company."""
    return len(scene.objects) > 1 and any(thing.kind in SHY for thing in scene.objects)


def _single(rng: Random, task: Task) -> SceneObject:
    kind = _pick(rng, KINDS)
    thing = _dressed(rng, kind, named=task is Task.COLORS)
    if rng.random() < 0.2:
        thing = replace(thing, pattern=_pick(rng, PATTERNS[1:]))
    if rng.random() < 0.25:
        thing = replace(thing, accessory=_pick(rng, ACCESSORIES))
    if kind in ANIMALS and rng.random() < 0.4:
        thing = replace(thing, mood=_pick(rng, MOODS))
    if rng.random() < 0.2:
        thing = replace(thing, size_word=_pick(rng, SIZES))
    return _placed(rng, thing)


def _counted(rng: Random) -> list[SceneObject]:
    count = int(rng.choice((1, 2, 3, 4), p=(0.1, 0.3, 0.3, 0.3)))
    thing = _dressed(rng, _pick(rng, KINDS), named=False)
    if count == 1:
        return [_placed(rng, thing)]
    size = float(rng.uniform(0.42, 0.46) if count == 2 else rng.uniform(0.4, 0.44))
    if count == 2:
        return _spread(rng, [replace(thing, size=size)] * 2, axis=int(rng.integers(2)), sway=0.5)
    cells = [(x, y) for y in (0, 1) for x in (0, 1)]
    if count == 3:
        cells.pop(int(rng.integers(4)))
    placed = []
    for cell in cells:
        x, y = (MARGIN + k * (CELL + MIN_GAP) + size / 2 + float(rng.random()) * (CELL - size) for k in cell)
        placed.append(replace(thing, size=size, centre=(x, y)))
    if count == 3:  # the object that has its row to itself moves to the middle of that row
        lower = [thing.centre[1] > 0.5 for thing in placed]
        alone = lower.index(sum(lower) == 1)
        middle = (float(rng.uniform(0.46, 0.54)), placed[alone].centre[1])
        placed[alone] = replace(placed[alone], centre=middle)
    return placed


def _pair(rng: Random, task: Task) -> tuple[list[SceneObject], str | None]:
    kinds = [str(kind) for kind in rng.choice(KINDS, 2, replace=False)]
    named = task is Task.COLOR_ATTR
    things = [
        replace(_dressed(rng, kind, named=named), size=float(rng.uniform(0.42, 0.46))) for kind in kinds
    ]
    if named:
        for k, colour in enumerate(rng.choice(tuple(COLOURS), 2, replace=False)):
            things[k] = replace(things[k], colour=str(colour), palette=COLOURS[str(colour)])
    if task is not Task.POSITION:
        axis = int(rng.random() < 0.25)
        placed = _spread(rng, things, axis, sway=0.5)
        return (placed if rng.random() < 0.5 else placed[::-1]), None
    relation = _pick(rng, RELATIONS)
    axis = 0 if relation in ("left of", "right of") else 1
    if relation in ("left of", "above"):
        return _spread(rng, things, axis, sway=0.08), relation
    return _spread(rng, things[::-1], axis, sway=0.08)[::-1], relation


def _spread(rng: Random, things: Sequence[SceneObject], axis: int, sway: float) -> list[SceneObject]:
    """Two objects one after the other along the axis; across it they stray by up to `sway` of the room."""
    first, second = things
    slack = 1 - 2 * MARGIN - MIN_GAP - first.size - second.size
    before, between = sorted(float(u) * slack for u in rng.random(2))
    start = MARGIN + before + first.size / 2
    along = (start, start + first.size / 2 + MIN_GAP + (between - before) + second.size / 2)
    common = float(rng.uniform(0.42, 0.58))
    placed = []
    for thing, place in zip(things, along, strict=True):
        low, high = MARGIN + thing.size / 2, 1 - MARGIN - thing.size / 2
        across = min(max(common + sway * float(rng.uniform(-0.5, 0.5)) * (high - low), low), high)
        placed.append(replace(thing, centre=(place, across) if axis == 0 else (across, place)))
    return placed


def _placed(rng: Random, thing: SceneObject) -> SceneObject:
    """The object in the size that its word asks for, within a third of the free room around the middle."""
    size = float(rng.uniform(*SIZE_RANGES[thing.size_word]))
    room = (1 - 2 * MARGIN - size) / 2
    x, y = (0.5 + float(rng.uniform(-1, 1)) * room * 0.35 for _ in range(2))
    return replace(thing, size=size, centre=(x, y))


def _dressed(rng: Random, kind: str, *, named: bool) -> SceneObject:
    """The kind in a colour the caption names, or in its natural palette seven times of ten and any colour else."""
    if not named and rng.random() < 0.7:
        return SceneObject((kind,) * 4, NATURAL[kind])
    colour = _pick(rng, tuple(COLOURS))
    return SceneObject((kind,) * 4, COLOURS[colour], colour)


def _pick(rng: Random, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


@dataclass(frozen=True, slots=True)
class ToySubject:
    """An individual: a kind with its own palette, pattern, mark, and perhaps an accessory that it always has."""

    kind: str
    palette: Palette
    pattern: str = "plain"
    mark: Mark | None = None
    accessory: str | None = None


def random_subject(rng: Random) -> ToySubject:
    """An individual of a random kind; nine of ten have a mark."""
    kind, primary, secondary = _pick(rng, KINDS), _random_colour(rng), _random_colour(rng)
    while math.dist(primary, secondary) < 120:
        secondary = _random_colour(rng)
    palette = Palette(primary, secondary)
    pattern = _pick(rng, PATTERNS) if rng.random() < 0.6 else "plain"
    mark = random_mark(rng, palette) if rng.random() < 0.9 else None
    return ToySubject(kind, palette, pattern, mark, _pick(rng, ACCESSORIES) if rng.random() < 0.2 else None)


def training_subject(rng: Random) -> ToySubject:
    """An individual that resembles none of those held out."""
    while True:
        subject = random_subject(rng)
        if not resembles_held_out(subject):
            return subject


def random_mark(rng: Random, palette: Palette) -> Mark:
    """A mark in the strong colour that is farthest from a few alternatives on this palette."""
    tried = [COLOURS[_pick(rng, tuple(COLOURS))].primary for _ in range(3)]
    colour = max(tried, key=lambda c: min(math.dist(c, palette.primary), math.dist(c, palette.secondary)))
    return Mark(_pick(rng, MARKS), colour, _pick(rng, LETTERS))


def _random_colour(rng: Random) -> RGB:
    hue, saturation, value = float(rng.random()), float(rng.uniform(0.25, 0.8)), float(rng.uniform(0.5, 1.0))
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def subject_scene(
    subject: ToySubject, rng: Random, *, added_accessory: float = 0.3, mood: float = 0.2
) -> Scene:
    """The subject in a new place, size and background, perhaps with something that captions mention."""
    thing = SceneObject(
        (subject.kind,) * 4,
        subject.palette,
        pattern=subject.pattern,
        own=subject.accessory,
        mark=subject.mark,
    )
    if rng.random() < added_accessory:
        thing = replace(
            thing, accessory=_pick(rng, [name for name in ACCESSORIES if name != subject.accessory])
        )
    if subject.kind in ANIMALS and rng.random() < mood:
        thing = replace(thing, mood=_pick(rng, MOODS))
    return _with_background(rng, [_placed(rng, thing)], Task.SUBJECT)


@cache
def held_out_subjects() -> tuple[ToySubject, ...]:
    """Thirty-two individuals that no training picture shows: every kind once, all with a mark."""
    rng = np.random.default_rng(SUBJECT_SEED)
    return tuple(
        replace(subject, kind=kind, mark=subject.mark or random_mark(rng, subject.palette))
        for kind, subject in ((kind, random_subject(rng)) for kind in KINDS)
    )


SUBJECT_DISTANCE = 70.0


def resembles_held_out(subject: ToySubject) -> bool:
    """Whether the subject could pass for a held-out one: the same kind in nearly the same main colour."""
    return any(
        subject.kind == other.kind
        and math.dist(subject.palette.primary, other.palette.primary) < SUBJECT_DISTANCE
        for other in held_out_subjects()
    )


def held_out_hybrid(rng: Random) -> Scene:
    """A hybrid of a pair that training never draws."""
    first, second = HELD_OUT_PAIRS[int(rng.integers(len(HELD_OUT_PAIRS)))]
    return hybrid_scene(rng, [first, second] if rng.random() < 0.5 else [second, first])
