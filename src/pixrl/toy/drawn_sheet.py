"""What the toy generators draw, for people to judge: held-out prompts by `sd3`, held-out subjects by `flux`."""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pixrl import models
from pixrl.models.flux import FluxPolicy
from pixrl.rewards.python import to_pil
from pixrl.toy.language import caption, held_out_prompts
from pixrl.toy.pictures import TASK_SHARES, draw, to_tensor
from pixrl.toy.scene import SUBJECTS, subject_scene
from pixrl.toy.vocabulary import KINDS
from pixrl.types import sample_seed

TILE, LABEL, GAP = 96, 30, 4
SEED = 17
COLUMNS = 12
PER_TASK = 6


def generated_sheet(model: str = "toy:sd3") -> Image.Image:
    """Every kind by its bare prompt, then held-out prompts of every task; the first picture of each, unchosen."""
    prompts = [f"a photo of {kind}" for kind in KINDS]
    for task in TASK_SHARES:
        prompts += held_out_prompts(task, PER_TASK, SEED)
    policy = models.load(model)
    images = policy.sample(policy.encode(prompts), [sample_seed(SEED, 0, i, 0) for i in range(len(prompts))])
    return _grid(images, [prompt.removeprefix("a photo of ") for prompt in prompts], COLUMNS)


def personal_sheet(model: str = "toy:flux", subjects: int = 12) -> Image.Image:
    """Held-out subjects: the reference, then the subject in three new scenes; the first picture of each, unchosen."""
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
    return _grid(torch.cat(tiles), labels, COLUMNS)


def _grid(images_BCHW: Tensor, labels: list[str], columns: int) -> Image.Image:
    """Pictures in rows with what was asked for below each."""
    rows = -(-len(labels) // columns)
    cell = TILE + GAP
    sheet = Image.new("RGB", (columns * cell + GAP, rows * (cell + LABEL) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (image, label) in enumerate(zip(to_pil(images_BCHW), labels, strict=True)):
        left, top = GAP + place % columns * cell, GAP + place // columns * (cell + LABEL)
        sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + TILE), textwrap.fill(label, 19), fill="black", font_size=9)
    return sheet
