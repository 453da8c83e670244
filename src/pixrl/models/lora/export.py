"""Writing LoRA files for other programs: in UNO's layout of FLUX, in diffusers', and in the one that ComfyUI reads.

lora_files.py reads all of them.

UNO (bytedance/UNO) trains x-flux's processors on FLUX.1-dev, without an alpha, so that a module's change is up @ down:

| published key                                        | diffusers module                                          |
|------------------------------------------------------|-----------------------------------------------------------|
| double_blocks.N.processor.qkv_lora1.{down,up}.weight | transformer_blocks.N.attn.to_q, to_k, to_v                |
| double_blocks.N.processor.qkv_lora2                  | transformer_blocks.N.attn.add_q_proj, add_k_proj, add_v_proj |
| double_blocks.N.processor.proj_lora1, proj_lora2     | transformer_blocks.N.attn.to_out.0, to_add_out            |
| single_blocks.N.processor.qkv_lora                   | single_transformer_blocks.N.attn.to_q, to_k, to_v         |
| single_blocks.N.processor.proj_lora                  | single_transformer_blocks.N.proj_out                      |

A LoRA on q, k and v apart is written exactly: the three downs one above the other, the ups as blocks on a diagonal,
so the rank of the file is three times that of training. UNO's own code builds every processor, all of one rank, and
loads the file over them: modules of a lower rank are filled up with zeros, and processors without a LoRA are zeros.

ComfyUI (comfy/lora.py, model_lora_keys_unet) takes `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight` and `.alpha`
for every weight of the checkpoint, where MODULE is its name in the published single file with dots as underscores.
There q, k and v (and the MLP of FLUX's single blocks) are one matrix, so a LoRA on several of them is written exactly:
the downs one above the other, the ups as blocks on a diagonal, rows of zeros where a part has none. Of SDXL it takes
diffusers' own names of the modules, as kohya's scripts write them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixrl.errors import CheckpointError
from pixrl.models.lora.published_names import place_of
from pixrl.models.slots import DOWN, UP, Lora

PREFIXES = {
    "sd3": "transformer.",
    "flux": "transformer.",
    "sdxl": "unet.",
    "flux2-klein": "transformer.",
    "z-image": "transformer.",
    "qwen-image": "transformer.",
}
"""What diffusers' names of a LoRA's modules begin with, by the model's kind."""
ADAPTER_METADATA = "lora_adapter_metadata"
"""The key in a file's header under which diffusers writes peft's configuration, as JSON."""
COMFY_PREFIX = "lora_unet_"
_QKV = ("to_q", "to_k", "to_v")
_TEXT_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
_LAYOUT = {
    ("transformer_blocks", "attn", _QKV): ("double_blocks", "qkv_lora1"),
    ("transformer_blocks", "attn", _TEXT_QKV): ("double_blocks", "qkv_lora2"),
    ("transformer_blocks", "attn", ("to_out.0",)): ("double_blocks", "proj_lora1"),
    ("transformer_blocks", "attn", ("to_add_out",)): ("double_blocks", "proj_lora2"),
    ("single_transformer_blocks", "attn", _QKV): ("single_blocks", "qkv_lora"),
    ("single_transformer_blocks", "", ("proj_out",)): ("single_blocks", "proj_lora"),
}
_IN_PROJ_OUT = 5
"""The input width of a single block's proj_out: the attention, and an MLP of four times its width."""


@dataclass(frozen=True)
class Blocks:
    """The numbers of blocks of both kinds in a FLUX, and their width: 19, 38 and 3072 in FLUX.1-dev."""

    double: int
    single: int
    width: int


