"""LoRA files of FLUX: reading UNO's published layout (and every other that diffusers reads), merging, writing.

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
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pixrl.device import quiet_loading
from pixrl.errors import CheckpointError
from pixrl.untrusted import parse_json

PREFIX = "transformer."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
_SUFFIXES = (DOWN, UP, ".lora_down.weight", ".lora_up.weight", ".down.weight", ".up.weight", ".alpha")
"""How the keys of all LoRA layouts end that diffusers reads; another key is of something that is not read."""
_TEXT_ENCODERS = ("text_encoder", "lora_te")
_DOWN_UP_NAMES = (("transformer.",), ("lora_transformer_",), ("lora_unet_", "diffusion_model."))
"""How keys of files with lora_down begin: of the first of these that is in a file, diffusers drops all others."""
_METADATA = "lora_adapter_metadata"
"""Where diffusers writes peft's configuration into the header of a file, as JSON."""
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
"""A single block's proj_out reads the attention and an MLP of four times its width."""
Lora = Mapping[str, tuple[Tensor, Tensor]]
"""Module of the transformer -> (down [r, in], up [out, r]), whose product up @ down is added to its weight."""


@dataclass(frozen=True)
class Blocks:
    """How many blocks of both kinds a FLUX has, and their width: 19, 38 and 3072 in FLUX.1-dev."""

    double: int
    single: int
    width: int


