"""This module makes sheets of pictures for people to judge: the vocabulary as drawn, and as generators show it."""

import textwrap
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pixrl import models
from pixrl.models.flux import FluxPolicy
from pixrl.rewards.python import to_pil
from pixrl.toy.drawing.backgrounds import VARIANTS
from pixrl.toy.language import caption, held_out_prompts
from pixrl.toy.pictures import TASK_SHARES, draw, to_tensor
from pixrl.toy.scene import SUBJECTS, Scene, SceneObject, Task, random_scene, render, subject_scene
from pixrl.toy.vocabulary import ACCESSORIES, BACKGROUNDS, COLOURS, KINDS, NATURAL, PATTERNS
from pixrl.types import sample_seed

TILE, LABEL_WIDTH, COLUMNS = 64, 60, 14
"""Of the drawn vocabulary: pixels of a picture's side, pixels for the labels at the left, pictures in a row."""
GENERATED_TILE, LABEL_HEIGHT, GAP, GENERATED_COLUMNS = 96, 30, 4, 12
"""Of generated pictures: pixels of a side, of the label below and between pictures, and pictures in a row."""
PER_TASK = 6
SEED = 17


def portrait(kind: str, column: int) -> Scene:
    """Return the scene of one kind in one column.

    Column 0 shows its natural look, 1 to 6 colours and patterns on every background, 7 to 10 accessories and 11 a
    small one.
    """
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
    """Return all kinds in many looks and as held-out subjects, then captioned pictures of every task."""
    sheet = Image.new("RGB", (LABEL_WIDTH + COLUMNS * TILE, (len(KINDS) + len(Task)) * TILE), "white")
    pen = ImageDraw.Draw(sheet)
    for row, kind in enumerate(KINDS):
        pen.text((4, row * TILE + 26), kind, fill="black")
        for column in range(12):
            sheet.paste(render(portrait(kind, column), TILE), (LABEL_WIDTH + column * TILE, row * TILE))
        rng = np.random.default_rng(row)
        for column in (12, 13):
            subject = SUBJECTS[row] if column == 12 or row > 5 else SUBJECTS[24 + row]
            sheet.paste(render(subject_scene(subject, rng), TILE), (LABEL_WIDTH + column * TILE, row * TILE))
    for row, task in enumerate(Task, len(KINDS)):
        rng = np.random.default_rng(len(task))
        top = row * TILE
        pen.text((2, top + 26), task.value.replace("_", "\n"), fill="black", font_size=10)
        for place in range(PER_TASK):
            scene = random_scene(rng, task)
            left = LABEL_WIDTH + place * (COLUMNS * TILE // PER_TASK)
            sheet.paste(render(scene, TILE), (left, top))
            lines = textwrap.fill(caption(scene).removeprefix("a photo of "), 15)
            pen.text((left + TILE + 4, top + 4), lines, fill="black", font_size=10)
    return sheet


def generated_sheet(model: str = "toy:sd3") -> Image.Image:
    """Return what a generator draws: every kind by its bare prompt, then held-out prompts of every task.

    Each picture is the first one drawn; none is chosen.
    """
    prompts = [f"a photo of {kind}" for kind in KINDS]
    for task in TASK_SHARES:
        prompts += held_out_prompts(task, PER_TASK, SEED)
    policy = models.load(model)
    images = policy.sample(policy.encode(prompts), [sample_seed(SEED, 0, i, 0) for i in range(len(prompts))])
    return _grid(images, [prompt.removeprefix("a photo of ") for prompt in prompts])


def personal_sheet(model: str = "toy:flux", subjects: int = 12) -> Image.Image:
    """Return what FLUX makes of held-out subjects: for each the reference, then the subject in three new scenes.

    Each picture is the first one drawn; none is chosen.
    """
    policy = models.load(model)
    assert isinstance(policy, FluxPolicy)
    rng = np.random.default_rng(SEED)
    tiles, labels = [], []
    for number, subject in enumerate(SUBJECTS[:subjects]):
        picture, mask = draw(subject_scene(subject, rng))
        reference = to_tensor(np.where(mask[..., None] > 0, picture, np.uint8(255))[None])
        prompts = [caption(subject_scene(subject, rng, added_accessory=0.5)) for _ in range(3)]
        conditioning = policy.with_references(policy.encode(prompts), [reference.expand(3, -1, -1, -1)])
        seeds = [sample_seed(SEED, 1, number, i) for i in range(3)]
        tiles += [reference, policy.sample(conditioning, seeds)]
        labels += ["reference", *(prompt.removeprefix("a photo of ") for prompt in prompts)]
    return _grid(torch.cat(tiles), labels)


def _grid(images_BCHW: Tensor, labels: list[str]) -> Image.Image:
    """Return pictures in rows with what was asked for below each."""
    rows = -(-len(labels) // GENERATED_COLUMNS)
    cell = GENERATED_TILE + GAP
    sheet = Image.new("RGB", (GENERATED_COLUMNS * cell + GAP, rows * (cell + LABEL_HEIGHT) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (image, label) in enumerate(zip(to_pil(images_BCHW), labels, strict=True)):
        left, top = (
            GAP + place % GENERATED_COLUMNS * cell,
            GAP + place // GENERATED_COLUMNS * (cell + LABEL_HEIGHT),
        )
        sheet.paste(image.resize((GENERATED_TILE, GENERATED_TILE), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + GENERATED_TILE), textwrap.fill(label, 19), fill="black", font_size=9)
    return sheet
