"""OpenMMLab's Mask2Former files (instance segmentation with a Swin backbone), converted to transformers' model.

The same weights are published under mmdet 2.x's names and, where GenEval's download script now points, mmdet 3.x's.

The file is a pickle, `{"meta": ..., "state_dict": ...}`. It is read by torch's restricted unpickler, which makes
tensors and plain containers and runs nothing. Names are turned into those that transformers keeps on disk; the sizes of
the model are read off the tensors, so every Swin size of the family loads.

Two tensors differ by more than their name: mmdet keeps q, k and v of an attention in one matrix, and it merges 2 x 2
patches with the channel before the place, in the order of `nn.Unfold`, where transformers has the place before the
channel, column by column.
"""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from pixrl.errors import CheckpointError
from pixrl.rewards.weights import read_weights

GENEVAL_FILE = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
"""The file of GenEval's detector in OpenMMLab's model zoo."""
URL = f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/{GENEVAL_FILE}"
LEVELS, POINTS = 3, 4
"""Feature maps and sampling points a head of the pixel decoder's deformable attention; fixed in both libraries."""
SHOWN = 3
_PIXEL = "model.pixel_level_module."
_ENCODER, _DECODER = f"{_PIXEL}encoder.", f"{_PIXEL}decoder."
_TRANSFORMER = "model.transformer_module."
_PIXEL_LAYER = r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\."
_DECODER_LAYER = r"^panoptic_head\.transformer_decoder\.layers\.(\d+)\."
_BLOCK = r"^backbone\.stages\.(\d+)\.blocks\.(\d+)\."
_BLOCK_TO = rf"{_ENCODER}encoder.layers.\1.blocks.\2."
_PIXEL_TO = rf"{_DECODER}encoder.layers.\1."
_DECODER_TO = rf"{_TRANSFORMER}decoder.layers.\1."

