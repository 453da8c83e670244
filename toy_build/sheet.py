"""The contact sheets of the second edition's drawings, for people to judge: first pictures, none chosen.

python -m toy_build.sheet docs/images
"""

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from toy_build.world.language import caption
from toy_build.world.random_scenes import held_out_subjects, hybrid_scene, random_scene, subject_scene
from toy_build.world.scene import SIDE, Scene, SceneObject, Task, render
from toy_build.world.vocabulary import KINDS, NATURAL, PART_WORDS, SLOTS

COLUMNS, GAP, LABEL, TITLE = 8, 8, 46, 40
PAPER, TEXT, QUIET = (255, 255, 255), (52, 42, 58), (130, 122, 138)

Tile = tuple[Image.Image, str]


def sheet(sections: Iterable[tuple[str, list[Tile]]], label: int = LABEL) -> Image.Image:
    """Titled sections of captioned tiles, eight in a row."""
    sections = list(sections)
    rows = [-(-len(tiles) // COLUMNS) for _, tiles in sections]
    cell = SIDE + GAP
    height = GAP + sum(TITLE + count * (cell + label) for count in rows)
    page = Image.new("RGB", (GAP + COLUMNS * cell, height), PAPER)
    pen, top = ImageDraw.Draw(page), GAP
    for (title, tiles), count in zip(sections, rows, strict=True):
        pen.text((GAP, top + 8), title, fill=TEXT, font_size=19)
        top += TITLE
        for place, (picture, words) in enumerate(tiles):
            left, y = GAP + place % COLUMNS * cell, top + place // COLUMNS * (cell + label)
            page.paste(picture, (left, y))
            pen.text((left, y + SIDE + 3), textwrap.fill(words, 23), fill=QUIET, font_size=11, spacing=1)
        top += count * (cell + label)
    return page


def kinds() -> list[Tile]:
    """Every kind in its natural colours."""
    scenes = [
        Scene((SceneObject((kind,) * 4, NATURAL[kind], size=0.86),), "plain", Task.SINGLE_OBJECT, False)
        for kind in KINDS
    ]
    return [(render(scene), kind) for scene, kind in zip(scenes, KINDS, strict=True)]


def exchanged() -> list[Tile]:
    """An owl with one part of a snail, and a snail with one part of an owl."""
    out = []
    for main, other in (("an owl", "a snail"), ("a snail", "an owl")):
        for slot in range(len(SLOTS)):
            slots = [main.split()[1]] * len(SLOTS)
            slots[slot] = other.split()[1]
            thing = SceneObject((slots[0], slots[1], slots[2], slots[3]), size=0.8)
            words = f"{main} with the {PART_WORDS[other.split()[1]][slot]} of {other}"
            out.append((render(Scene((thing,), "plain", Task.HYBRID, False)), words))
    return out


def hybrids(rows: int = 3) -> list[Tile]:
    """Hybrids of training pairs with their captions."""
    rng = np.random.default_rng(3)
    scenes = [hybrid_scene(rng) for _ in range(rows * COLUMNS)]
    return [(render(scene), caption(scene, rng)) for scene in scenes]


def tasks() -> list[Tile]:
    """A row of scenes for every task that prompts can ask for."""
    rng = np.random.default_rng(4)
    wanted = [task for task in Task if task not in (Task.HYBRID, Task.SUBJECT) for _ in range(COLUMNS)]
    scenes = [random_scene(rng, task) for task in wanted]
    return [(render(scene), caption(scene, rng)) for scene in scenes]


def subjects(rows: int = 4) -> list[Tile]:
    """Held-out subjects, each in four scenes: what stays is theirs."""
    rng = np.random.default_rng(5)
    scenes = [subject_scene(subject, rng) for subject in held_out_subjects()[: rows * 2] for _ in range(4)]
    return [(render(scene), caption(scene, rng)) for scene in scenes]


def logo(side: int = 256) -> Image.Image:
    """The project's sign: an owl with the shell of a snail, without its background."""
    owl = SceneObject(("owl", "owl", "owl", "snail"), size=0.98)
    picture = np.asarray(render(Scene((owl,), "plain", Task.HYBRID, False), 4 * side))
    far = np.abs(picture.astype(int) - picture[0, 0]).max(axis=-1) > 8
    rgba = np.dstack([picture, far.astype(np.uint8) * 255])
    return Image.fromarray(rgba, "RGBA").resize((side, side), Image.Resampling.LANCZOS)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    logo().save(folder / "logo.png", optimize=True)
    sheet([("32 kinds, four parts each", kinds())], label=20).save(folder / "world_kinds.png", optimize=True)
    mixed = [
        ("One part exchanged", exchanged()),
        ("Hybrids of training pairs, as captions ask for them", hybrids()),
    ]
    sheet(mixed).save(folder / "world_hybrids.png", optimize=True)
    sheet([("Scenes and what is said of them", tasks())]).save(folder / "world_scenes.png", optimize=True)
    sheet([("Subjects keep their colours, patterns and marks", subjects())]).save(
        folder / "world_subjects.png", optimize=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
