"""`segmenter`: a SegFormer that labels every pixel with its kind; foreground, objects and counts come from it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from pixrl.toy.pictures import SIDE
from pixrl.toy.vocabulary import KINDS
from toy_build.first_edition.clip import IMAGE_MEAN, IMAGE_STD, SCENES, normalize, soften
from toy_build.first_edition.pictures import pictures
from toy_build.first_edition.workshop import Draw, Plan, Workshop, save_half

PLAN = Plan(steps=1800, batch=32, lr=2e-3, warmup=100, ema=0.995)


def new_segmenter() -> SegformerForSemanticSegmentation:
    names = ["background", *KINDS]
    config = SegformerConfig(
        depths=[1, 2, 2, 2], hidden_sizes=[32, 48, 64, 96], strides=[2, 2, 2, 2], patch_sizes=[5, 3, 3, 3],
        num_attention_heads=[1, 2, 4, 4], sr_ratios=[8, 4, 2, 1], mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=64,
        id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)},
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


def flip(images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Mirror half of the pictures."""
    mirrored = torch.from_numpy(draw.rng.random(len(images)) < 0.5)
    images, labels = images.clone(), labels.clone()
    images[mirrored], labels[mirrored] = images[mirrored].flip(-1), labels[mirrored].flip(-1)
    return images, labels


def build_segmenter(shop: Workshop) -> None:
    """Train and save `segmenter`."""
    torch.manual_seed(shop.seed)
    data = pictures(shop.work, "scenes", SCENES, shop.seed)
    model = new_segmenter().to(shop.device).train()

    def loss(draw: Draw) -> Tensor:
        rows = draw.rows(len(data), PLAN.batch)
        labels = torch.from_numpy(np.asarray(data.labels[rows])).long()
        images, labels = flip(soften(data.tensor(rows), draw), labels, draw)
        with shop.autocast():
            logits = model(pixel_values=normalize(images.to(shop.device))).logits
        full = F.interpolate(logits.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        return F.cross_entropy(full, labels.to(shop.device))

    seconds = shop.fit("segmenter", model, PLAN, loss)
    folder = shop.folder("segmenter")
    save_half(model.eval(), folder)
    size = {"height": SIDE, "width": SIDE}
    SegformerImageProcessor(
        size=size, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    ).save_pretrained(folder)
    shop.provenance("segmenter", {"segmenter": PLAN}, seconds)
