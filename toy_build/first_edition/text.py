"""A tiny T5 encoder for FLUX's second text slot: it learns to give `clip`'s features of the same words."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from pixrl.toy.language import caption
from toy_build.first_edition.clip import SCENES, WIDTH
from toy_build.first_edition.pictures import pictures
from toy_build.first_edition.tokenizers import T5_LENGTH, t5_tokenizer
from toy_build.first_edition.workshop import Draw, Plan, Workshop

PLAN = Plan(steps=400, batch=128, lr=3e-3, warmup=50, weight_decay=0.0)


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    ))  # fmt: skip


def train_t5(shop: Workshop) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Distil the text tower of `clip`: both tokenizers give one token a word, so word i is compared with word i."""
    tokenizer = t5_tokenizer()
    clip_tokenizer = CLIPTokenizer.from_pretrained(shop.out / "clip")
    teacher = (
        CLIPTextModelWithProjection.from_pretrained(shop.out / "clip", dtype=torch.float32)
        .eval()
        .to(shop.device)
    )
    student = new_t5(tokenizer).to(shop.device)
    data = pictures(shop.work, "scenes", SCENES, shop.seed)

    def loss(draw: Draw) -> Tensor:
        captions = [caption(data.scene(int(row)), draw.rng) for row in draw.rows(len(data), PLAN.batch)]
        with torch.no_grad():
            ids = clip_tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(
                shop.device
            )
            wanted = teacher(input_ids=ids).last_hidden_state[:, 1:]
        batch = tokenizer(captions, padding="max_length", max_length=T5_LENGTH, return_tensors="pt").to(
            shop.device
        )
        states = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        words: Tensor = batch.attention_mask[:, :-1, None].float()
        return (F.mse_loss(states[:, :-1], wanted, reduction="none") * words).sum() / (words.sum() * WIDTH)

    shop.fit("t5", student, PLAN, loss)
    return student.eval(), tokenizer


def t5_features(model: T5EncoderModel, tokenizer: T5Tokenizer, captions: list[str]) -> Tensor:
    """FLUX's token features, padding included as its pipeline does (no mask): [B, L, D], half precision."""
    out = []
    with torch.inference_mode():
        for part in np.array_split(np.array(captions, dtype=object), max(len(captions) // 512, 1)):
            batch = tokenizer(
                list(part), padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
            )
            out.append(model(batch.input_ids.to(model.device)).last_hidden_state.half().cpu())
    return torch.cat(out)
