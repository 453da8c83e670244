"""A checkpoint with random weights in the shape of Stable Diffusion 3.5 Medium, saved in the published folder layout.

T5-XXL is left out, as diffusers allows: its 256 token rows are zeros, so the transformer still sees 333 text tokens.
Prompts are encoded once a run, so the text encoders do not count in a run's time.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from sdxl_shaped import Text, text_config, tokenizer
from transformers import CLIPTextModelWithProjection


@dataclass(frozen=True)
class Sizes:
    """All the sizes that differ between the full and the tiny build."""

    resolution: int
    layers: int
    heads: int
    head: int
    joint: int
    positions: int
    dual: int
    """The first blocks have a second attention over image tokens alone."""
    vae_channels: tuple[int, ...]
    first: Text
    second: Text
    text_rows: int

    @staticmethod
    def full() -> "Sizes":
        """SD3.5-Medium at 512 x 512."""
        channels = (128, 256, 512, 512)
        texts = (Text(768, 12, 12), Text(1280, 32, 20))
        return Sizes(512, 24, 24, 64, 4096, 384, 13, channels, *texts, text_rows=256)

    @staticmethod
    def tiny() -> "Sizes":
        """The same parts in kilobytes."""
        channels = (32, 32, 32, 32)
        return Sizes(64, 2, 2, 16, 64, 16, 1, channels, Text(16, 1, 2), Text(16, 1, 2), text_rows=0)


def build(folder: Path, sizes: Sizes) -> Path:
    """The checkpoint, with random weights from a fixed seed; bfloat16 where there is a GPU."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):
        transformer = SD3Transformer2DModel(
            sample_size=sizes.positions // 3,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=sizes.layers,
            attention_head_dim=sizes.head,
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.joint,
            caption_projection_dim=sizes.heads * sizes.head,
            pooled_projection_dim=sizes.first.width + sizes.second.width,
            pos_embed_max_size=sizes.positions,
            dual_attention_layers=tuple(range(sizes.dual)),
            qk_norm="rms_norm",
        )
        vae = AutoencoderKL(
            block_out_channels=sizes.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        first = CLIPTextModelWithProjection(text_config(sizes.first, words))
        second = CLIPTextModelWithProjection(text_config(sizes.second, words))
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=first,
        tokenizer=words,
        text_encoder_2=second,
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.to(torch.bfloat16 if gpu else torch.float32).save_pretrained(folder)
    card = {"resolution": sizes.resolution, "guidance": 1.0, "max_sequence_length": sizes.text_rows}
    (folder / "pixrl.json").write_text(json.dumps(card))
    return folder
