"""Checkpoints with random weights in the shape of SDXL-Turbo, CLIP ViT-H/14 and a small segmentation network.

They are saved in the published folder layout and loaded as any other, so that what is measured is the product's path.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Text:
    """A CLIP text encoder's size."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Sizes:
    """All the sizes that differ between the full and the tiny build."""

    resolution: int
    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    unet_layers: tuple[int, ...]
    time_embedding: int
    vae_channels: tuple[int, ...]
    first: Text
    second: Text
    clip_text: Text
    clip_vision: Text
    clip_side: int
    clip_patch: int
    clip_width: int

    @staticmethod
    def full() -> "Sizes":
        """SDXL-Turbo and CLIP ViT-H/14."""
        return Sizes(
            resolution=512,
            unet_channels=(320, 640, 1280),
            unet_heads=(5, 10, 20),
            unet_layers=(1, 2, 10),
            time_embedding=256,
            vae_channels=(128, 256, 512, 512),
            first=Text(768, 12, 12),
            second=Text(1280, 32, 20),
            clip_text=Text(1024, 24, 16),
            clip_vision=Text(1280, 32, 16),
            clip_side=224,
            clip_patch=14,
            clip_width=1024,
        )

    @staticmethod
    def tiny() -> "Sizes":
        """The same parts in kilobytes."""
        return Sizes(
            resolution=64,
            unet_channels=(32, 32, 64),
            unet_heads=(2, 2, 4),
            unet_layers=(1, 1, 1),
            time_embedding=8,
            vae_channels=(32, 32, 32, 32),
            first=Text(16, 1, 2),
            second=Text(16, 1, 2),
            clip_text=Text(32, 1, 2),
            clip_vision=Text(32, 1, 2),
            clip_side=28,
            clip_patch=7,
            clip_width=16,
        )


def build(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """The three checkpoints, with random weights from a fixed seed."""
    torch.manual_seed(0)
    return {
        "sdxl": _sdxl(folder / "sdxl", sizes),
        "clip": _clip(folder / "clip", sizes),
        "segmenter": _segmenter(folder / "segmenter"),
    }


def _sdxl(folder: Path, sizes: Sizes) -> Path:
    words = tokenizer(folder / "tokenizer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=sizes.resolution // 8,
            block_out_channels=sizes.unet_channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=sizes.unet_heads,
            transformer_layers_per_block=sizes.unet_layers,
            cross_attention_dim=sizes.first.width + sizes.second.width,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=sizes.time_embedding,
            projection_class_embeddings_input_dim=sizes.second.width + 6 * sizes.time_embedding,
        )
        vae = AutoencoderKL(
            block_out_channels=sizes.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
            force_upcast=False,
        )
        first = CLIPTextModel(text_config(sizes.first, words))
        second = CLIPTextModelWithProjection(text_config(sizes.second, words))
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=words,
        tokenizer_2=words,
        scheduler=scheduler,
    )
    half = torch.float16 if device == "cuda" else torch.float32
    pipeline.to(half).save_pretrained(folder)
    (folder / "pixrl.json").write_text(json.dumps({"resolution": sizes.resolution}))
    return folder


def _clip(folder: Path, sizes: Sizes) -> Path:
    words = tokenizer(folder)
    vision: dict[str, Any] = {
        "hidden_size": sizes.clip_vision.width,
        "intermediate_size": 4 * sizes.clip_vision.width,
        "num_hidden_layers": sizes.clip_vision.layers,
        "num_attention_heads": sizes.clip_vision.heads,
        "image_size": sizes.clip_side,
        "patch_size": sizes.clip_patch,
        "projection_dim": sizes.clip_width,
    }
    text = text_config(sizes.clip_text, words).to_dict() | {"projection_dim": sizes.clip_width}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.clip_width)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    side = sizes.clip_side
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(folder)
    return folder


def _segmenter(folder: Path) -> Path:
    """Segformer B0 whose last layer calls everything foreground: random weights have no opinion."""
    labels = {0: "background", 1: "object"}
    model = SegformerForSemanticSegmentation(
        SegformerConfig(id2label=labels, label2id={name: i for i, name in labels.items()})
    )
    with torch.no_grad():
        model.decode_head.classifier.weight.zero_()
        model.decode_head.classifier.bias.copy_(torch.tensor([-1.0, 1.0]))
    model.save_pretrained(folder)
    SegformerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


def text_config(size: Text, words: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=TOKENS,
        projection_dim=size.width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level tokenizer without merges."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(c) for c in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), _START, _END]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=TOKENS)
