"""What published generators need to train on one picture, estimated without weights. For docs/models.md.

    python benchmarks/memory_estimate.py

The shapes below are written from memory and from diffusers' defaults; the figures are those of `pixrl doctor`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from pixrl.device import Precision
from pixrl.doctor.diagnosis import size
from pixrl.doctor.estimate import Estimate
from pixrl.hub import Checkpoint
from pixrl.hub_check import INDEX
from pixrl.models import adapter_of
from pixrl.models.memory.estimate import empty_pipeline
from pixrl.runs.config import AlignConfig

BF16 = Precision(torch.bfloat16, torch.bfloat16)
REWARDS = [{"name": "clip_text", "options": {"model": "toy:clip"}}]
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}


def sd3(layers: int, heads: int, positions: int, **more: object) -> dict[str, Any]:
    return SD3 | {
        "num_layers": layers,
        "num_attention_heads": heads,
        "caption_projection_dim": 64 * heads,
        "pos_embed_max_size": positions,
        **more,
    }


def flux2(layers: int, single: int, heads: int, language: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": 3 * language,
        "guidance_embeds": False,
    }


MODELS = {
    "SD3 Medium": ("StableDiffusion3Pipeline", sd3(24, 24, 192)),
    "SD3.5 Medium": (
        "StableDiffusion3Pipeline",
        sd3(24, 24, 384, qk_norm="rms_norm", dual_attention_layers=list(range(13))),
    ),
    "SD3.5 Large": ("StableDiffusion3Pipeline", sd3(38, 38, 192, qk_norm="rms_norm")),
    "FLUX.1-dev": ("FluxPipeline", FLUX | {"guidance_embeds": True}),
    "FLUX.1-schnell": ("FluxPipeline", FLUX | {"guidance_embeds": False}),
    "FLUX.2 klein 4B": ("Flux2KleinPipeline", flux2(5, 20, 24, 2560)),
    "FLUX.2 klein 9B": ("Flux2KleinPipeline", flux2(8, 24, 32, 4096)),
    "Z-Image": ("ZImagePipeline", {"in_channels": 16, "cap_feat_dim": 2560}),
    "Qwen-Image": ("QwenImagePipeline", {}),
}
PARTS = {
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", "AutoencoderKL", VAE),
    "FluxPipeline": ("FluxTransformer2DModel", "AutoencoderKL", VAE),
    "Flux2KleinPipeline": (
        "Flux2Transformer2DModel", "AutoencoderKLFlux2", {"block_out_channels": [128, 256, 512, 512]}
    ),
    "ZImagePipeline": ("ZImageTransformer2DModel", "AutoencoderKL", VAE),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", "AutoencoderKLQwenImage", {}),
}  # fmt: skip
"""The classes of the transformer and of the VAE, and the config of that; what is left out is diffusers' default."""


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def texts(pipeline: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The text encoders of a family: name -> class and config."""
    t5 = ("T5EncoderModel", T5_XXL | {"model_type": "t5"})
    clips = [
        (
            kind,
            {
                "model_type": "clip_text_model",
                "vocab_size": 49408,
                "projection_dim": shape["hidden_size"],
                **shape,
            },
        )
        for kind, shape in (("CLIPTextModelWithProjection", CLIP_L), ("CLIPTextModelWithProjection", CLIP_G))
    ]
    if pipeline == "FluxPipeline":
        return {"text_encoder": ("CLIPTextModel", clips[0][1]), "text_encoder_2": t5}
    if pipeline not in ("StableDiffusion3Pipeline", "FluxPipeline"):
        return {}
    return {"text_encoder": clips[0], "text_encoder_2": clips[1], "text_encoder_3": t5}


def folder(place: Path, pipeline: str, transformer: dict[str, Any]) -> Path:
    """The configs of a pipeline, without weights."""
    scheduler = "FlowMatchEulerDiscreteScheduler"
    encoders = texts(pipeline)
    kind, decoder, vae = PARTS[pipeline]
    files = {
        INDEX: {
            "_class_name": pipeline,
            "scheduler": ["diffusers", scheduler],
            "transformer": ["diffusers", kind],
            "vae": ["diffusers", decoder],
            **{name: ["transformers", kind] for name, (kind, _) in encoders.items()},
        },
        "transformer/config.json": transformer,
        "vae/config.json": vae,
        **{f"{name}/config.json": config for name, (_, config) in encoders.items()},
        "scheduler/scheduler_config.json": {"_class_name": scheduler, "shift": 3.0},
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
    }
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(json.dumps(content))
    return place


def row(name: str, pipeline: str, transformer: dict[str, Any], checkpointing: bool) -> str:
    """One line of the table: LoRA of rank 32 on the attention, 512 x 512, no guidance."""
    with tempfile.TemporaryDirectory() as place:
        path = folder(Path(place), pipeline, transformer)
        machine = {"gradient_checkpointing": checkpointing}
        config = AlignConfig.model_validate({"rewards": REWARDS, "machine": machine})
        adapter: Any = adapter_of(Checkpoint(path))
        policy = adapter(
            Checkpoint(path), device="cpu", dtype="float32", resolution=512, steps=10,
            pipeline=empty_pipeline(pipeline, path, BF16),
        )  # fmt: skip
        policy.settings = type(policy.settings)(10, 0.0, 512)
        count = sum(parameter.numel() for parameter in policy.denoiser.parameters())
        estimate = Estimate(policy, policy.blank(), config, BF16)
    trained = estimate.trained
    cells = (
        name,
        f"{count / 1e9:.2f} B",
        size(2 * count),
        size(trained.slots + trained.gradients + trained.optimizer),
        "yes" if checkpointing else "no",
        size(estimate.training.first),
        size(estimate.training.each),
        size(estimate.drawing.first),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    heads = (
        "model",
        "transformer",
        "bfloat16",
        "LoRA and AdamW",
        "checkpointing",
        "training",
        "each further",
        "drawing",
    )
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (pipeline, transformer) in MODELS.items():
        for checkpointing in (False, True):
            print(row(name, pipeline, transformer, checkpointing), flush=True)


if __name__ == "__main__":
    main()
