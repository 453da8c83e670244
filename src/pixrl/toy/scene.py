"""Scenes: what a picture shows, and how it is drawn.

Objects live in square boxes that keep MIN_GAP of each other, and everything drawn of an object, what it wears
included, stays in its box. A picture comes with a map of labels: which part of which object a pixel belongs to.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixrl.toy.drawing.backgrounds import backdrop
from pixrl.toy.drawing.figure import LABELS_EACH, WORN, Mark, ToyFigure, draw_figure
from pixrl.toy.drawing.pen import Coat, LabelledCanvas
from pixrl.toy.vocabulary import KINDS, NATURAL, SLOTS, Palette

SIDE = 128
"""The side of the world's pictures in pixels."""
SUPERSAMPLE = 4
PASTED = 250
"""The label of what is pasted over a picture."""
WORN_CLASS, MIXED_CLASS, FIRST_PART = 1, 2, 3
PART_CLASSES = FIRST_PART + len(KINDS) * len(SLOTS)
"""What a pixel can show: nothing (0), something worn, what is pasted or two things at once, or one of 32 x 4 parts."""

Point = tuple[float, float]
Slots = tuple[str, str, str, str]
Labels = NDArray[np.uint8]
Picture = np.ndarray[Any, np.dtype[np.uint8]]


class Task(StrEnum):
    """GenEval's six tags; then what only this world asks for."""

    SINGLE_OBJECT = "single_object"
    TWO_OBJECT = "two_object"
    COUNTING = "counting"
    COLORS = "colors"
    POSITION = "position"
    COLOR_ATTR = "color_attr"
    HYBRID = "hybrid"
    OVERLAY = "overlay"
    SUBJECT = "subject"


GENEVAL = (
    Task.SINGLE_OBJECT, Task.TWO_OBJECT, Task.COUNTING, Task.COLORS, Task.POSITION, Task.COLOR_ATTR,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. Captions mention `kind` (a hybrid's slots), `colour`, `pattern`, `mood`, `size_word` and
    `accessory`; `own` (an accessory) and `mark` are a subject's, which only its picture shows."""

    slots: Slots
    palette: Palette | None = None
    """None: every slot in the natural palette of its kind."""
    colour: str | None = None
    pattern: str = "plain"
    mood: str | None = None
    size_word: str | None = None
    accessory: str | None = None
    own: str | None = None
    mark: Mark | None = None
    centre: Point = (0.5, 0.5)
    size: float = 0.7

    @property
    def kind(self) -> str:
        """The kind that most slots come from, and of several such kinds the one whose slot is first."""
        return max(self.slots, key=lambda kind: (self.slots.count(kind), -self.slots.index(kind)))

    @property
    def parents(self) -> tuple[str, ...]:
        """The kinds that the slots come from, each once, in the order of the slots."""
        return tuple(dict.fromkeys(self.slots))

    @property
    def worn(self) -> tuple[str, ...]:
        return tuple(name for name in (self.accessory, self.own) if name is not None)

    def figure(self) -> ToyFigure:
        """The object as `drawing` takes it."""
        first, second, third, fourth = (
            Coat(self.palette or NATURAL[kind], self.pattern) for kind in self.slots
        )
        return ToyFigure(self.slots, (first, second, third, fourth), self.mood, self.worn, self.mark)


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's content; in position scenes `relation` is that of the first object to the second.

    `pasted` objects lie over the others, as stickers do.
    """

    objects: tuple[SceneObject, ...]
    background: str
    task: Task
    mentions_background: bool
    relation: str | None = None
    backdrop: int = 0
    pasted: tuple[SceneObject, ...] = ()


@dataclass(frozen=True, slots=True)
class SceneDrawing:
    """A drawn scene: the picture [side, side, 3], and labels [side, side] of objects and parts."""

    picture: Picture
    labels: Labels

    @property
    def foreground(self) -> NDArray[np.bool_]:
        """Where any object is [side, side]."""
        return self.labels > 0

    def objects(self, count: int) -> NDArray[np.bool_]:
        """The pixels of each of the first `count` objects, what they wear included [count, side, side]."""
        owner = (self.labels.astype(np.int64) - 1) // LABELS_EACH
        return np.stack([(owner == k) & (self.labels > 0) & (self.labels < PASTED) for k in range(count)])


def render(scene: Scene, size: int = SIDE) -> Image.Image:
    """The scene as an RGB picture."""
    return _paint(scene, size).image.reduce(SUPERSAMPLE)


def draw(scene: Scene, size: int = SIDE) -> SceneDrawing:
    """The picture and its labels, drawn once."""
    canvas = _paint(scene, size)
    middle = SUPERSAMPLE // 2
    return SceneDrawing(
        np.asarray(canvas.image.reduce(SUPERSAMPLE)),
        np.asarray(canvas.labels)[middle::SUPERSAMPLE, middle::SUPERSAMPLE].copy(),
    )


def part_classes(scene: Scene) -> Labels:
    """What each label of the scene's map means among PART_CLASSES: a table [256] to index with the labels."""
    table = np.zeros(256, dtype=np.uint8)
    for number, thing in enumerate(scene.objects):
        first = 1 + number * LABELS_EACH
        for slot, kind in enumerate(thing.slots):
            table[first + slot] = part_class(kind, slot)
        table[first + WORN - 1] = WORN_CLASS
    table[PASTED:] = MIXED_CLASS
    return table


def part_class(kind: str, slot: int) -> int:
    """The class of a kind's part in a slot."""
    return FIRST_PART + KINDS.index(kind) * len(SLOTS) + slot


def kind_classes(scene: Scene) -> Labels:
    """The same with one class a kind: a table [256] to 0 (background) or k + 1 (KINDS[k]; a hybrid's is that of its
    main kind, what an object wears belongs to it, and what is pasted is its own kind)."""
    table = np.zeros(256, dtype=np.uint8)
    for number, thing in enumerate(scene.objects):
        first = 1 + number * LABELS_EACH
        table[first : first + LABELS_EACH] = KINDS.index(thing.kind) + 1
    for thing in scene.pasted:
        table[PASTED:] = KINDS.index(thing.kind) + 1
    return table


def _paint(scene: Scene, size: int) -> LabelledCanvas:
    side = size * SUPERSAMPLE
    canvas = LabelledCanvas(
        backdrop(scene.background, side, scene.backdrop).copy(), Image.new("L", (side, side), 0)
    )
    for number, thing in enumerate(scene.objects):
        _put(canvas, thing, side, 1 + number * LABELS_EACH)
    for thing in scene.pasted:
        _put(canvas, thing, side, PASTED)
    if scene.pasted:
        canvas.labels.paste(canvas.labels.point([min(k, PASTED) for k in range(256)]))
    return canvas


def _put(canvas: LabelledCanvas, thing: SceneObject, side: int, first_label: int) -> None:
    x, y = thing.centre
    draw_figure(canvas, thing.figure(), (x * side, y * side), thing.size * side, first_label)
