"""`identity`: a DINOv2 encoder in which pictures of one subject are near and other subjects of its kind are far."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from pixrl.toy.pictures import SIDE
from toy_build.first_edition.clip import soften
from toy_build.first_edition.pictures import VIEWS, DrawnPictures, pictures
from toy_build.first_edition.vae import SUBJECT_PICTURES
from toy_build.first_edition.workshop import Draw, Plan, Workshop, eager_attention, save_half

PLAN = Plan(steps=1300, batch=64, lr=1.5e-3, warmup=100, weight_decay=0.05)
TEMPERATURE = 0.1
KINDS_A_BATCH = 8
CUTOUT_SHARE = 0.7
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def new_encoder() -> Dinov2Model:
    return Dinov2Model(Dinov2Config(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=3, image_size=SIDE, patch_size=8,
    ))  # fmt: skip


def normalize(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def subjects_by_kind(data: DrawnPictures) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """For every kind the training subjects of that kind."""
    kinds = [data.scene(s * VIEWS).objects[0].kind for s in range(len(data) // VIEWS)]
    return [np.flatnonzero(np.array(kinds) == kind) for kind in sorted(set(kinds))]


def training_batch(
    data: DrawnPictures, groups: list[np.ndarray[tuple[int], np.dtype[np.int64]]], draw: Draw
) -> tuple[Tensor, Tensor]:
    """Two views each of a few subjects of a few kinds, so that most negatives share the kind: (pictures, subject)."""
    per_kind = PLAN.batch // 2 // KINDS_A_BATCH
    picked = [
        draw.rng.choice(groups[k], per_kind, replace=False)
        for k in draw.rng.choice(len(groups), KINDS_A_BATCH, replace=False)
    ]
    subjects = np.concatenate(picked)
    first, second = np.stack([draw.rng.choice(VIEWS, 2, replace=False) for _ in subjects]).T
    rows = np.concatenate((subjects * VIEWS + first, subjects * VIEWS + second))
    images = data.tensor(rows)
    for i, row in enumerate(rows):
        if draw.rng.random() < CUTOUT_SHARE:
            images[i] = data.cutouts([row])[0]
    return soften(images, draw), torch.from_numpy(np.concatenate((subjects, subjects)))


def info_nce(features: Tensor, labels: Tensor) -> Tensor:
    """Each picture's other view against all pictures of other subjects."""
    unit = F.normalize(features.float(), dim=-1)
    logits = (unit @ unit.T / TEMPERATURE).fill_diagonal_(-1e4)
    positive = (labels[:, None] == labels[None, :]).float().fill_diagonal_(0)
    return -(logits.log_softmax(-1) * positive).sum(-1).mean()


def build_identity(shop: Workshop) -> None:
    """Train and save `identity`."""
    torch.manual_seed(shop.seed)
    data = pictures(shop.work, "subjects", SUBJECT_PICTURES, shop.seed)
    groups = subjects_by_kind(data)
    model = new_encoder().to(shop.device).train()
    eager_attention(model)

    def loss(draw: Draw) -> Tensor:
        images, subjects = training_batch(data, groups, draw)
        with shop.autocast():
            features = model(pixel_values=normalize(images.to(shop.device))).last_hidden_state[:, 0]
        return info_nce(features, subjects.to(shop.device))

    seconds = shop.fit("identity", model, PLAN, loss)
    folder = shop.folder("identity")
    save_half(model.eval(), folder)
    BitImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD),
    ).save_pretrained(folder)  # fmt: skip
    shop.provenance("identity", {"identity": PLAN}, seconds)
