"""The contact sheet: every kind in several looks, for people to judge."""

import textwrap
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from pixrl.toy.drawing.backgrounds import VARIANTS
from pixrl.toy.language import caption
from pixrl.toy.scene import SUBJECTS, Scene, SceneObject, Task, random_scene, render, subject_scene
from pixrl.toy.vocabulary import ACCESSORIES, BACKGROUNDS, COLOURS, KINDS, NATURAL, PATTERNS

TILE = 64
LABEL_COLUMN = 60
COLUMNS = 14
SAMPLES = 6


def portrait(kind: str, column: int) -> Scene:
    """A kind's look in one column: natural, colours and patterns on every background, accessories, small."""
    names = tuple(COLOURS)
    thing = SceneObject(kind, NATURAL[kind], size=0.78)
    background = "plain"
    row = KINDS.index(kind)
    if 1 <= column <= 6:
        colour = names[(column + row) % len(names)]
        thing = replace(thing, palette=COLOURS[colour], colour=colour, pattern=PATTERNS[(column - 1) // 2])
        background = BACKGROUNDS[column - 1]
    elif 7 <= column <= 10:
        thing = replace(thing, accessory=ACCESSORIES[column - 7])
        background = BACKGROUNDS[(column + row) % len(BACKGROUNDS)]
    elif column == 11:
        thing = replace(thing, size=0.4)
    return Scene((thing,), background, Task.SINGLE_OBJECT, False, backdrop=(row + column) % VARIANTS)


def contact_sheet() -> Image.Image:
    """All kinds in many looks and as held-out subjects, then captioned pictures of every task."""
    tasks = tuple(Task)
    height = len(KINDS) * TILE + len(tasks) * TILE
    sheet = Image.new("RGB", (LABEL_COLUMN + COLUMNS * TILE, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, kind in enumerate(KINDS):
        draw.text((4, row * TILE + 26), kind, fill="black")
        for column in range(12):
            sheet.paste(render(portrait(kind, column), TILE), (LABEL_COLUMN + column * TILE, row * TILE))
        rng = np.random.default_rng(row)
        for column in (12, 13):
            subject = SUBJECTS[row] if column == 12 or row > 5 else SUBJECTS[24 + row]
            sheet.paste(render(subject_scene(subject, rng), TILE), (LABEL_COLUMN + column * TILE, row * TILE))
    for k, task in enumerate(tasks):
        _task_row(sheet, draw, task, len(KINDS) * TILE + k * TILE)
    return sheet


def _task_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, task: Task, top: int) -> None:
    rng = np.random.default_rng(len(task))
    draw.text((2, top + 26), task.value.replace("_", "\n"), fill="black", font_size=10)
    step = COLUMNS * TILE // SAMPLES
    for k in range(SAMPLES):
        scene = random_scene(rng, task)
        left = LABEL_COLUMN + k * step
        sheet.paste(render(scene, TILE), (left, top))
        lines = textwrap.fill(caption(scene).removeprefix("a photo of "), 15)
        draw.text((left + TILE + 4, top + 4), lines, fill="black", font_size=10)
