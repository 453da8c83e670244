"""A LoRA under the names that ComfyUI reads: those of the models' authors, as in kohya's files.

ComfyUI (comfy/lora.py, model_lora_keys_unet) takes `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight` and `.alpha`
for every weight of the checkpoint, where MODULE is its name in the published single file with dots as underscores.
There q, k and v (and the MLP of FLUX's single blocks) are one matrix, so a LoRA on several of them is written exactly:
the downs one above the other, the ups as blocks on a diagonal, rows of zeros where a part has none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pixrl.errors import CheckpointError
from pixrl.models.flux_lora import Lora

PREFIX = "lora_unet_"
MLP_RATIO = 4
"""Of FLUX's single blocks: rows of the MLP in linear1, per row of q."""


@dataclass(frozen=True)
class _Place:
    """Where a module's rows lie: the published module, which of its parts, of how many rows each in those of q."""

    module: str
    part: int = 0
    rows: tuple[int, ...] = (1,)


_QKV = (1, 1, 1)
_LINEAR1 = (1, 1, 1, MLP_RATIO)
_ATTENTION = {"to_q": 0, "to_k": 1, "to_v": 2}
_TEXT_ATTENTION = {"add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
_SD3 = {
    **{f"attn.{name}": _Place("x_block.attn.qkv", part, _QKV) for name, part in _ATTENTION.items()},
    **{f"attn2.{name}": _Place("x_block.attn2.qkv", part, _QKV) for name, part in _ATTENTION.items()},
    **{
        f"attn.{name}": _Place("context_block.attn.qkv", part, _QKV) for name, part in _TEXT_ATTENTION.items()
    },
    "attn.to_out.0": _Place("x_block.attn.proj"),
    "attn2.to_out.0": _Place("x_block.attn2.proj"),
    "attn.to_add_out": _Place("context_block.attn.proj"),
    "ff.net.0.proj": _Place("x_block.mlp.fc1"),
    "ff.net.2": _Place("x_block.mlp.fc2"),
    "ff_context.net.0.proj": _Place("context_block.mlp.fc1"),
    "ff_context.net.2": _Place("context_block.mlp.fc2"),
    "norm1.linear": _Place("x_block.adaLN_modulation.1"),
}
_FLUX_DOUBLE = {
    **{f"attn.{name}": _Place("img_attn.qkv", part, _QKV) for name, part in _ATTENTION.items()},
    **{f"attn.{name}": _Place("txt_attn.qkv", part, _QKV) for name, part in _TEXT_ATTENTION.items()},
    "attn.to_out.0": _Place("img_attn.proj"),
    "attn.to_add_out": _Place("txt_attn.proj"),
    "ff.net.0.proj": _Place("img_mlp.0"),
    "ff.net.2": _Place("img_mlp.2"),
    "ff_context.net.0.proj": _Place("txt_mlp.0"),
    "ff_context.net.2": _Place("txt_mlp.2"),
    "norm1.linear": _Place("img_mod.lin"),
    "norm1_context.linear": _Place("txt_mod.lin"),
}
_FLUX_SINGLE = {
    **{f"attn.{name}": _Place("linear1", part, _LINEAR1) for name, part in _ATTENTION.items()},
    "proj_mlp": _Place("linear1", 3, _LINEAR1),
    "proj_out": _Place("linear2"),
    "norm.linear": _Place("modulation.lin"),
}
_BLOCKS: Mapping[str, Mapping[str, tuple[str, Mapping[str, _Place]]]] = {
    "sd3": {"transformer_blocks": ("joint_blocks", _SD3)},
    "flux": {
        "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
    },
}
"""Kind -> our block list -> the published one, and where a block's modules lie in it."""


def to_comfyui(lora: Lora, kind: str) -> dict[str, Tensor]:
    """The tensors of a ComfyUI LoRA file.

    Args:
        lora: module of diffusers' transformer -> (down, up), scales put into the ups.
        kind: sd3 or flux.

    Raises:
        CheckpointError: a module has no place in the published layout.
    """
    parts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    rows: dict[str, tuple[int, ...]] = {}
    for module, pair in lora.items():
        name, place = _place_of(module, kind)
        parts.setdefault(name, {})[place.part] = pair
        rows[name] = place.rows
    file: dict[str, Tensor] = {}
    for name, known in parts.items():
        down, up = _joined(known, rows[name])
        key = PREFIX + name.replace(".", "_")
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        file[f"{key}.alpha"] = torch.tensor(float(len(down)))  # the scale is in the ups: alpha / rank is 1
    return file


def from_published(theirs: str, pair: tuple[Tensor, Tensor], kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Our modules' LoRA, of one on a module by the published file's name, with dots or underscores.

    A module that holds several of ours shares its down with them, and each takes its rows of the up. Nothing where
    the name is not known, or its rows cannot be shared out.
    """
    down, up = pair
    parts = _parts_of(theirs.replace(".", "_"), kind)
    rows = parts[0][1].rows if parts else (1,)
    if len(up) % sum(rows):
        return {}
    pieces = up.split([len(up) // sum(rows) * count for count in rows])
    return {ours: (down, pieces[place.part]) for ours, place in parts}


def _parts_of(theirs: str, kind: str) -> list[tuple[str, _Place]]:
    """Our modules that a published one holds, its name written with underscores."""
    for ours, (published, places) in _BLOCKS[kind].items():
        match = re.fullmatch(rf"{published}_(\d+)_(.+)", theirs)
        if match is not None:
            return [
                (f"{ours}.{match[1]}.{name}", place)
                for name, place in places.items()
                if place.module.replace(".", "_") == match[2]
            ]
    return []


def published_name(module: str, kind: str) -> str:
    """The module of the published single file that holds this one's rows."""
    return _place_of(module, kind)[0]


def _place_of(module: str, kind: str) -> tuple[str, _Place]:
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module)
    if match is not None and match[1] in _BLOCKS[kind]:
        published, places = _BLOCKS[kind][match[1]]
        if match[3] in places:
            place = places[match[3]]
            return f"{published}.{match[2]}.{place.module}", place
    raise CheckpointError(
        f"The LoRA on {module!r} has no place in the layout that ComfyUI reads for {kind}. Export diffusers' layout "
        "(ComfyUI reads that too, for SD3 and FLUX), or train attention and MLP alone (lora.targets)."
    )


def _joined(parts: Mapping[int, tuple[Tensor, Tensor]], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Modules with one input as one module."""
    if len(rows) == 1:
        return parts[0]
    some, (_, up) = next(iter(parts.items()))
    unit = len(up) // rows[some]
    downs, ups = [], []
    for part, count in enumerate(rows):
        down, up = parts.get(part, (torch.zeros(0, parts[some][0].shape[1]), torch.zeros(count * unit, 0)))
        downs.append(down)
        ups.append(up)
    return torch.cat(downs), torch.block_diag(*ups)
