"""`segmenter` labels every pixel with its kind, `parts` with the part of the kind: two SegFormers (Xie et al. 2021).

`segmenter` is a judge that rewards may use. `parts` is the truth about fusion and no reward is trained on it; besides
true drawings it learns from what fusion must not be confused with: hybrids of every pair, double exposures, and parts
pasted where they do not belong. In a second round it learns from drawings that a generator has drawn anew, so that it
reads what generators make.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from pixrl.hub import CARD_FILE
from pixrl.metrics.true_fusion import MIXED, WORN
from pixrl.rewards.segmentation import BACKGROUND_LABEL
from pixrl.toy.pictures import to_tensor
from pixrl.toy.random_scenes import random_hybrid, random_scene
from pixrl.toy.scene import (
    FIRST_PART,
    MIXED_CLASS,
    PART_CLASSES,
    SIDE,
    Scene,
    SceneDrawing,
    Task,
    draw,
    part_class,
    part_classes,
)
from pixrl.toy.vocabulary import COLOURS, KINDS, NAMES, SLOTS
from toy_build.clip import IMAGE_MEAN, IMAGE_STD, SCENES, normalize, soften
from toy_build.pictures import Bytes, pictures
from toy_build.redrawn import redrawn
from toy_build.training import Build, Draw, Lesson, Plan, save_half

PLAN = Plan(steps=4_000, batch=32, lr=1.5e-3, warmup=100, ema=0.997, level=0.5)
PARTS_PLAN = Plan(steps=8_000, batch=24, lr=1.5e-3, warmup=200, ema=0.998, level=0.6)
REDRAWN_PLAN = Plan(steps=1_000, batch=24, lr=7e-4, warmup=50, ema=0.995, level=0.3)
REDRAWN, REDRAWN_SHARE = 6_000, 0.6
"""Pictures of the second round of `parts` that a generator has drawn, and their share of its lessons."""
EXPOSURE_SHARE = 0.1
"""Of what `parts` learns from: two figures over each other, half transparent."""
FREE_HYBRIDS = 0.72
"""Of the rest: hybrids of any kinds in any colours, so that it knows parts and no pairs."""


def new_segmenter(names: list[str], width: int) -> SegformerForSemanticSegmentation:
    """A SegFormer on a four times smaller grid whose decoder is `width` wide."""
    config = SegformerConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[48, 80, 144, 192], strides=[4, 2, 2, 2], patch_sizes=[7, 3, 3, 3],
        num_attention_heads=[1, 2, 4, 4], sr_ratios=[8, 4, 2, 1], mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=width,
        id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)},
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


def part_names() -> list[str]:
    """The classes of `parts`: background, worn, pasted or two things at once, then "KIND SLOT"."""
    names = [BACKGROUND_LABEL, WORN, MIXED] + [""] * (PART_CLASSES - FIRST_PART)
    for kind in KINDS:
        for slot, word in enumerate(SLOTS):
            names[part_class(kind, slot)] = f"{kind} {word}"
    return names


def pixel_loss(build: Build, model: SegformerForSemanticSegmentation) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy at half of the pictures' side, where the logits are enlarged to."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with build.autocast():
            logits = model(pixel_values=images).logits
        half = SIDE // 2
        full = F.interpolate(logits.float(), (half, half), mode="bilinear", align_corners=False)
        return F.cross_entropy(full, labels)

    return loss


def _lesson(images: Tensor, classes: Tensor, draw: Draw) -> Lesson:
    """Pictures as the network takes them, and every other pixel's class."""
    return normalize(soften(images, draw)), classes[:, 1::2, 1::2].contiguous()


def _save(build: Build, model: SegformerForSemanticSegmentation, name: str, plans: dict[str, Plan]) -> None:
    save_half(model.eval(), build.out / name)
    size = {"height": SIDE, "width": SIDE}
    processor = SegformerImageProcessor(size=size, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD))
    processor.save_pretrained(build.out / name)
    build.provenance(name, plans)


def build_segmenter(build: Build) -> None:
    """Train and save `segmenter`."""
    torch.manual_seed(build.seed)
    data = pictures(build.work, "even", SCENES, build.seed)
    model = new_segmenter(["background", *KINDS], 96).to(build.device)

    def rows_lesson(draw: Draw) -> Lesson:
        rows = draw.rows(len(data), PLAN.batch)
        return _lesson(data.tensor(rows), data.kinds(rows), draw)

    build.fit("segmenter", model, PLAN, rows_lesson, pixel_loss(build, model))
    _save(build, model, "segmenter", {"segmenter": PLAN})


