"""Tiny OCR checkpoints with random weights: PP-OCRv5's detector and recognizer, and a GOT-OCR2."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessorPil,
    GotOcr2Processor,
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5MobileRecConfig,
    PPOCRV5MobileRecForTextRecognition,
)

from tests.tiny_hpsv3 import tokenizer as byte_level

LETTERS = ["blank", *"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", " "]
_CHANNELS = [(4, 8), (8, 8), (8, 8), (8, 8), (8, 16)]


def _backbone(strides: list[object]) -> dict[str, object]:
    blocks = [[[3, into, out, stride, False]] for (into, out), stride in zip(_CHANNELS, strides, strict=True)]
    return {
        "model_type": "pp_lcnet_v3",
        "divisor": 4,
        "stem_channels": 4,
        "conv_symmetric_num": 1,
        "out_features": ["stage2", "stage3", "stage4", "stage5"],
        "out_indices": [2, 3, 4, 5],
        "block_configs": blocks,
    }


def _liven(model: nn.Module) -> None:
    """Weights so large that something of the picture is left at the end."""
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight)


def detector(folder: Path, seed: int = 0) -> Path:
    """A PP-OCRv5 mobile detector with its preprocessor_config.json; it takes all of a picture for one line."""
    torch.manual_seed(seed)
    config = PPOCRV5MobileDetConfig(
        backbone_config=_backbone([1, 2, 2, 2, 2]), neck_out_channels=16, layer_list_out_channels=[4, 4, 4, 8]
    )
    model = PPOCRV5MobileDetForObjectDetection(config)
    _liven(model)
    model.head.conv_final.bias.data += 20
    model.save_pretrained(folder)
    numbers = {
        "image_processor_type": "PPOCRV5ServerDetImageProcessor",
        "image_mean": [0.406, 0.456, 0.485],
        "image_std": [0.225, 0.224, 0.229],
        "limit_side_len": 960,
        "limit_type": "max",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    return folder


def recognizer(folder: Path, seed: int = 0) -> Path:
    """A PP-OCRv5 mobile recognizer with its letters."""
    torch.manual_seed(seed)
    config = PPOCRV5MobileRecConfig(
        backbone_config=_backbone([1, [2, 1], [2, 1], [1, 2], [2, 1]]),
        hidden_size=16,
        num_attention_heads=2,
        depth=1,
        head_out_channels=len(LETTERS),
    )
    model = PPOCRV5MobileRecForTextRecognition(config)
    _liven(model)
    model.head.head.weight.data *= 40  # so that letters are sure
    model.save_pretrained(folder)
    numbers = {
        "image_processor_type": "PPOCRV5ServerRecImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "character_list": LETTERS,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    return folder


def got(folder: Path, seed: int = 0) -> Path:
    """A GotOcr2ForConditionalGeneration with its processor; 32 x 32 pictures are 4 tokens."""
    words = byte_level()
    words.add_tokens(["<img>", "</img>", "<imgpad>"], special_tokens=True)
    torch.manual_seed(seed)
    config = GotOcr2Config(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.5,
            "bos_token_id": None,
            "eos_token_id": words.convert_tokens_to_ids("<|im_end|>"),
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 32,
            "initializer_range": 0.2,
        },
        image_token_index=words.convert_tokens_to_ids("<imgpad>"),
    )
    GotOcr2ForConditionalGeneration(config).save_pretrained(folder)
    fit = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32})
    GotOcr2Processor(fit, words).save_pretrained(folder)
    return folder
