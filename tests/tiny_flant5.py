"""A tiny CLIP-FlanT5 with random weights: sharded .bin files with everything that is published in them."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!\"':;<>0123456789-"
PIECES = [
    *[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0), ("▁Yes", -2.0), ("▁No", -2.0)],
    *((letter, -4.0) for letter in LETTERS),
]
WIDTH, SPARE = 32, 7


def tokenizer(folder: Path) -> Path:
    """T5's layout, one piece a letter."""
    T5Tokenizer(vocab=PIECES, extra_ids=0).save_pretrained(folder)
    return folder


def vision_tower(folder: Path, seed: int = 0) -> Path:
    """A CLIPVisionModel folder with its preprocessing."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def text_model(seed: int = 1) -> tuple[T5ForConditionalGeneration, nn.Sequential]:
    """T5 with spare rows in its vocabulary, and the projector."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(PIECES) + SPARE,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=2.0,
    )
    projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight.data *= 0.05  # so that no answer is certain
    return model, projector.eval()


def flant5(folder: Path, tower: Path, *, with_tower: bool = True, with_tokenizer: bool = False) -> Path:
    """Two .bin shards with their index, and config.json; with the tower's weights among them, as published."""
    folder.mkdir(parents=True)
    model, projector = text_model()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    weights["embed_tokens.weight"] = weights["shared.weight"].clone()
    weights |= {f"mm_projector.{key}": value for key, value in projector.state_dict().items()}
    if with_tower:
        seen = CLIPVisionModel.from_pretrained(tower).state_dict()
        prefix = "" if next(iter(seen)).startswith("vision_model.") else "vision_model."
        weights |= {f"vision_tower.vision_tower.{prefix}{key}": value for key, value in seen.items()}
        weights["vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    names = sorted(weights)
    shards = {
        f"pytorch_model-0000{number}-of-00002.bin": names[start::2] for number, start in ((1, 0), (2, 1))
    }
    for shard, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, folder / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps(
            model.config.to_dict()
            | {
                "model_type": "clip_t5",
                "architectures": ["CLIPT5ForConditionalGeneration"],
                "mm_vision_tower": str(tower),
                "mm_hidden_size": WIDTH,
                "mm_projector_type": "mlp2x_gelu",
                "mm_vision_select_layer": -2,
                "mm_vision_select_feature": "patch",
                "freeze_mm_mlp_adapter": False,
            }
        )
    )
    if with_tokenizer:
        tokenizer(folder)
    return folder
