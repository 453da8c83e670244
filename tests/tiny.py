"""Tiny checkpoints with random weights: the real diffusers / transformers classes in the published folder layout."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
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
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_LENGTH = 32
KINDS = ("background", "owl", "snail", "cat")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def symbols() -> list[str]:
    """The 256 characters that stand for the bytes in a byte-level vocabulary."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(c) for c in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def tokenizer(folder: Path, length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """A byte-level tokenizer without merges: every text can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    known = symbols()
    words = [*known, *(f"{symbol}</w>" for symbol in known), _START, _END]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=length)


def _text_settings(words: CLIPTokenizer, width: int) -> dict[str, object]:
    return {
        "vocab_size": len(words),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": words.model_max_length,
        "projection_dim": width,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "hidden_act": "gelu",
    }


def clip(folder: Path, *, side: int = 28, seed: int = 0, **preprocessing: object) -> Path:
    """A CLIPModel folder with tokenizer and preprocessor_config.json."""
    words = tokenizer(folder)
    torch.manual_seed(seed)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=_text_settings(words, 32),
        vision_config=vision | {"image_size": side, "patch_size": side // 4, "projection_dim": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    sizes: dict[str, object] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessor(**(sizes | preprocessing)).save_pretrained(folder)
    return folder


def segmenter(folder: Path, *, seed: int = 0, labels: Sequence[str] = KINDS) -> Path:
    """A SegformerForSemanticSegmentation folder over `labels`."""
    torch.manual_seed(seed)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        id2label=dict(enumerate(labels)),
        label2id={label: n for n, label in enumerate(labels)},
    )
    model = SegformerForSemanticSegmentation(config)
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    SegformerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


def vae(latent_channels: int, **settings: float) -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **settings,
    )
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(8)
    return model


def sd3(
    folder: Path,
    *,
    seed: int = 0,
    card: dict[str, object] | None = None,
    half: bool = False,
    with_t5: bool = False,
    dual: bool = False,
) -> Path:
    """A StableDiffusion3Pipeline folder, without T5 unless asked, and with a pixrl.json unless `card` is None.

    With T5 all widths differ, as published: CLIP-L 16, CLIP-G 24, T5 48. `dual`: the first block has a second attention
    over the image's tokens, as in SD3.5 Medium.
    """
    torch.manual_seed(seed)
    words = tokenizer(folder / "tokenizer")
    first, second, joint = (16, 24, 48) if with_t5 else (16, 16, 32)
    t5, pieces = _t5(joint)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=joint,
        caption_projection_dim=16,
        pooled_projection_dim=first + second,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,) if dual else (),
    )
    make_lively(transformer)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**_text_settings(words, first))),
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**_text_settings(words, second))),
        tokenizer_2=words,
        text_encoder_3=T5EncoderModel(t5) if with_t5 else None,
        tokenizer_3=pieces if with_t5 else None,
    )
    pipeline.to(torch.float16 if half else torch.float32).save_pretrained(folder)
    if card is not None:
        (folder / "pixrl.json").write_text(json.dumps(card))
    return folder


SD3_CARD: dict[str, object] = {"steps": 4, "guidance": 0.0, "resolution": 32, "max_sequence_length": 0}


def sdxl_base(folder: Path, *, prediction: str = "epsilon", spacing: str = "leading") -> Path:
    """A StableDiffusionXLPipeline folder as the base model publishes it: Euler steps, of the noise or of v."""
    sdxl(folder, second=24)
    scheduler = EulerDiscreteScheduler(**SDXL_LEVELS, timestep_spacing=spacing, prediction_type=prediction)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


SDXL_LEVELS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def sdxl(folder: Path, *, seed: int = 0, second: int = 16) -> Path:
    """A StableDiffusionXLPipeline folder as SDXL-Turbo publishes it: ancestral Euler, trailing timesteps.

    `second`: the second text encoder's width; the first one's is 16.
    """
    torch.manual_seed(seed)
    words = tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=second + 6 * 8,
        cross_attention_dim=16 + second,
    )
    make_lively(unet)
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(**SDXL_LEVELS, timestep_spacing="trailing"),
        vae=vae(4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_text_settings(words, 16))),
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**_text_settings(words, second))),
        tokenizer_2=words,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    (folder / "pixrl.json").write_text(json.dumps({"steps": 2, "guidance": 0.0, "resolution": 32}))
    return folder


def flux(folder: Path, *, seed: int = 0, guidance_embeds: bool = False) -> Path:
    """A FluxPipeline folder with a CLIP and a T5 encoder."""
    torch.manual_seed(seed)
    words = tokenizer(folder / "tokenizer")
    t5, pieces = _t5(32)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    make_lively(transformer)
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_text_settings(words, 32))),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=pieces,
    )
    pipeline.save_pretrained(folder)
    card = {"steps": 4, "guidance": 3.5, "resolution": 32, "max_sequence_length": 48}
    (folder / "pixrl.json").write_text(json.dumps(card))
    return folder


def _t5(width: int) -> tuple[T5Config, T5Tokenizer]:
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces = T5Tokenizer(vocab=[*letters, *((chr(c), -2.0) for c in range(33, 127))], extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    return config, pieces


def make_lively(model: torch.nn.Module) -> None:
    """Random weights large enough that the text changes the picture visibly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
