"""`clip`: image and text towers trained contrastively, and a second text tower for the generator's second encoder."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from pixrl.hub import CARD_FILE
from pixrl.toy.language import caption
from pixrl.toy.pictures import SIDE
from pixrl.toy.scene import Task
from pixrl.toy.vocabulary import COLOURS
from toy_build.first_edition.pictures import DrawnPictures, pictures, without_background
from toy_build.first_edition.processes import leads
from toy_build.first_edition.tokenizers import clip_tokenizer
from toy_build.first_edition.workshop import Draw, Plan, Workshop, eager_attention, save_half

PLAN = Plan(steps=1500, batch=128, lr=1.5e-3, warmup=150, weight_decay=0.05)
SCENES = 48_000
WIDTH = 128
SECOND_WIDTH = 64
CUTOUT_SHARE = 0.25
"""How often one object alone is shown cut out on white or grey, as rewards show it; half of these cropped tight."""
BACKDROPS = (255, 255, 153)
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
ALONE = (Task.SINGLE_OBJECT, Task.COLORS, Task.SUBJECT)


class Towers(nn.Module):
    """What trains together."""

    def __init__(self, model: CLIPModel, second_text: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.model, self.second_text = model, second_text


class Batch(NamedTuple):
    images: Tensor
    captions: list[str]


def second_text_tower(shop: Workshop) -> Path:
    """Where the second text tower lies: the build's own, or, when only shipped checkpoints are left, `sd3`'s copy."""
    built = shop.work / "text_encoder_2"
    return built if built.exists() else shop.out / "sd3" / "text_encoder_2"


def text_config(tokenizer: CLIPTokenizer, width: int) -> dict[str, int | str]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": width // 32, "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "hidden_act": "gelu",
    }  # fmt: skip


def new_towers(tokenizer: CLIPTokenizer) -> Towers:
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": 8, "hidden_act": "gelu", "projection_dim": WIDTH,
    }  # fmt: skip
    model = CLIPModel(
        CLIPConfig(text_config=text_config(tokenizer, WIDTH), vision_config=vision, projection_dim=WIDTH)
    )
    return Towers(model, CLIPTextModelWithProjection(CLIPTextConfig(**text_config(tokenizer, SECOND_WIDTH))))


def normalize(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the towers take them."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def image_processor() -> CLIPImageProcessor:
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )


def training_batch(data: DrawnPictures, draw: Draw, batch: int) -> Batch:
    """Pictures with captions, some of the lone objects cut out."""
    rows = draw.rows(len(data), batch)
    images = data.tensor(rows)
    captions: list[str] = []
    for i, row in enumerate(rows):
        scene = data.scene(int(row))
        if scene.task in ALONE and draw.rng.random() < CUTOUT_SHARE / 0.42:
            backdrop = int(draw.rng.choice(BACKDROPS))
            cut = data.cutouts([row], backdrop)
            images[i] = tight_crop(cut[0], data.labels[row], draw.rng) if draw.rng.random() < 0.5 else cut[0]
            scene = without_background(scene)
        captions.append(caption(scene, draw.rng))
    return Batch(soften(images, draw), captions)


def tight_crop(
    image: Tensor, labels: "np.ndarray[tuple[int, int], np.dtype[np.uint8]]", rng: np.random.Generator
) -> Tensor:
    """The square around the object, with a little room, resized to the full side."""
    ys, xs = np.nonzero(labels)
    reach = 0.5 * max(np.ptp(ys), np.ptp(xs)) * rng.uniform(1.0, 1.3) + 1
    top, left = max(int(ys.mean() - reach), 0), max(int(xs.mean() - reach), 0)
    crop = image[:, top : int(ys.mean() + reach) + 1, left : int(xs.mean() + reach) + 1]
    resized = F.interpolate(crop[None], (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)


def soften(images: Tensor, draw: Draw) -> Tensor:
    """Slight blur and noise on half of the pictures, as decoded pictures have."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.from_numpy(
        draw.rng.uniform(0, 0.6, size=(len(images), 1, 1, 1))
        * draw.rng.integers(0, 2, size=(len(images), 1, 1, 1))
    ).float()
    noise = draw.normal(*images.shape) * 0.03 * amount
    return (torch.lerp(images, blurred, amount) + noise).clamp(0, 1)


def contrast(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric loss; equal captions elsewhere in the batch are not taken as negatives."""
    logits = scale.exp().clamp(max=100) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    logits = logits.float().masked_fill(same, -1e4)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def tokens(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    out = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return {"input_ids": out.input_ids.to(device), "attention_mask": out.attention_mask.to(device)}


def build_clip(shop: Workshop) -> None:
    """Train and save `clip`; the second text tower waits in the work folder for the generator."""
    torch.manual_seed(shop.seed)
    data = pictures(shop.work, "scenes", SCENES, shop.seed)
    tokenizer = clip_tokenizer()
    towers = new_towers(tokenizer).to(shop.device)
    eager_attention(towers.model)
    eager_attention(towers.second_text)

    def loss(draw: Draw) -> Tensor:
        batch = training_batch(data, draw, PLAN.batch)
        ids = tokens(tokenizer, batch.captions, shop.device)
        _, index = np.unique(batch.captions, return_inverse=True)
        same = torch.from_numpy(index[:, None] == index[None, :]) & ~torch.eye(len(index), dtype=torch.bool)
        same = same.to(shop.device)
        with shop.autocast():
            images = towers.model.get_image_features(
                pixel_values=normalize(batch.images.to(shop.device))
            ).pooler_output
            texts = towers.model.get_text_features(**ids).pooler_output
            second = towers.second_text(**ids).text_embeds
        scale = towers.model.logit_scale
        return contrast(images, texts, scale, same) + 0.5 * contrast(images, second, scale, same)

    seconds = shop.fit("clip", towers, PLAN, loss)
    towers.eval()
    folder = shop.folder("clip")
    save_half(towers.model, folder)
    CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    colours = {"colors": list(COLOURS), "color_templates": ["a photo of a {color} {kind}"]}
    (folder / CARD_FILE).write_text(json.dumps(colours, indent=1) + "\n")
    if leads():
        save_half(towers.second_text, shop.work / "text_encoder_2")
    shop.provenance("clip", {"clip": PLAN}, seconds)
