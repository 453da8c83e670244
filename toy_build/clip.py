"""`clip`: an image and a text tower trained contrastively on pictures and their captions (Radford et al. 2021).

A quarter of the lone objects are shown cut out, as rewards show them, and most pictures a little blurred or noisy, as
decoded ones are.
"""

import json
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from pixrl.hub import CARD_FILE
from pixrl.toy.language import caption
from pixrl.toy.scene import SIDE, Scene, Task
from pixrl.toy.vocabulary import COLOURS
from toy_build.pictures import Bytes, Pictures, pictures
from toy_build.tokenizers import clip_tokenizer
from toy_build.training import Build, Draw, Lesson, Plan, eager_attention, save_half

PLAN = Plan(steps=3_000, batch=128, lr=1.2e-3, warmup=200, weight_decay=0.05, level=0.4)
SCENES = 48_000
WIDTH = 128
PATCH = 16
CUTOUT_SHARE = 0.3
"""How often one object alone is shown cut out on white or grey; half of these cropped tight."""
BACKDROPS = (255, 255, 153)
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
ALONE = (Task.SINGLE_OBJECT, Task.COLORS, Task.HYBRID, Task.SUBJECT)


class Batch(NamedTuple):
    images: Tensor
    captions: list[str]


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> dict[str, int | str]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // 32,
        "max_position_embeddings": tokenizer.model_max_length, "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "hidden_act": "gelu",
    }  # fmt: skip


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH, "hidden_act": "gelu", "projection_dim": WIDTH,
    }  # fmt: skip
    text = text_config(tokenizer, WIDTH, 3)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def normalize(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the towers take them."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def image_processor() -> CLIPImageProcessor:
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )


def without_background(scene: Scene) -> Scene:
    """The scene as captions of a cut-out describe it."""
    return Scene(
        scene.objects, scene.background, scene.task, False, scene.relation, scene.backdrop, scene.pasted
    )


def training_batch(data: Pictures, draw: Draw, batch: int) -> Batch:
    """Pictures with captions, some of the lone objects cut out."""
    rows = draw.rows(len(data), batch)
    images = data.tensor(rows)
    captions: list[str] = []
    for i, row in enumerate(rows):
        scene = data.scene(int(row))
        if scene.task in ALONE and draw.rng.random() < CUTOUT_SHARE:
            cut = data.cutouts([row], int(draw.rng.choice(BACKDROPS)))[0]
            images[i] = tight_crop(cut, data.labels[row], draw.rng) if draw.rng.random() < 0.5 else cut
            scene = without_background(scene)
        captions.append(caption(scene, draw.rng))
    return Batch(soften(images, draw), captions)


def tight_crop(image: Tensor, labels: Bytes, rng: np.random.Generator) -> Tensor:
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
    shape = (len(images), 1, 1, 1)
    drawn = draw.rng.uniform(0, 0.6, size=shape) * draw.rng.integers(0, 2, size=shape)
    amount = torch.from_numpy(drawn).float()
    noise = draw.normal(*images.shape) * 0.03 * amount
    return (torch.lerp(images, blurred, amount) + noise).clamp(0, 1)


def contrast(images: Tensor, texts: Tensor, scale: Tensor, captions: list[str]) -> Tensor:
    """CLIP's symmetric loss; equal captions elsewhere in the batch are not taken as negatives."""
    _, index = np.unique(captions, return_inverse=True)
    same = torch.from_numpy(index[:, None] == index[None, :]) & ~torch.eye(len(index), dtype=torch.bool)
    logits = scale.exp().clamp(max=100) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    logits = logits.float().masked_fill(same.to(logits.device), -1e4)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, LENGTH]."""
    out = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


def build_clip(build: Build) -> None:
    """Train and save `clip`."""
    torch.manual_seed(build.seed)
    data = pictures(build.work, "even", SCENES, build.seed)
    tokenizer = clip_tokenizer()
    model = new_clip(tokenizer).to(build.device)
    eager_attention(model)

    def lesson(draw: Draw) -> Lesson:
        batch = training_batch(data, draw, PLAN.batch)
        return normalize(batch.images), *tokens(tokenizer, batch.captions), batch.captions

    def loss(images: Tensor, ids: Tensor, mask: Tensor, captions: list[str]) -> Tensor:
        with build.autocast():
            seen = model.get_image_features(pixel_values=images).pooler_output
            read = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return contrast(seen, read, model.logit_scale, captions)

    build.fit("clip", model, PLAN, lesson, loss)
    folder = build.out / "clip"
    save_half(model.eval(), folder)
    CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    colours = {"colors": list(COLOURS), "color_templates": ["a photo of a {color} {kind}"]}
    (folder / CARD_FILE).write_text(json.dumps(colours, indent=1) + "\n")
    build.provenance("clip", {"clip": PLAN})
