"""Contact sheets for people to judge, of the drawings and of what generators make: first pictures, none chosen.

python -m toy_build.sheet docs/images
"""

import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pixrl import models
from pixrl.models.base import Renderer
from pixrl.models.flux import FluxPolicy
from pixrl.rewards.python import to_pil
from pixrl.toy.language import caption, held_out_prompts
from pixrl.toy.pairs import HELD_OUT_PAIRS, TRAINING_PAIRS
from pixrl.toy.random_scenes import held_out_subjects, hybrid_scene, random_scene, subject_scene
from pixrl.toy.scene import GENEVAL, SIDE, Scene, SceneObject, Task, render
from pixrl.toy.verify import cut_out
from pixrl.toy.verify_generators import article
from pixrl.toy.vocabulary import KINDS, NATURAL, PART_WORDS, SLOTS
from pixrl.types import sample_seed

COLUMNS, GAP, LABEL, TITLE = 8, 8, 46, 40
SEED = 17
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


def generated(model: str) -> list[Tile]:
    """Every kind by its bare prompt, as a generator draws it."""
    return _drawn(models.load(model), [f"a photo of {kind}" for kind in KINDS])


def composed(model: str) -> list[Tile]:
    """A row of held-out prompts of every task of GenEval, as a generator draws them."""
    prompts = [prompt for task in GENEVAL for prompt in held_out_prompts(task, COLUMNS, SEED)]
    return _drawn(models.load(model), prompts)


def asked_mixes(model: str, known: Sequence[tuple[str, str]], rows: int = 2) -> list[Tile]:
    """Mixes of some pairs by their prompts, as a generator draws them."""
    rng = np.random.default_rng(SEED)
    pairs = [known[int(k)] for k in rng.choice(len(known), rows * COLUMNS, replace=False)]
    prompts = [f"a mix of {' and '.join(article(kind) for kind in pair)}" for pair in pairs]
    return _drawn(models.load(model), prompts)


def kept(model: str, rows: int = 8) -> list[Tile]:
    """Held-out subjects as FLUX keeps them: the reference, then new scenes."""
    policy = models.load(model)
    assert isinstance(policy, FluxPolicy)
    rng, tiles = np.random.default_rng(SEED), []
    for number, subject in enumerate(held_out_subjects()[: rows * 2]):
        reference = cut_out([subject_scene(subject, rng)])
        prompts = [caption(subject_scene(subject, rng, added_accessory=0.5)) for _ in range(3)]
        conditioning = policy.with_references(policy.encode(prompts), [reference.expand(3, -1, -1, -1)])
        images = policy.sample(conditioning, [sample_seed(SEED, 1, number, k) for k in range(3)])
        tiles += list(zip(to_pil(torch.cat((reference, images))), ("reference", *prompts), strict=True))
    return tiles


def _drawn(policy: Renderer, prompts: list[str]) -> list[Tile]:
    images = policy.sample(policy.encode(prompts), [sample_seed(SEED, 0, i, 0) for i in range(len(prompts))])
    return list(zip(to_pil(images), prompts, strict=True))


def logo(side: int = 256) -> Image.Image:
    """The project's sign: an owl with the shell of a snail, without its background."""
    owl = SceneObject(("owl", "owl", "owl", "snail"), size=0.98)
    picture = np.asarray(render(Scene((owl,), "plain", Task.HYBRID, False), 4 * side))
    far = np.abs(picture.astype(int) - picture[0, 0]).max(axis=-1) > 8
    rgba = np.dstack([picture, far.astype(np.uint8) * 255])
    return Image.fromarray(rgba, "RGBA").resize((side, side), Image.Resampling.LANCZOS)


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG of 256 colours, a third as large as one of all: drawings have few."""
    picture.convert("RGB").quantize(256).save(path, optimize=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    logo().save(folder / "logo.png", optimize=True)
    save(sheet([("32 kinds, four parts each", kinds())], label=20), folder / "world_kinds.png")
    mixed = [
        ("One part exchanged", exchanged()),
        ("Hybrids of training pairs, as captions ask for them", hybrids()),
    ]
    save(sheet(mixed), folder / "world_hybrids.png")
    save(sheet([("Scenes and what is said of them", tasks())]), folder / "world_scenes.png")
    drawn = [("toy:sd3, every kind", generated("toy:sd3")), ("Held-out prompts", composed("toy:sd3"))]
    save(sheet(drawn), folder / "toy_sd3.png")
    fused = [
        ("toy:turbo, every kind", generated("toy:turbo")),
        ("Mixes of training pairs, by prompt", asked_mixes("toy:turbo", TRAINING_PAIRS)),
        ("Mixes of pairs that no training picture mixes", asked_mixes("toy:turbo", HELD_OUT_PAIRS)),
    ]
    save(sheet(fused), folder / "toy_turbo.png")
    personal = [("toy:flux, a reference and three scenes each", kept("toy:flux"))]
    save(sheet(personal), folder / "toy_flux.png")
    save(
        sheet([("Subjects keep their colours, patterns and marks", subjects())]),
        folder / "world_subjects.png",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