def build_parts(build: Build) -> None:
    """Train and save `parts`, on pictures that are drawn for every step anew."""
    torch.manual_seed(build.seed + 1)
    model = new_segmenter(part_names(), 128).to(build.device)

    def drawn_lesson(draw: Draw) -> Lesson:
        drawn = [lesson(draw.rng) for _ in range(PARTS_PLAN.batch)]
        images = to_tensor(np.stack([image for image, _ in drawn]))
        return _lesson(images, torch.from_numpy(np.stack([classes for _, classes in drawn])).long(), draw)

    build.fit("parts", model, PARTS_PLAN, drawn_lesson, pixel_loss(build, model))
    bank, known = redrawn(build, REDRAWN, random_drawing)

    def redrawn_lesson(draw: Draw) -> Lesson:
        chosen = [draw.rng.random() < REDRAWN_SHARE for _ in range(REDRAWN_PLAN.batch)]
        rows = [int(row) for row in draw.rows(len(bank), REDRAWN_PLAN.batch)]
        pairs = [
            (bank[row], known[row]) if again else lesson(draw.rng)
            for row, again in zip(rows, chosen, strict=True)
        ]
        images = to_tensor(np.stack([image for image, _ in pairs]))
        return _lesson(images, torch.from_numpy(np.stack([classes for _, classes in pairs])).long(), draw)

    build.fit("parts_redrawn", model, REDRAWN_PLAN, redrawn_lesson, pixel_loss(build, model))
    _save(build, model, "parts", {"parts": PARTS_PLAN, "parts_redrawn": REDRAWN_PLAN})
    synonyms = {name: kind for kind, names in NAMES.items() for name in names if name != kind}
    (build.out / "parts" / CARD_FILE).write_text(json.dumps({"synonyms": synonyms}, indent=1) + "\n")


def lesson(rng: np.random.Generator) -> tuple[Bytes, Bytes]:
    """A picture [128, 128, 3] and the class of each of its pixels [128, 128]."""
    if rng.random() < EXPOSURE_SHARE:
        return double_exposure(rng)
    scene = random_drawing(rng)
    drawing = draw(scene)
    return drawing.picture, part_classes(scene)[drawing.labels]


def random_drawing(rng: np.random.Generator) -> Scene:
    """A hybrid of any kinds, or a scene of any task."""
    if rng.random() < FREE_HYBRIDS:
        return free_hybrid(rng)
    tasks = (Task.SINGLE_OBJECT, Task.COLORS, Task.TWO_OBJECT, Task.COUNTING, Task.OVERLAY, Task.SUBJECT)
    return random_scene(rng, tasks[int(rng.integers(len(tasks)))])


def free_hybrid(rng: np.random.Generator) -> Scene:
    """A hybrid of two to four kinds, of any pair, sometimes all in one named colour."""
    scene = random_scene(rng, Task.HYBRID)
    count = int(rng.choice((2, 3, 4), p=(0.6, 0.25, 0.15)))
    kinds = [str(kind) for kind in rng.choice(KINDS, count, replace=False)]
    thing = random_hybrid(rng, kinds)
    if rng.random() < 0.3:
        thing = replace(thing, palette=COLOURS[str(rng.choice(list(COLOURS)))])
    old = scene.objects[0]
    return replace(scene, objects=(replace(thing, centre=old.centre, size=old.size),))


def double_exposure(rng: np.random.Generator) -> tuple[Bytes, Bytes]:
    """Two figures over each other, half transparent: wherever both are, the class is "mixed"."""
    first = random_scene(rng, Task.SINGLE_OBJECT)
    below = draw(first)
    second = replace(
        random_scene(rng, Task.SINGLE_OBJECT), background=first.background, backdrop=first.backdrop
    )
    above = draw(second)
    share = float(rng.uniform(0.3, 0.7))
    picture = np.round(below.picture * (1 - share) + above.picture * share).astype(np.uint8)
    classes = _exposed(below, first, above, second)
    return picture, classes


def _exposed(below: SceneDrawing, first: Scene, above: SceneDrawing, second: Scene) -> Bytes:
    classes = np.where(
        below.foreground, part_classes(first)[below.labels], part_classes(second)[above.labels]
    )
    classes[below.foreground & above.foreground] = MIXED_CLASS
    return classes
