"""A tiny DINOv2 encoder with random weights, in the published folder layout."""

from pathlib import Path

import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model


def dino(folder: Path, *, side: int = 28, seed: int = 0) -> Path:
    """A Dinov2Model folder with its preprocessor_config.json."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=side, patch_size=7
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    return folder
