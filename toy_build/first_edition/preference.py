"""`preference`: `clip` fine-tuned with a Bradley-Terry loss to prefer the right caption and the clean picture."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from pixrl.toy.language import caption
from pixrl.toy.pictures import spoil
from toy_build.first_edition.clip import SCENES, image_processor, normalize, soften, tokens
from toy_build.first_edition.pictures import DrawnPictures, pictures
from toy_build.first_edition.workshop import Draw, Plan, Workshop, eager_attention, save_half

PLAN = Plan(steps=500, batch=48, lr=4e-4, warmup=50, weight_decay=0.02)


def preference_pairs(
    data: DrawnPictures, rows: "np.ndarray[tuple[int], np.dtype[np.int64]]", draw: Draw
) -> tuple[Tensor, Tensor, list[str]]:
    """(better pictures, worse pictures, prompts): the worse one is spoiled, or shows another scene."""
    better = data.tensor(rows)
    others = data.tensor(np.roll(rows, 1))
    wrong = torch.from_numpy(draw.rng.random(len(rows)) < 0.5)
    worse = torch.where(wrong[:, None, None, None], others, spoil(better, draw.rng))
    return soften(better, draw), worse, [caption(data.scene(int(row)), draw.rng) for row in rows]


def preference(model: CLIPModel, images: Tensor, text_embeds: Tensor) -> Tensor:
    """The scaled cosine of each picture and its prompt, as PickScore computes it."""
    features = model.get_image_features(pixel_values=normalize(images)).pooler_output
    scores: Tensor = model.logit_scale.exp() * F.cosine_similarity(
        features.float(), text_embeds.float(), dim=-1
    )
    return scores


def build_preference(shop: Workshop) -> None:
    """Fine-tune and save `preference`."""
    torch.manual_seed(shop.seed)
    data = pictures(shop.work, "scenes", SCENES, shop.seed)
    tokenizer = CLIPTokenizer.from_pretrained(shop.out / "clip")
    model = CLIPModel.from_pretrained(shop.out / "clip", dtype=torch.float32).to(shop.device).train()
    eager_attention(model)

    def loss(draw: Draw) -> Tensor:
        better, worse, prompts = preference_pairs(data, draw.rows(len(data), PLAN.batch), draw)
        with shop.autocast():
            texts = model.get_text_features(**tokens(tokenizer, prompts, shop.device)).pooler_output
            both = torch.cat((better, worse)).to(shop.device)
            scores = preference(model, both, torch.cat((texts, texts)))
        good, bad = scores.float().chunk(2)
        return -F.logsigmoid(good - bad).mean()

    seconds = shop.fit("preference", model, PLAN, loss)
    folder = shop.folder("preference")
    save_half(model.eval(), folder)
    CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shop.provenance("preference", {"preference": PLAN}, seconds)
