"""The names that a model's authors give its weights in a single file: diffusers' converters, read backwards.

In these files q, k and v (and the MLP of FLUX's single blocks) are one matrix. The names serve messages about a file
that does not fit, and LoRA files, whose modules go by them; diffusers converts the weights themselves.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pixrl.errors import CheckpointError

MLP_RATIO = 4
"""The rows of the MLP in linear1 of FLUX's single blocks, per row of q."""


@dataclass(frozen=True)
class _Rows:
    """The place of a module's rows: the published module, which of its parts, and the parts' rows per row of q."""

    module: str
    part: int = 0
    rows: tuple[int, ...] = (1,)


_QKV = (1, 1, 1)
_LINEAR1 = (1, 1, 1, MLP_RATIO)
_ATTENTION = {"to_q": 0, "to_k": 1, "to_v": 2}
_TEXT_ATTENTION = {"add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
_SD3_LAYERS = {
    **{f"attn.{name}": _Rows("x_block.attn.qkv", part, _QKV) for name, part in _ATTENTION.items()},
    **{f"attn2.{name}": _Rows("x_block.attn2.qkv", part, _QKV) for name, part in _ATTENTION.items()},
    **{f"attn.{name}": _Rows("context_block.attn.qkv", part, _QKV) for name, part in _TEXT_ATTENTION.items()},
    "attn.to_out.0": _Rows("x_block.attn.proj"),
    "attn2.to_out.0": _Rows("x_block.attn2.proj"),
    "attn.to_add_out": _Rows("context_block.attn.proj"),
    "ff.net.0.proj": _Rows("x_block.mlp.fc1"),
    "ff.net.2": _Rows("x_block.mlp.fc2"),
    "ff_context.net.0.proj": _Rows("context_block.mlp.fc1"),
    "ff_context.net.2": _Rows("context_block.mlp.fc2"),
    "norm1.linear": _Rows("x_block.adaLN_modulation.1"),
}
_FLUX_DOUBLE_LAYERS = {
    **{f"attn.{name}": _Rows("img_attn.qkv", part, _QKV) for name, part in _ATTENTION.items()},
    **{f"attn.{name}": _Rows("txt_attn.qkv", part, _QKV) for name, part in _TEXT_ATTENTION.items()},
    "attn.to_out.0": _Rows("img_attn.proj"),
    "attn.to_add_out": _Rows("txt_attn.proj"),
    "ff.net.0.proj": _Rows("img_mlp.0"),
    "ff.net.2": _Rows("img_mlp.2"),
    "ff_context.net.0.proj": _Rows("txt_mlp.0"),
    "ff_context.net.2": _Rows("txt_mlp.2"),
    "norm1.linear": _Rows("img_mod.lin"),
    "norm1_context.linear": _Rows("txt_mod.lin"),
}
_FLUX_SINGLE_LAYERS = {
    **{f"attn.{name}": _Rows("linear1", part, _LINEAR1) for name, part in _ATTENTION.items()},
    "proj_mlp": _Rows("linear1", 3, _LINEAR1),
    "proj_out": _Rows("linear2"),
    "norm.linear": _Rows("modulation.lin"),
}
_BLOCKS: Mapping[str, Mapping[str, tuple[str, Mapping[str, _Rows]]]] = {
    "sd3": {"transformer_blocks": ("joint_blocks", _SD3_LAYERS)},
    "flux": {
        "transformer_blocks": ("double_blocks", _FLUX_DOUBLE_LAYERS),
        "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE_LAYERS),
    },
}
"""For each kind and block list of diffusers the published list, and the places of a block's modules in it."""

_ENDS = (
    "timestep_embedder.linear_1",
    "timestep_embedder.linear_2",
    "text_embedder.linear_1",
    "text_embedder.linear_2",
)
_SD3 = {
    **{f"time_text_embed.{ours}": f"{theirs}" for ours, theirs in zip(
        _ENDS, ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2"), strict=True)},
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
_FLUX = {
    **{f"time_text_embed.{ours}": f"{theirs}" for ours, theirs in zip(
        _ENDS, ("time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer"), strict=True)},
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
_SD3_BLOCK = {
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}
_FLUX_NORMS = {
    ("transformer_blocks", "norm_q"): "double_blocks.{}.img_attn.norm.query_norm",
    ("transformer_blocks", "norm_k"): "double_blocks.{}.img_attn.norm.key_norm",
    ("transformer_blocks", "norm_added_q"): "double_blocks.{}.txt_attn.norm.query_norm",
    ("transformer_blocks", "norm_added_k"): "double_blocks.{}.txt_attn.norm.key_norm",
    ("single_transformer_blocks", "norm_q"): "single_blocks.{}.norm.query_norm",
    ("single_transformer_blocks", "norm_k"): "single_blocks.{}.norm.key_norm",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def authors_names(kind: str, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Map the names of weights in diffusers to those in the authors' file, without the part's prefix.

    Args:
        kind: a diffusers class: SD3Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel or AutoencoderKL.
        config: its config.
        names: of its weights.

    Returns:
        Those that are known; q, k and v have one name, for they are one matrix. Empty for other classes.
    """
    change = _CHANGES.get(kind)
    found = {} if change is None else {name: change(name, config) for name in names}
    return {name: theirs for name, theirs in found.items() if theirs is not None}


def _sd3(name: str, config: Mapping[str, Any]) -> str | None:
    if name == "pos_embed.pos_embed":
        return "pos_embed"
    module, _, end = name.rpartition(".")
    if not module.startswith("transformer_blocks."):
        return f"{_SD3.get(module, module)}.{end}"
    _, layer, inner = module.split(".", 2)
    if inner in _SD3_BLOCK:
        return f"joint_blocks.{layer}.{_SD3_BLOCK[inner]}.{end}"
    return _in_block(module, end, "sd3")


def _flux(name: str, config: Mapping[str, Any]) -> str | None:
    module, _, end = name.rpartition(".")
    blocks, _, rest = module.partition(".")
    if not blocks.endswith("transformer_blocks"):
        return f"{_FLUX.get(module, module)}.{end}"
    layer, _, inner = rest.partition(".")
    norm = _FLUX_NORMS.get((blocks, inner.removeprefix("attn.")))
    return _in_block(module, end, "flux") if norm is None else f"{norm.format(layer)}.scale"


def _in_block(module: str, end: str, kind: str) -> str | None:
    try:
        return f"{place_of(module, kind)[0]}.{end}"
    except CheckpointError:
        return None


def _unet(name: str, config: Mapping[str, Any]) -> str | None:
    module, _, end = name.rpartition(".")
    a_level = int(config["layers_per_block"]) + 1
    inside = re.fullmatch(r"(mid|down|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.+)", module)
    resized = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", module)
    if inside:
        block, level, part, number, rest = inside.groups()
        rest = _RESNET.get(rest, rest) if part == "resnets" else rest
        at, second = int(level or 0) * a_level + int(number), int(part == "attentions")
        places = {
            "mid": f"middle_block.{1 if second else 2 * int(number)}",
            "down": f"input_blocks.{at + 1}.{second}",
            "up": f"output_blocks.{at}.{second}",
        }
        return f"{places[block]}.{rest}.{end}"
    if resized and resized[1] == "down":
        return f"input_blocks.{a_level * (int(resized[2]) + 1)}.0.op.{end}"
    if resized:
        types = config["up_block_types"]
        place = 2 if "Attn" in types[int(resized[2])] else 1
        return f"output_blocks.{a_level * int(resized[2]) + a_level - 1}.{place}.conv.{end}"
    return f"{_UNET[module]}.{end}" if module in _UNET else None


def _vae(name: str, config: Mapping[str, Any]) -> str | None:
    """Rename a weight of the VAE, whose decoder's blocks are counted from the other end."""
    last = len(config["block_out_channels"]) - 1
    name = re.sub(
        r"up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.",
        lambda m: f"up.{last - int(m[1])}." + ("upsample." if m[2] is None else f"block.{m[2]}."),
        name,
    )
    for pattern, theirs in _VAE:
        name = re.sub(pattern, theirs, name)
    return name


_CHANGES: Mapping[str, Callable[[str, Mapping[str, Any]], str | None]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
}


def place_of(module: str, kind: str) -> tuple[str, _Rows]:
    """Return the published name of a module's matrix, and the place of the module's rows in it.

    LoRA files of SDXL go by diffusers' names, as kohya's scripts have them.

    Raises:
        CheckpointError: the module has no place in the published layout.
    """
    if kind == "sdxl":
        return module, _Rows(module)
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module)
    if match is not None and match[1] in _BLOCKS.get(kind, {}):
        published, places = _BLOCKS[kind][match[1]]
        if match[3] in places:
            place = places[match[3]]
            return f"{published}.{match[2]}.{place.module}", place
    raise CheckpointError(
        f"The LoRA on {module!r} has no place in the layout that ComfyUI reads for {kind}. Export diffusers' layout "
        "(ComfyUI reads that too, for SD3, FLUX, Z-Image and Qwen-Image), or train attention and MLP alone "
        "(lora.targets)."
    )


def from_published(theirs: str, pair: tuple[Tensor, Tensor], kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the LoRA by diffusers' modules of one on a published module, named with dots or underscores.

    A module that holds several of ours shares its down with them, and each takes its rows of the up. It is empty
    where the name is not known, or its rows cannot be shared out.
    """
    down, up = pair
    parts = [
        (f"{ours}.{match[1]}.{name}", place)
        for ours, (published, places) in _BLOCKS.get(kind, {}).items()
        if (match := re.fullmatch(rf"{published}_(\d+)_(.+)", theirs.replace(".", "_")))
        for name, place in places.items()
        if place.module.replace(".", "_") == match[2]
    ]
    rows = parts[0][1].rows if parts else (1,)
    if len(up) % sum(rows):
        return {}
    pieces = up.split([len(up) // sum(rows) * count for count in rows])
    return {ours: (down, pieces[place.part]) for ours, place in parts}
