"""Tiny BLIP checkpoints with random weights: ImageReward's published files, and a BLIP-VQA folder."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ".", '"'),
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *("owl", "cat", "red", "yes", "no"),
]
SIDE = 32
TEXT = {
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "vocab_size": len(WORDS) + 2,
}
"""In med_config.json: BLIP adds two tokens of its own to BERT's vocabulary."""
_TO_BLIP = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers.", "blocks."),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("post_layernorm.", "norm."),
)


def vocabulary(folder: Path) -> Path:
    """A folder with BERT's vocab.txt alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def image_reward_models(seed: int = 0) -> tuple[BlipVisionModel, BlipTextModel, nn.Sequential]:
    """The three parts with the same random weights as `image_reward` writes, for comparison."""
    torch.manual_seed(seed)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=SIDE,
            patch_size=16,
            layer_norm_eps=1e-6,
            initializer_range=0.1,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            **TEXT,
            encoder_hidden_size=64,
            is_decoder=True,
            initializer_range=0.1,
            bos_token_id=2,
            sep_token_id=3,
        ),
        add_pooling_layer=False,
    )
    head = nn.Sequential(
        nn.Linear(32, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    for weight in head.parameters():
        weight.data *= 2  # so that pictures differ by more than rounding
    return vision.eval(), text.eval(), head.eval()


def _blip_name(name: str) -> str:
    for ours, theirs in _TO_BLIP:
        name = name.replace(ours, theirs)
    return name


def image_reward(folder: Path, *, with_vocabulary: bool = True) -> Path:
    """ImageReward.pt under BLIP's names with what training leaves in it, med_config.json and, if wanted, vocab.txt."""
    vision, text, head = image_reward_models()
    vocabulary(folder) if with_vocabulary else folder.mkdir(parents=True)
    weights: dict[str, Tensor] = {
        f"blip.visual_encoder.{_blip_name(key)}": value for key, value in vision.state_dict().items()
    }
    weights |= {f"blip.text_encoder.{key}": value for key, value in text.state_dict().items()}
    weights |= {f"mlp.layers.{key}": value for key, value in head.state_dict().items()}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    weights["blip.visual_encoder_m.cls_token"] = torch.zeros(1, 1, 64)
    weights["blip.queue_ptr"] = torch.zeros(1)
    weights["blip.vision_proj.weight"] = torch.zeros(4, 64)
    torch.save(weights, folder / "ImageReward.pt")
    ignored = {"architectures": ["BertModel"], "encoder_width": 64, "add_cross_attention": True}
    (folder / "med_config.json").write_text(json.dumps(TEXT | ignored))
    return folder


def blip_vqa(folder: Path, *, seed: int = 0) -> Path:
    """A BlipForQuestionAnswering folder with its processor, whose vocabulary ends in [DEC] and [ENC]."""
    words = BertTokenizer.from_pretrained(str(vocabulary(folder)))
    words.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    torch.manual_seed(seed)
    text = TEXT | {
        "bos_token_id": words.convert_tokens_to_ids("[DEC]"),
        "sep_token_id": words.sep_token_id,
        "encoder_hidden_size": 32,
        "initializer_range": 0.3,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 16,
        "initializer_range": 0.3,
    }
    BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), words).save_pretrained(folder)
    return folder