RENAMED: Mapping[str, str] = {
    r"^backbone\.patch_embed\.projection\.": f"{_ENCODER}embeddings.patch_embeddings.projection.",
    r"^backbone\.patch_embed\.norm\.": f"{_ENCODER}embeddings.norm.",
    rf"{_BLOCK}attn\.w_msa\.proj\.": f"{_BLOCK_TO}attention.output.dense.",
    rf"{_BLOCK}attn\.w_msa\.relative_position_bias_table$": (
        f"{_BLOCK_TO}attention.self.relative_position_bias_table"
    ),
    rf"{_BLOCK}norm1\.": f"{_BLOCK_TO}layernorm_before.",
    rf"{_BLOCK}norm2\.": f"{_BLOCK_TO}layernorm_after.",
    rf"{_BLOCK}ffn\.layers\.0\.0\.": f"{_BLOCK_TO}intermediate.dense.",
    rf"{_BLOCK}ffn\.layers\.1\.": f"{_BLOCK_TO}output.dense.",
    r"^panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.": rf"{_DECODER}input_projections.\1.0.",
    r"^panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.": rf"{_DECODER}input_projections.\1.1.",
    r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.": f"{_DECODER}adapter_1.0.",
    r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.": f"{_DECODER}adapter_1.1.",
    r"^panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.": f"{_DECODER}layer_1.0.",
    r"^panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.": f"{_DECODER}layer_1.1.",
    r"^panoptic_head\.pixel_decoder\.mask_feature\.": f"{_DECODER}mask_projection.",
    r"^panoptic_head\.pixel_decoder\.level_encoding\.weight$": f"{_DECODER}level_embed",
    rf"{_PIXEL_LAYER}attentions\.0\.": f"{_PIXEL_TO}self_attn.",
    rf"{_PIXEL_LAYER}ffns\.0\.layers\.0\.0\.": f"{_PIXEL_TO}fc1.",
    rf"{_PIXEL_LAYER}ffns\.0\.layers\.1\.": f"{_PIXEL_TO}fc2.",
    rf"{_PIXEL_LAYER}norms\.0\.": f"{_PIXEL_TO}self_attn_layer_norm.",
    rf"{_PIXEL_LAYER}norms\.1\.": f"{_PIXEL_TO}final_layer_norm.",
    rf"{_DECODER_LAYER}attentions\.0\.attn\.": f"{_DECODER_TO}cross_attn.",
    rf"{_DECODER_LAYER}attentions\.1\.attn\.out_proj\.": f"{_DECODER_TO}self_attn.out_proj.",
    rf"{_DECODER_LAYER}ffns\.0\.layers\.0\.0\.": f"{_DECODER_TO}fc1.",
    rf"{_DECODER_LAYER}ffns\.0\.layers\.1\.": f"{_DECODER_TO}fc2.",
    rf"{_DECODER_LAYER}norms\.0\.": f"{_DECODER_TO}cross_attn_layer_norm.",
    rf"{_DECODER_LAYER}norms\.1\.": f"{_DECODER_TO}self_attn_layer_norm.",
    rf"{_DECODER_LAYER}norms\.2\.": f"{_DECODER_TO}final_layer_norm.",
    r"^panoptic_head\.transformer_decoder\.post_norm\.": f"{_TRANSFORMER}decoder.layernorm.",
    r"^panoptic_head\.cls_embed\.": "class_predictor.",
    r"^panoptic_head\.query_embed\.": f"{_TRANSFORMER}queries_embedder.",
    r"^panoptic_head\.query_feat\.": f"{_TRANSFORMER}queries_features.",
    r"^panoptic_head\.level_embed\.": f"{_TRANSFORMER}level_embed.",
}
"""mmdet's name (a pattern) -> transformers' name on disk; what follows the pattern is kept."""
OLDER: Mapping[str, str] = {
    rf"({_PIXEL_LAYER}|{_DECODER_LAYER})ffn\.": r"\1ffns.0.",
    rf"({_PIXEL_LAYER})self_attn\.": r"\1attentions.0.",
    rf"({_DECODER_LAYER})cross_attn\.attn\.": r"\1attentions.0.attn.",
    rf"({_DECODER_LAYER})self_attn\.attn\.": r"\1attentions.1.attn.",
}
"""mmdet 3.x's name (a pattern) -> mmdet 2.x's."""
SPLIT: Mapping[str, tuple[str, ...]] = {
    rf"{_BLOCK}attn\.w_msa\.qkv\.": tuple(
        f"{_BLOCK_TO}attention.self.{x}." for x in ("query", "key", "value")
    ),
    rf"{_DECODER_LAYER}attentions\.1\.attn\.in_proj_": tuple(
        f"{_DECODER_TO}self_attn.{x}_proj." for x in "qkv"
    ),
}
"""mmdet's name (a pattern) of three matrices in one -> transformers' three names."""
_DOWNSAMPLE = re.compile(r"^backbone\.stages\.(\d+)\.downsample\.(.+)$")
_STAGE_NORM = re.compile(r"^backbone\.norm(\d+)\.(\w+)$")
_MASK_EMBED = re.compile(r"^panoptic_head\.mask_embed\.(\d+)\.(\w+)$")
_COMPUTED = "relative_position_index"
"""A table that both libraries compute."""


