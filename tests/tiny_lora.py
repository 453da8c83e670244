"""LoRAs of the tiny SD3: by diffusers' names, and as peft itself saves them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

WIDTH, RANK = 16, 4
BLOCK = "transformer_blocks.0.attn"
TARGETS = [f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")]
TARGETS += [f"attn.{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]
"""Those of Flow-GRPO and DiffusionNFT."""


def tensors(*modules: str, rank: int = RANK) -> dict[str, Tensor]:
    """A LoRA by diffusers' names, on to_q and to_k unless others are named."""
    generator, found = torch.Generator().manual_seed(3), {}
    for module in modules or (f"{BLOCK}.to_q", f"{BLOCK}.to_k"):
        found[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, WIDTH, generator=generator)
        found[f"transformer.{module}.lora_B.weight"] = torch.randn(WIDTH, rank, generator=generator)
    return found


def peft_folder(folder: Path, model: Path | nn.Module, **config: Any) -> dict[str, Tensor]:
    """What peft itself saves of a module (or a tiny SD3) with random adapters, and the weights that it merges."""
    transformer = (
        model
        if isinstance(model, nn.Module)
        else SD3Transformer2DModel.from_pretrained(model / "transformer")
    )
    settings = {"r": RANK, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": TARGETS}
    made = get_peft_model(transformer, LoraConfig(**(settings | config)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    made.save_pretrained(folder)
    merged: nn.Module = made.merge_and_unload()
    return merged.state_dict()
