"""A tiny Mask2Former with random weights in both published layouts: the hub's folder and OpenMMLab's .pth file."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from pixrl.rewards.zoo.mask2former import CLASSES

RESOLUTION = 64
"""Shorter side that pictures are scaled to; the published one is 800."""


def mask2former(
    folder: Path, *, seed: int = 0, labels: tuple[str, ...] = CLASSES, sure: float = 30.0
) -> Path:
    """A folder as facebook publishes it; its preprocessing asks for 384 x 384, as theirs does.

    `sure`: how far apart the class logits are, so that some instances pass GenEval's thresholds.
    """
    torch.manual_seed(seed)
    swin = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 1, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=swin,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_layers=1,
            encoder_feedforward_dim=48,
            decoder_layers=3,
            dim_feedforward=64,
            num_attention_heads=4,
            num_queries=12,
            id2label=dict(enumerate(labels)),
            label2id={label: n for n, label in enumerate(labels)},
        )
    )
    with torch.no_grad():
        model.class_predictor.weight.normal_().mul_(sure / 30)
        for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
            parameter.mul_(3)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # random ones, so that a mix-up of names shows
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)
    (folder / "pixrl.json").write_text(json.dumps({"resolution": RESOLUTION}))
    return folder


def openmmlab_file(folder: Path, file: Path) -> Path:
    """The weights of such a folder as OpenMMLab keeps them."""
    state = to_mmdet(load_file(folder / "model.safetensors"))
    state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(16, 16)
    meta: dict[str, Any] = {"mmdet_version": "2.25.0", "CLASSES": ("person", "bicycle"), "epoch": 50}
    torch.save({"meta": meta, "state_dict": state}, file)
    return file


PIXEL, HEAD = "model.pixel_level_module.", "panoptic_head."
BLOCK = r"encoder\.encoder\.layers\.(\d+)\.blocks\.(\d+)\."
TO_MMDET = (
    (r"encoder\.embeddings\.patch_embeddings\.", "backbone.patch_embed."),
    (r"encoder\.embeddings\.norm\.", "backbone.patch_embed.norm."),
    (rf"{BLOCK}attention\.output\.dense", r"backbone.stages.\1.blocks.\2.attn.w_msa.proj"),
    (rf"{BLOCK}attention\.self\.relative", r"backbone.stages.\1.blocks.\2.attn.w_msa.relative"),
    (rf"{BLOCK}attention\.self\.(query|key|value)\.", r"backbone.stages.\1.blocks.\2.attn.w_msa.qkv."),
    (rf"{BLOCK}layernorm_before", r"backbone.stages.\1.blocks.\2.norm1"),
    (rf"{BLOCK}layernorm_after", r"backbone.stages.\1.blocks.\2.norm2"),
    (rf"{BLOCK}intermediate\.dense", r"backbone.stages.\1.blocks.\2.ffn.layers.0.0"),
    (rf"{BLOCK}output\.dense", r"backbone.stages.\1.blocks.\2.ffn.layers.1"),
    (r"encoder\.encoder\.layers\.(\d+)\.downsample", r"backbone.stages.\1.downsample"),
    (r"decoder\.input_projections\.(\d+)\.0", rf"{HEAD}pixel_decoder.input_convs.\1.conv"),
    (r"decoder\.input_projections\.(\d+)\.1", rf"{HEAD}pixel_decoder.input_convs.\1.gn"),
    (r"decoder\.adapter_1\.0", f"{HEAD}pixel_decoder.lateral_convs.0.conv"),
    (r"decoder\.adapter_1\.1", f"{HEAD}pixel_decoder.lateral_convs.0.gn"),
    (r"decoder\.layer_1\.0", f"{HEAD}pixel_decoder.output_convs.0.conv"),
    (r"decoder\.layer_1\.1", f"{HEAD}pixel_decoder.output_convs.0.gn"),
    (r"decoder\.mask_projection", f"{HEAD}pixel_decoder.mask_feature"),
    (r"decoder\.level_embed$", f"{HEAD}pixel_decoder.level_encoding.weight"),
    (r"(decoder\.encoder\.layers\.\d+\.)self_attn_layer_norm", r"\1norms.0"),
    (r"(decoder\.encoder\.layers\.\d+\.)final_layer_norm", r"\1norms.1"),
    (r"(decoder\.encoder\.layers\.\d+\.)self_attn", r"\1attentions.0"),
    (r"(decoder\.encoder\.layers\.\d+\.)fc1", r"\1ffns.0.layers.0.0"),
    (r"(decoder\.encoder\.layers\.\d+\.)fc2", r"\1ffns.0.layers.1"),
    (r"decoder\.encoder\.", f"{HEAD}pixel_decoder.encoder."),
)
DECODER_TO_MMDET = (
    (r"^decoder\.layernorm", "transformer_decoder.post_norm"),
    (r"cross_attn_layer_norm", "norms.0"),
    (r"self_attn_layer_norm", "norms.1"),
    (r"final_layer_norm", "norms.2"),
    (r"cross_attn", "attentions.0.attn"),
    (r"self_attn\.out_proj", "attentions.1.attn.out_proj"),
    (r"self_attn\.[qkv]_proj\.", "attentions.1.attn.in_proj_"),
    (r"fc1", "ffns.0.layers.0.0"),
    (r"fc2", "ffns.0.layers.1"),
    (r"^decoder\.layers", "transformer_decoder.layers"),
    (r"^queries_embedder", "query_embed"),
    (r"^queries_features", "query_feat"),
)


def to_mmdet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names on disk as mmdet 2.x's, and the tensors in mmdet's order."""
    found: dict[str, list[Tensor]] = {}
    for name in sorted(state, key=_query_key_value):
        to = _mmdet_name(name)
        if to is not None:
            x = state[name]
            found.setdefault(to, []).append(_channel_before_place(x) if "downsample" in name else x)
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in found.items()}


def _query_key_value(name: str) -> tuple[str, int]:
    """A sort that keeps an attention's three together, in this order."""
    kinds = (r"\.query\.|\.q_proj\.", r"\.key\.|\.k_proj\.", r"\.value\.|\.v_proj\.")
    place = next((n for n, kind in enumerate(kinds) if re.search(kind, name)), 0)
    return re.sub(r"\.(query|key|value|[qkv]_proj)\.", ".", name), place


def _mmdet_name(name: str) -> str | None:
    if name.startswith("criterion") or ".swin.layernorm" in name:
        return None
    if name.startswith("class_predictor"):
        return HEAD + name.replace("class_predictor", "cls_embed")
    if match := re.search(r"hidden_states_norms\.stage(\d)(.+)", name):
        return f"backbone.norm{int(match[1]) - 1}{match[2]}"
    if match := re.search(r"mask_embedder\.(\d)\.0(.+)", name):
        return f"{HEAD}mask_embed.{2 * int(match[1])}{match[2]}"
    rules = TO_MMDET if name.startswith(PIXEL) else DECODER_TO_MMDET
    given = name.removeprefix(PIXEL).removeprefix("model.transformer_module.")
    to = given
    for pattern, replacement in rules:
        to = re.sub(pattern, replacement, to)
    return to if to.startswith(("backbone.", HEAD)) else HEAD + to


def _channel_before_place(x: Tensor) -> Tensor:
    """From transformers' four patches side by side, (0,0) (1,0) (0,1) (1,1), to nn.Unfold's channel by channel."""
    first, below, right, last = x.chunk(4, dim=-1)
    return torch.stack([first, right, below, last], dim=-1).flatten(-2).contiguous()
