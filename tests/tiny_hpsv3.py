"""A tiny HPSv3 with random weights: HPSv3.safetensors under transformers 4.45's names, and its Qwen2-VL's folder."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WIDTH = 32


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, without merges, with Qwen2-VL's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL),
    )


def config(words: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Two layers each; one row of the vocabulary more than the tokenizer has, and some to spare, as published."""
    number = {token: words.convert_tokens_to_ids(token) for token in SPECIAL}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(words) + 9,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
            "bos_token_id": number["<|endoftext|>"],
            "eos_token_id": number["<|im_end|>"],
            "initializer_range": 0.3,
        },
        vision_config={
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "initializer_range": 0.3,
        },
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )


def models_of(words: PreTrainedTokenizerFast, seed: int = 0) -> tuple[Qwen2VLModel, nn.Sequential]:
    """The trunk, with one embedding a token and one for <|Reward|>, and the head with its dropout."""
    torch.manual_seed(seed)
    shrunk = config(words)
    shrunk.text_config.vocab_size = len(words) + 1
    head = nn.Sequential(
        nn.Linear(WIDTH, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
    for weight in head.parameters():
        weight.data *= 3  # so that pictures differ by more than rounding
    return Qwen2VLModel(shrunk).eval(), head.eval()


def hpsv3(folder: Path) -> Path:
    """HPSv3.safetensors alone, as published."""
    folder.mkdir(parents=True)
    words = tokenizer()
    trunk, head = models_of(words)
    weights = {
        key.replace("language_model.", "model.", 1): value.clone()
        for key, value in trunk.state_dict().items()
    }
    weights |= {f"rm_head.{key}": value.clone() for key, value in head.state_dict().items()}
    weights["lm_head.weight"] = torch.zeros(len(words) + 1, WIDTH)
    save_file(weights, folder / "HPSv3.safetensors")
    return folder


def qwen2_vl(folder: Path) -> Path:
    """The config and tokenizer of the Qwen2-VL that it was trained from, without weights."""
    words = tokenizer()
    words.save_pretrained(folder)
    config(words).save_pretrained(folder)
    return folder
