"""`preference`: `clip` fine-tuned with a Bradley-Terry loss to prefer the right caption and the clean picture."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from pixrl.toy.language import caption
from pixrl.toy.pictures import spoil
from toy_build.clip import SCENES, image_processor, normalize, soften, tokens
from toy_build.pictures import pictures
from toy_build.training import Build, Draw, Lesson, Plan, eager_attention, save_half

PLAN = Plan(steps=600, batch=48, lr=3e-4, warmup=50, weight_decay=0.02, level=0.3, ema=0.99)


def preference(model: CLIPModel, images: Tensor, text_embeds: Tensor) -> Tensor:
    """The scaled cosine of each picture and its prompt, as PickScore computes it (Kirstain et al. 2023)."""
    features = model.get_image_features(pixel_values=images).pooler_output
    cosine = F.cosine_similarity(features.float(), text_embeds.float(), dim=-1)
    scores: Tensor = model.logit_scale.exp() * cosine
    return scores


def build_preference(build: Build) -> None:
    """Fine-tune and save `preference`."""
    torch.manual_seed(build.seed)
    data = pictures(build.work, "even", SCENES, build.seed)
    tokenizer = CLIPTokenizer.from_pretrained(build.out / "clip")
    model = CLIPModel.from_pretrained(build.out / "clip", dtype=torch.float32).to(build.device)
    eager_attention(model)

    def lesson(draw: Draw) -> Lesson:
        """Better pictures, worse ones (spoiled, or of another scene), and prompts."""
        rows = draw.rows(len(data), PLAN.batch)
        better, others = data.tensor(rows), data.tensor(np.roll(rows, 1))
        wrong = torch.from_numpy(draw.rng.random(len(rows)) < 0.5)[:, None, None, None]
        worse = torch.where(wrong, others, spoil(better, draw.rng))
        captions = [caption(data.scene(int(row)), draw.rng) for row in rows]
        return normalize(torch.cat((soften(better, draw), worse))), *tokens(tokenizer, captions)

    def loss(images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        with build.autocast():
            texts = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
            scores = preference(model, images, torch.cat((texts, texts)))
        good, bad = scores.float().chunk(2)
        return -F.logsigmoid(good - bad).mean()

    build.fit("preference", model, PLAN, lesson, loss)
    folder = build.out / "preference"
    save_half(model.eval(), folder)
    CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build.provenance("preference", {"preference": PLAN})