def read(path: Path) -> dict[str, Tensor]:
    """Read the weights of an OpenMMLab file, under mmdet 2.x's names.

    Raises:
        CheckpointError: the file is missing, cut short, or holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {str(path)!r} (looked in {Path.cwd()}). {_REMEDY}")
    state = read_weights([path])
    for pattern, to in OLDER.items():
        state = {re.sub(pattern, to, name): x for name, x in state.items()}
    return state


def convert(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the same weights under the names that transformers keeps on disk; `path` is for messages.

    Raises:
        CheckpointError: a name is not mmdet's.
    """
    found: dict[str, Tensor] = {}
    strange = []
    for name, x in state.items():
        if name.endswith(_COMPUTED):
            continue
        parts: dict[str, Tensor] = {}
        for pattern, names in SPLIT.items():
            if re.match(pattern, name):
                thirds = zip(names, x.chunk(3), strict=True)
                parts |= {re.sub(pattern, to, name): third.clone() for to, third in thirds}
        for pattern, to in RENAMED.items():
            if re.match(pattern, name):
                parts[re.sub(pattern, to, name)] = x
        if match := _DOWNSAMPLE.match(name):
            # columns [channel, (row, column)] become [(column, row), channel]
            places = x.unflatten(-1, (x.shape[-1] // 4, 2, 2)).movedim((-1, -2), (-3, -2))
            layer = f"{_ENCODER}encoder.layers.{match[1]}.downsample.{match[2]}"
            parts[layer] = places.flatten(-3).contiguous()
        if match := _STAGE_NORM.match(name):
            parts[f"{_ENCODER}hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}"] = x
        if match := _MASK_EMBED.match(name):  # every other layer is a ReLU
            embedder = f"{_TRANSFORMER}decoder.mask_predictor.mask_embedder"
            parts[f"{embedder}.{int(match[1]) // 2}.0.{match[2]}"] = x
        strange += [] if parts else [name]
        found |= parts
    if strange:
        raise CheckpointError(
            f"{path} is not mmdet's Mask2Former for instances: {len(strange)} names are unknown, first "
            f"{', '.join(strange[:SHOWN])}. {_REMEDY}"
        )
    return found


def config(state: Mapping[str, Tensor], path: Path) -> Any:
    """Return the Mask2FormerConfig of weights under mmdet's names.

    Raises:
        CheckpointError: a tensor that tells a size is missing.
    """
    from transformers import Mask2FormerConfig, SwinConfig

    pixel, decoder = "panoptic_head.pixel_decoder.", "panoptic_head.transformer_decoder."
    stages = _count(state, r"^backbone\.stages\.(\d+)\.")
    blocks = [f"backbone.stages.{n}.blocks.0." for n in range(stages)]
    try:
        patch = state["backbone.patch_embed.projection.weight"]
        tables = [state[f"{block}attn.w_msa.relative_position_bias_table"] for block in blocks]
        window = (isqrt(len(tables[0])) + 1) // 2  # a table has (2 window - 1)^2 rows
        swin = SwinConfig(
            embed_dim=len(patch),
            patch_size=patch.shape[-1],
            depths=[_count(state, rf"^backbone\.stages\.{n}\.blocks\.(\d+)\.") for n in range(stages)],
            num_heads=[table.shape[1] for table in tables],
            window_size=window,
            mlp_ratio=len(state["backbone.stages.0.blocks.0.ffn.layers.0.0.weight"]) / len(patch),
            image_size=window * patch.shape[-1] * 2 ** (stages - 1),
            out_features=[f"stage{n + 1}" for n in range(stages)],
        )
        queries, width = state["panoptic_head.query_feat.weight"].shape
        looks = len(state[f"{pixel}encoder.layers.0.attentions.0.attention_weights.weight"])
        return Mask2FormerConfig(
            backbone_config=swin,
            num_queries=queries,
            hidden_dim=width,
            feature_size=len(state[f"{pixel}lateral_convs.0.conv.weight"]),
            mask_feature_size=len(state[f"{pixel}mask_feature.weight"]),
            encoder_layers=_count(state, _PIXEL_LAYER),
            encoder_feedforward_dim=len(state[f"{pixel}encoder.layers.0.ffns.0.layers.0.0.weight"]),
            decoder_layers=1 + _count(state, _DECODER_LAYER),  # with the prediction before the first layer
            dim_feedforward=len(state[f"{decoder}layers.0.ffns.0.layers.0.0.weight"]),
            num_attention_heads=looks // (LEVELS * POINTS),
            num_labels=len(state["panoptic_head.cls_embed.weight"]) - 1,  # the last one is "no object"
        )
    except KeyError as error:
        raise CheckpointError(
            f"{path} has no tensor {error}, so it is not mmdet's Mask2Former. {_REMEDY}"
        ) from None


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest number in the names that fit a pattern."""
    numbers = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


_REMEDY = f"GenEval's own: curl -O {URL}"
