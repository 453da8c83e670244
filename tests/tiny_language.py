"""Tiny checkpoints of models that read prompts with a language model: the real classes in the published layout."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests import tiny

CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""One turn of a chat as Qwen3's template writes it."""
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1
}  # fmt: skip
"""The sizes of every language model here."""
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VISION_IDS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
Z_IMAGE_CARD: dict[str, object] = {"steps": 4, "guidance": 0.0, "resolution": 32, "max_sequence_length": 64}
QWEN_CARD: dict[str, object] = Z_IMAGE_CARD | {"max_sequence_length": 192}
EDIT_CARD: dict[str, object] = Z_IMAGE_CARD | {"max_sequence_length": 400}


def tokenizer() -> Qwen2Tokenizer:
    """A byte-level Qwen2Tokenizer without merges, with Qwen3's special tokens and template."""
    words = Qwen2Tokenizer(
        vocab={symbol: n for n, symbol in enumerate(tiny.symbols())},
        merges=[],
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    words.chat_template = CHAT
    return words


def z_image(
    folder: Path, *, seed: int = 0, shift: float = 3.0, card: dict[str, object] | None = None
) -> Path:
    """A ZImagePipeline folder with a Qwen3 encoder; Turbo's schedule is shifted by 3, that of the base model by 6."""
    torch.manual_seed(seed)
    words = tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    tiny.make_lively(transformer)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    pipeline = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny.vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**SIZES, vocab_size=len(words), num_hidden_layers=3, head_dim=8)),
        tokenizer=words,
    )
    return _saved(pipeline, folder, Z_IMAGE_CARD if card is None else card)


def flux2_klein(folder: Path, *, seed: int = 0, distilled: bool = False) -> Path:
    """A Flux2KleinPipeline folder with a Qwen3 encoder as deep as its pipeline reads, and a VAE with a batch norm."""
    torch.manual_seed(seed)
    words = tokenizer()
    text = Qwen3Config(
        **SIZES, vocab_size=len(words), num_hidden_layers=28, head_dim=8, tie_word_embeddings=True
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    tiny.make_lively(transformer)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(8)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 3)
    pipeline = Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=words,
        is_distilled=distilled,
    )
    return _saved(pipeline, folder, Z_IMAGE_CARD)


def qwen_image(folder: Path, *, seed: int = 0) -> Path:
    """A QwenImagePipeline folder with a Qwen2.5-VL encoder and a VAE of video, and the published schedule."""
    return _saved(QwenImagePipeline(**_qwen_parts(seed)), folder, QWEN_CARD)


def qwen_edit(folder: Path, *, seed: int = 0, zero_cond_t: bool = True) -> Path:
    """A QwenImageEditPlusPipeline folder, with what is known of its processor without torchvision.

    `zero_cond_t`: references are modulated as clean, as in the edition of November 2025.
    """
    parts = _qwen_parts(seed, zero_cond_t=zero_cond_t)
    _saved(QwenImageEditPlusPipeline(**parts, processor=None), folder, EDIT_CARD)
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(folder / "processor")
    parts["tokenizer"].save_pretrained(folder / "processor")
    return folder


def _qwen_parts(seed: int, **transformer_settings: object) -> dict[str, Any]:
    torch.manual_seed(seed)
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *VISION]})
    ids = dict(zip(VISION_IDS, words.convert_tokens_to_ids(VISION), strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=SIZES | {"vocab_size": len(words), "num_hidden_layers": 2, "rope_parameters": rope},
        vision_config=sight | {"fullatt_block_indexes": [0]},
        **ids,
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        **transformer_settings,
    )
    tiny.make_lively(transformer)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        "vae": _video_vae(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": words,
    }


def _video_vae() -> AutoencoderKLQwenImage:
    model = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.9, -0.2],
        latents_std=[2.8, 1.4, 2.3, 1.2],
    )
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(8)
    return model


def _saved(pipeline: DiffusionPipeline, folder: Path, card: dict[str, object]) -> Path:
    pipeline.save_pretrained(folder)
    (folder / "pixrl.json").write_text(json.dumps(card))
    return folder