def read_lora(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA file as `Lora`, float32, through diffusers' own converters; its alphas are put into the ups.

    Raises:
        CheckpointError: the file is missing, damaged, of a layout that is not known, or holds more than LoRA layers of
            the transformer.
    """
    if not file.is_file():
        raise CheckpointError(
            f"There is no LoRA file {str(file)!r} (looked in {Path.cwd()}). UNO's is dit_lora.safetensors: "
            "hf download bytedance-research/UNO dit_lora.safetensors --local-dir ."
        )
    try:
        with safe_open(file, "pt") as opened:
            raw = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no safetensors file, or cut short: {error}") from error
    others = [key for key in raw if not key.endswith(_SUFFIXES)]
    if len(others) == len(raw):
        raise CheckpointError(f"{file} holds no LoRA of FLUX's transformer.")
    _refuse(file, "are no LoRA layers", others)
    _refuse(file, "are not of the transformer", (key for key in raw if key.startswith(_TEXT_ENCODERS)))
    _refuse(file, "are of another layout than the rest", _dropped(raw))
    _refuse(file, "are not applied by diffusers' reader", _unread_alphas(raw))
    _refuse(file, "are not finite", (key for key, x in raw.items() if not x.float().isfinite().all()))
    with quiet_loading():
        from diffusers import FluxPipeline

        try:
            found, alphas = FluxPipeline.lora_state_dict(dict(raw), return_alphas=True)
        except (ValueError, KeyError, AssertionError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{file} is in no LoRA layout of FLUX that diffusers reads: {error}"
            ) from error
    return _pairs(found, alphas or {}, _adapter(header, file), file)


def _refuse(file: Path, problem: str, keys: Iterable[str]) -> None:
    """CheckpointError that names some of the keys, if there are any: a part of a file must not be lost in silence."""
    found = sorted(keys)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(
            f"{file}: {', '.join(found[:3])}{more} {problem}. pixrl merges plain LoRA layers of FLUX's transformer "
            "(down and up, with or without alpha): give a file that holds only those."
        )


def _dropped(raw: Iterable[str]) -> list[str]:
    """Keys that diffusers' reader of files with lora_down leaves out without a word."""
    keys = list(raw)
    if not any(".lora_down.weight" in key for key in keys):
        return []
    own = next((names for names in _DOWN_UP_NAMES if any(key.startswith(names) for key in keys)), ())
    return [key for key in keys if not key.startswith(own)]


def _unread_alphas(raw: Mapping[str, Tensor]) -> list[str]:
    """Alphas of the last layer, which diffusers takes for the rank; those that are the rank are left out here."""
    alphas = [key for key in raw if "final_layer" in key and key.endswith(".alpha")]
    downs = {key: raw.get(key.removesuffix(".alpha") + ".lora_down.weight") for key in alphas}
    return [key for key, down in downs.items() if down is None or raw[key].item() != len(down)]


def _adapter(header: Mapping[str, str], file: Path) -> Mapping[str, Any]:
    """peft's configuration of the transformer's adapter from a file's header; empty where there is none."""
    if _METADATA not in header:
        return {}
    try:
        found = parse_json(header[_METADATA])
        own = {key.removeprefix(PREFIX): x for key, x in found.items() if key.startswith(PREFIX)}
        float(own.get("lora_alpha", 1.0)), dict(own.get("alpha_pattern") or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its {_METADATA} cannot be read: {error}. Save it again.") from error
    return own


def _pairs(
    found: Mapping[str, Tensor], alphas: Mapping[str, float | Tensor], adapter: Mapping[str, Any], file: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    modules = [key.removesuffix(DOWN) for key in found if key.endswith(DOWN)]
    taken = {module + suffix for module in modules for suffix in (DOWN, UP, ".alpha")}
    _refuse(file, "belong to no pair of down and up", (found.keys() | alphas.keys()) - taken)
    if alphas:
        _refuse(file, "have no alpha, but others do", (x for x in modules if f"{x}.alpha" not in alphas))
    pairs = {}
    for module in modules:
        down, up = found[module + DOWN], found.get(module + UP)
        if up is None or down.ndim != 2 or up.shape[1:] != down.shape[:1]:
            raise CheckpointError(f"{file}: {module} has no down and up of one rank. Download it again.")
        name, alpha = module.removeprefix(PREFIX), alphas.get(f"{module}.alpha")
        scale = _scale(name, len(down), adapter) if alpha is None else float(alpha) / len(down)
        pairs[name] = (down.float(), up.float() * scale)
    return pairs


def _scale(module: str, rank: int, adapter: Mapping[str, Any]) -> float:
    """What peft multiplies up @ down by: alpha / rank (rslora: / sqrt(rank)); 1 where no alpha is known."""
    if "lora_alpha" not in adapter:
        return 1.0
    from peft.utils.other import get_pattern_key

    own = adapter.get("alpha_pattern") or {}
    alpha = float(own.get(get_pattern_key(list(own), module), adapter["lora_alpha"]))
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)


@torch.no_grad()
def merge(backbone: nn.Module, lora: Lora, name: str) -> str:
    """Adds a LoRA to a backbone's weights; a hash of what was added.

    Raises:
        CheckpointError: a module does not exist or has another shape; nothing was changed.
    """
    layers: dict[str, nn.Linear] = {}
    for module, (down, up) in lora.items():
        layer = dict(backbone.named_modules()).get(module)
        if not isinstance(layer, nn.Linear) or layer.weight.shape != (len(up), down.shape[1]):
            shape = list(layer.weight.shape) if isinstance(layer, nn.Linear) else "missing"
            raise CheckpointError(
                f"{name} does not fit this transformer: {module} is {shape} here and "
                f"{[len(up), down.shape[1]]} there. It belongs to another model."
            )
        layers[module] = layer
    total = hashlib.sha256()
    for module, layer in sorted(layers.items()):
        down, up = (x.to(layer.weight.device) for x in lora[module])
        layer.weight.add_((up @ down).to(layer.weight.dtype))
        for x in lora[module]:
            total.update(module.encode() + x.contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def slot_lora(state: Mapping[str, Tensor], slot: str, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """One slot of `LoraSlots.state()` as `Lora`; `scale` is alpha / rank, put into the ups."""
    own = {key.removeprefix(f"{slot}/"): x for key, x in state.items() if key.startswith(f"{slot}/")}
    modules = [key.removesuffix(DOWN) for key in own if key.endswith(DOWN)]
    return {module: (own[module + DOWN].float(), own[module + UP].float() * scale) for module in modules}


def added(loras: Sequence[Lora]) -> dict[str, tuple[Tensor, Tensor]]:
    """One LoRA whose change is the sum of several: an imported one and what was trained on top."""
    modules = dict.fromkeys(module for lora in loras for module in lora)
    return {
        module: (
            torch.cat([lora[module][0] for lora in loras if module in lora]),
            torch.cat([lora[module][1] for lora in loras if module in lora], dim=1),
        )
        for module in modules
    }


def to_uno(lora: Lora, blocks: Blocks) -> dict[str, Tensor]:
    """A LoRA in UNO's published key layout: every processor of every block, those without a LoRA as zeros.

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
            parts = [left.pop(key, None) for key in keys]
            empty = all(part is None for part in parts)
            pair = _nothing(names, blocks.width) if empty else _side_by_side(keys, parts)
            found[f"{published}.{number}.processor.{processor}"] = pair
    if left:
        raise CheckpointError(
            f"{len(left)} LoRA modules have no place in UNO's layout, first {next(iter(left))!r}. "
            "Train the attention projections (lora.targets left out), or write diffusers' layout."
        )
    return _of_one_rank(found)


def _nothing(names: Sequence[str], width: int) -> tuple[Tensor, Tensor]:
    """The LoRA of rank 0 on these modules."""
    into = _IN_PROJ_OUT * width if names == ("proj_out",) else width
    return torch.zeros(0, into), torch.zeros(len(names) * width, 0)


def _of_one_rank(found: Lora) -> dict[str, Tensor]:
    rank = max(len(down) for down, _ in found.values())
    file = {}
    for name, (down, up) in found.items():
        file[f"{name}.down.weight"] = torch.cat([down, down.new_zeros(rank - len(down), down.shape[1])])
        file[f"{name}.up.weight"] = torch.cat([up, up.new_zeros(len(up), rank - up.shape[1])], dim=1)
    return file


def _side_by_side(
    keys: Sequence[str], parts: Sequence[tuple[Tensor, Tensor] | None]
) -> tuple[Tensor, Tensor]:
    """Modules with one input as one module: downs one above the other, ups as blocks on a diagonal."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        missing = next(key for key, part in zip(keys, parts, strict=True) if part is None)
        raise CheckpointError(
            f"UNO's layout needs q, k and v together, but {missing} has no LoRA. "
            "Train all three (lora.targets left out), or write diffusers' layout."
        )
    if len(known) == 1:
        return known[0]
    return torch.cat([down for down, _ in known]), torch.block_diag(*(up for _, up in known))


def to_diffusers(lora: Lora) -> dict[str, Tensor]:
    """A LoRA as `FluxPipeline.load_lora_weights` takes it, without alphas."""
    return {
        f"{PREFIX}{module}{end}": x
        for module, pair in lora.items()
        for end, x in zip((DOWN, UP), pair, strict=True)
    }


def write_lora(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Saves `to_uno`, `to_diffusers` or `comfy_lora.to_comfyui`: all of it, or nothing."""
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