def to_uno(lora: Lora, blocks: Blocks) -> dict[str, Tensor]:
    """Return a LoRA in UNO's published layout: every processor of every block, those without a LoRA as zeros.

    Args:
        lora: module -> (down [r, in], up [out, r]).
        blocks: of the transformer that it is for.

    Returns:
        `PROCESSOR.down.weight` [R, in] and `PROCESSOR.up.weight` [out, R], of one rank R.

    Raises:
        CheckpointError: a module has no place in that layout.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    left = dict(lora)
    for (ours, inner, names), (published, processor) in _LAYOUT.items():
        for number in range(blocks.double if published == "double_blocks" else blocks.single):
            keys = [".".join(part for part in (ours, str(number), inner, name) if part) for name in names]
            parts = {key: left.pop(key) for key in keys if key in left}
            if not parts:  # a LoRA of rank 0
                into = _IN_PROJ_OUT * blocks.width if names == ("proj_out",) else blocks.width
                pair = torch.zeros(0, into), torch.zeros(len(names) * blocks.width, 0)
            elif missing := [key for key in keys if key not in parts]:
                raise CheckpointError(
                    f"UNO's layout needs q, k and v together, but {missing[0]} has no LoRA. "
                    "Train all three (lora.targets left out), or write diffusers' layout."
                )
            else:
                downs, ups = zip(*parts.values(), strict=True)
                pair = torch.cat(downs), torch.block_diag(*ups)
            found[f"{published}.{number}.processor.{processor}"] = pair
    if left:
        raise CheckpointError(
            f"{len(left)} LoRA modules have no place in UNO's layout, first {next(iter(left))!r}. "
            "Train the attention projections (lora.targets left out), or write diffusers' layout."
        )
    return {
        f"{name}.{side}.weight": x
        for name, pair in of_one_rank(found).items()
        for side, x in zip(("down", "up"), pair, strict=True)
    }


def of_one_rank(lora: Lora) -> dict[str, tuple[Tensor, Tensor]]:
    """Fill lower ranks up with zeros, for readers that know one rank; the changes stay the same."""
    rank = max(len(down) for down, _ in lora.values())
    return {
        name: (
            torch.cat([down, down.new_zeros(rank - len(down), down.shape[1])]),
            torch.cat([up, up.new_zeros(len(up), rank - up.shape[1])], dim=1),
        )
        for name, (down, up) in lora.items()
    }


def to_diffusers(lora: Lora, kind: str) -> dict[str, Tensor]:
    """Return a LoRA as `load_lora_weights` of diffusers' pipelines takes it, of one rank, without alphas.

    `kind`: a key of `PREFIXES`.
    """
    return {
        f"{PREFIXES[kind]}{module}{end}": x
        for module, pair in of_one_rank(lora).items()
        for end, x in zip((DOWN, UP), pair, strict=True)
    }


def adapter_metadata(lora: Lora, kind: str) -> dict[str, str]:
    """Return the header of a file of `to_diffusers`: peft's configuration, with an alpha that is the rank."""
    rank = max(len(down) for down, _ in lora.values())
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(lora)}
    return {
        ADAPTER_METADATA: json.dumps({f"{PREFIXES[kind]}{name}": value for name, value in settings.items()})
    }


def to_comfyui(lora: Lora, kind: str) -> dict[str, Tensor]:
    """Return the tensors of a ComfyUI LoRA file.

    Args:
        lora: module of diffusers' transformer -> (down, up), scales put into the ups.
        kind: sd3, flux or sdxl.

    Raises:
        CheckpointError: a module has no place in the published layout.
    """
    parts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    rows: dict[str, tuple[int, ...]] = {}
    for module, pair in lora.items():
        name, place = place_of(module, kind)
        parts.setdefault(name, {})[place.part] = pair
        rows[name] = place.rows
    file: dict[str, Tensor] = {}
    for name, known in parts.items():
        down, up = _joined(known, rows[name])
        key = COMFY_PREFIX + name.replace(".", "_")
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        file[f"{key}.alpha"] = torch.tensor(float(len(down)))  # the scale is in the ups: alpha / rank is 1
    return file


def _joined(parts: Mapping[int, tuple[Tensor, Tensor]], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Join modules with one input: downs one above the other, ups as blocks on a diagonal."""
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


def write_lora(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Save the tensors of `to_uno`, `to_diffusers` or `to_comfyui`: all of them, or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: x.contiguous() for name, x in tensors.items()},
            beside,
            metadata=None if metadata is None else dict(metadata),
        )
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    return file
