"""`identity`: a DINOv2 encoder in which pictures of one subject are near, and everything that differs in it is far.

Most negatives share the kind, and for every subject there is a twin without its mark or with another one. Its own
picture smeared is a negative too: so a smudge in the right colours is not the subject.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from pixrl.toy.pictures import smear, to_tensor
from pixrl.toy.random_scenes import (
    ToySubject,
    random_mark,
    random_subject,
    resembles_held_out,
    subject_scene,
)
from pixrl.toy.scene import SIDE, draw
from pixrl.toy.vocabulary import KINDS
from toy_build.clip import soften
from toy_build.pictures import Bytes
from toy_build.training import Build, Draw, Lesson, Plan, eager_attention, save_half

PLAN = Plan(steps=9_500, batch=64, lr=1.5e-3, warmup=100, weight_decay=0.05, level=0.5)
TEMPERATURE = 0.1
KINDS_A_BATCH = 4
CUTOUT_SHARE = 0.7
SMEARED = (4, 8, 12)
"""Sides of the squares, in pixels, that smeared pictures are averaged over."""
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def new_encoder() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=3,
        image_size=SIDE,
        patch_size=16,
    )
    return Dinov2Model(config)


def normalize(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the encoder takes them."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def new_subjects(rng: np.random.Generator, count: int) -> list[ToySubject]:
    """Subjects of a few kinds, each followed by a twin whose mark is another one or missing."""
    kinds = [str(kind) for kind in rng.choice(KINDS, KINDS_A_BATCH, replace=False)]
    found: list[ToySubject] = []
    while len(found) < count:
        subject = replace(random_subject(rng), kind=kinds[len(found) // 2 % len(kinds)])
        if resembles_held_out(subject):
            continue
        mark = random_mark(rng, subject.palette) if subject.mark is None or rng.random() < 0.5 else None
        found += [subject, replace(subject, mark=mark)]
    return found[:count]


def view(subject: ToySubject, rng: np.random.Generator) -> Bytes:
    """A picture of the subject [128, 128, 3], most often cut out on white."""
    drawing = draw(subject_scene(subject, rng))
    if rng.random() < CUTOUT_SHARE:
        return np.where(drawing.foreground[..., None], drawing.picture, np.uint8(255))
    return drawing.picture


def info_nce(features: Tensor, labels: Tensor) -> Tensor:
    """Each picture's other view against all pictures of other subjects; what has no other view is only a negative."""
    unit = F.normalize(features.float(), dim=-1)
    logits = (unit @ unit.T / TEMPERATURE).fill_diagonal_(-1e4)
    positive = (labels[:, None] == labels[None, :]).float().fill_diagonal_(0)
    return -(logits.log_softmax(-1) * positive).sum(-1).mean()


def build_identity(build: Build) -> None:
    """Train and save `identity`, on pictures that are drawn for every step anew."""
    torch.manual_seed(build.seed + 2)
    model = new_encoder().to(build.device)
    eager_attention(model)

    def lesson(draw: Draw) -> Lesson:
        subjects = new_subjects(draw.rng, PLAN.batch // 2)
        images = np.stack([view(subject, draw.rng) for subject in (*subjects, *subjects)])
        sharp = soften(to_tensor(images), draw)
        smudges = smear(sharp[: len(subjects) : 2], int(draw.rng.choice(SMEARED)))
        labels = torch.cat(
            (torch.arange(len(subjects)).repeat(2), len(subjects) + torch.arange(len(smudges)))
        )
        return normalize(torch.cat((sharp, smudges))), labels

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with build.autocast():
            features = model(pixel_values=images).last_hidden_state[:, 0]
        return info_nce(features, labels)

    build.fit("identity", model, PLAN, lesson, loss)
    folder = build.out / "identity"
    save_half(model.eval(), folder)
    BitImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD),
    ).save_pretrained(folder)  # fmt: skip
    build.provenance("identity", {"identity": PLAN})
