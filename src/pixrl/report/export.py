"""What a run learned as files that other programs load, with a model card and pictures beside: a folder a format.

Of `train: full` the files are whole weights (`whole_weights.py`); the rest is about LoRA.

The last whole checkpoint is taken. The weights are saved with their scale (alpha / rank) in the up projections and all
modules of one rank, so that a reader needs no alpha; diffusers' layout says so in its header, too, and ComfyUI's in its
alphas. Where the run was trained on top of a merged LoRA (`lora.base`), the file holds both. What was written is read
back, by diffusers where that reads the layout at any width.

Of a fusion, the mixing coefficients of one child are what is exported: `integrations/comfyui` applies them.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
from torch import Tensor

from pixrl import models
from pixrl.errors import CheckpointError, ConfigError, InputError, RunError, did_you_mean
from pixrl.fusion.config import KIND, FuseConfig, open_run
from pixrl.hub import locate
from pixrl.hub_check import INDEX, components, read_json
from pixrl.jobs import fuse as fuse_job
from pixrl.models.loading import OPTIONAL_PARTS
from pixrl.models.lora.export import (
    COMFY_PREFIX,
    PREFIXES,
    Blocks,
    adapter_metadata,
    of_one_rank,
    to_comfyui,
    to_diffusers,
    to_uno,
    write_lora,
)
from pixrl.models.lora.files import read_lora
from pixrl.models.lora.published_names import from_published
from pixrl.models.slots import DOWN, UP, Lora, Slot, added, digest, slot_lora
from pixrl.report import whole_weights
from pixrl.report.model_card import Facts, in_unos_code, pipeline_name, shown_pairs, write_card
from pixrl.runs import checkpoint
from pixrl.runs.config import KINDS, AlignConfig, Train, read_config
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import RunFolder
from pixrl.runs.log import load_coefficients
from pixrl.runs.reading import start_if_any
from pixrl.untrusted import encodable

FORMAT = "pixrl-coefficients"
TAKEN = ("columns", "tokens", "velocity")
"""The mixings that ComfyUI's conditionings can say; the others change with the step or with the place."""


@dataclass(frozen=True)
class ExportedChild:
    """The file of a child's coefficients, and the prompts of the concepts that they mix, in their order."""

    file: Path
    child: int
    prompts: tuple[str, ...]


def is_fusion(run: Path) -> bool:
    """Return whether a folder holds one fusion."""
    return run.is_dir() and RunFolder.at(run, allow_changed=True).kind == KIND


def export_child(run: Path, child: int | None = None, out: Path | None = None) -> ExportedChild:
    """Write the coefficients of a fusion's child.

    Args:
        run: a fusion's folder, finished or not.
        child: the picture's number; None: the best of the selection.
        out: the folder; None: `export/comfyui` in the run's.

    Raises:
        RunError: it is no fusion, or nothing was selected yet.
        InputError: there is no such child.
        ConfigError: its mixing cannot be applied to conditionings.
    """
    folder, config = open_run(run)
    require_taken(config)
    rows = folder.manifest()
    if child is None:
        child = next(iter(fuse_job.read_selection(folder).indices), None)
    if child is None or not 0 <= child < len(rows):
        given = "No child was selected" if child is None else f"There is no child {child}"
        raise InputError(
            f"{given}: {run} has {len(rows)}, numbered from 0. Type: pixrl export {run} --child 0"
        )
    row = rows[child]
    own = child - min(one.index for one in rows if one.step == row.step)
    prompts = fuse_job.read_world(folder).prompts
    texts = tuple(prompts[concept] for concept in config.concepts)
    values_ND = load_coefficients(folder, row.step)[own]
    file = (folder.path / "export" / "comfyui" if out is None else out) / f"child-{child:06d}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, coefficients_bytes(values_ND, config, texts, row.seed))
    return ExportedChild(file, child, texts)


def require_taken(config: FuseConfig) -> None:
    """Raise ConfigError where a recipe's mixing cannot be applied to conditionings."""
    if config.mixed_by.kind not in TAKEN:
        raise ConfigError(
            f"Children are mixed by {config.mixed_by.kind} here, which changes with the sampling step or with the "
            f"place, so no conditioning can say it: ComfyUI's node takes {', '.join(TAKEN)}. Type: pixrl fuse "
            f"{' '.join(map(shlex.quote, config.typed))} --mixing columns"
        )


def coefficients_bytes(values_ND: Tensor, config: FuseConfig, prompts: Sequence[str], seed: int) -> bytes:
    """Return the file of one child's coefficients [N, D], with what they belong to in its header.

    Args:
        values_ND: the coefficients.
        config: the recipe with their concepts, model and mixing.
        prompts: those of the concepts.
        seed: of the child's noise.
    """
    about = {
        "format": FORMAT,
        "version": "1",
        "concepts": json.dumps(config.concepts),
        "prompts": json.dumps(list(prompts)),
        "model": config.model,
        "mixing": json.dumps(config.mixed_by.model_dump(mode="json")),
        "pooled": config.pooled.value,
        "seed": str(seed),
    }
    return safetensors.torch.save({"coefficients_ND": values_ND.float().cpu().contiguous()}, about)


CARD = "README.md"
_SLOTS = "slots/"
_ROUNDING = 1e-5
"""Relative difference of two float32 products of sums of at most some hundred terms."""


class Format(StrEnum):
    """The layouts of an export: of a LoRA's file how its tensors are named, of whole weights a folder or a file."""

    DIFFUSERS = "diffusers"
    """Of whole weights: a pipeline's folder."""
    COMFYUI = "comfyui"
    UNO = "uno"
    """The names of UNO's published `dit_lora.safetensors`, for FLUX alone."""
    WEIGHTS = "weights"
    """All weights of the denoiser in one file, of `train: full` alone."""


def parse_format(name: str) -> Format:
    """Return the layout of a name; raise InputError where there is none."""
    if name not in list(Format):
        raise InputError(
            f"Unknown format {name!r}.{did_you_mean(name, list(Format))} Use {', '.join(Format)}."
        )
    return Format(name)


FILES = {
    Format.DIFFUSERS: "pytorch_lora_weights.safetensors",
    Format.COMFYUI: "comfyui_lora.safetensors",
    Format.UNO: "dit_lora.safetensors",
}
WHOLE = {Format.DIFFUSERS: INDEX, Format.WEIGHTS: whole_weights.FILE}
"""The same of `train: full`."""


@dataclass(frozen=True)
class Exported:
    """The files of an export, and the weights that they hold."""

    file: Path
    card: Path
    slot: Slot
    step: int
    what: str = "LoRA"


def export(
    run: Path, *, out: Path | None = None, layout: Format = Format.DIFFUSERS, slot: Slot | None = None
) -> Exported:
    """Write a run's LoRA, or all weights where it trained all, with model card and pictures.

    Args:
        run: an align or personalize run, finished or not.
        out: the folder; None: `export/FORMAT` in the run's, so that each format has its own card.
        layout: diffusers', ComfyUI's or UNO's names; of all weights a pipeline's folder (diffusers) or one file.
        slot: current or ema; None: the averaged weights where the run has them.

    Raises:
        RunError: it is no such run, or has no checkpoint yet.
        InputError: `out` holds an export of another format.
        ConfigError: the run has no averaged weights, or has not what the layout is for.
        CheckpointError: a module has no place in the layout, or the base model's folder is gone.
    """
    folder = _open(run)
    config = read_config(folder)
    files = FILES if config.train is Train.LORA else WHOLE
    if layout not in files:
        what = "train: full, whose weights are" if files is WHOLE else "a LoRA, which is"
        raise ConfigError(
            f"{run} is a run of {what} not exported as {layout.value}. Type: --format {' | '.join(files)}"
        )
    place = folder.path / "export" / layout.value if out is None else out
    for other, name in files.items():
        if other is not layout and (place / name).exists():
            raise InputError(
                f"{place} holds an export of format {other}, whose card would be overwritten. Give another --out, or "
                "leave it out: each format then has a folder of its own in the run's."
            )
    averaged = config.optimizer.ema is not None
    if slot is Slot.EMA and not averaged:
        raise ConfigError("This run keeps no averaged weights (optimizer.ema is null). Type: --slot current")
    if slot not in (None, Slot.EMA, Slot.CURRENT):
        raise ConfigError(
            f"The slot {slot.value!r} is not for use outside. Type: --slot current or --slot ema"
        )
    chosen = slot or (Slot.EMA if averaged else Slot.CURRENT)
    saved = checkpoint.latest(folder.path)
    if saved is None:
        raise RunError(f"{folder.path} has no checkpoint yet. Type: pixrl resume {folder.path}")
    tensors, _ = checkpoint.load(saved)
    found = locate(config.model)
    base, adapter = found.folder, models.adapter_of(found)
    run_name = folder.path.name
    metadata = {"format": "pt", "made_by": "pixrl", "run": run_name, "slot": chosen.value}
    facts = Facts(
        file=files[layout],
        slot=chosen.value,
        step=checkpoint.step_of(saved),
        layout=layout.value,
        pipeline=pipeline_name(base),
        without=_left_out(config, base),
    )
    if config.train is Train.FULL:
        pipeline = whole_weights.trained_pipeline(config, found, tensors, chosen)
        facts = replace(facts, denoiser=whole_weights.denoiser_name(pipeline))
        if layout is Format.WEIGHTS:
            file = whole_weights.write_file(pipeline, place, metadata)
        else:
            file = whole_weights.write_folder(pipeline, found, place)
        return Exported(file, _describe(folder, config, facts, place, ""), chosen, facts.step, "All weights")
    family = adapter.lora_layout or adapter.__name__
    lora = of_one_rank(_lora(folder, config, tensors, chosen, family))
    named = _named(lora, layout, base, family)
    by = _reader(layout)
    metadata |= {"checked_with": by}
    if layout is Format.DIFFUSERS:
        metadata |= adapter_metadata(lora, family)
    file = write_lora(place / FILES[layout], named, metadata)
    _read_back(file, lora, named, layout, base, family)
    notes = _notes(layout, named, by)
    return Exported(file, _describe(folder, config, facts, place, notes), chosen, facts.step)


def _reader(layout: Format) -> str:
    """Return the program that reads an export back, with its version."""
    installed = f"diffusers {diffusers.__version__}"
    return f"pixrl, by the module names of {installed}" if layout is Format.COMFYUI else installed


def _read_back(
    file: Path, lora: Lora, named: Mapping[str, Tensor], layout: Format, base: Path, family: str
) -> None:
    """Make sure that a reader of this layout finds the change of every module; else remove the file and refuse it."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if layout is Format.COMFYUI and family == "sdxl":
        found = dict(read_lora(file, family))
    elif layout is Format.COMFYUI:  # diffusers reads FLUX's at its published width alone
        for name in (key.removesuffix(".alpha") for key in named if key.endswith(".alpha")):
            pair = named[f"{name}.lora_down.weight"], named[f"{name}.lora_up.weight"]
            found |= from_published(name.removeprefix(COMFY_PREFIX), pair, family)
    else:
        reader = getattr(diffusers, pipeline_name(base))
        state = reader.lora_state_dict(str(file.parent), weight_name=file.name, use_safetensors=True)
        state = state[0] if isinstance(state, tuple) else state
        modules = [key.removesuffix(DOWN) for key in state if key.endswith(DOWN)]
        prefix = PREFIXES[family]
        found = {name.removeprefix(prefix): (state[name + DOWN], state[name + UP]) for name in modules}
    for module, (down, up) in lora.items():
        change = up @ down
        read = found[module][1] @ found[module][0] if module in found else torch.tensor(torch.inf)
        if not torch.linalg.vector_norm(change - read) <= _ROUNDING * torch.linalg.vector_norm(change):
            file.unlink()
            raise CheckpointError(
                f"{_reader(layout)} reads {module} of {file} as another change than was written, so it was removed. "
                "Install the versions of constraints.txt, or export another format."
            )


def _named(lora: Lora, layout: Format, base: Path, family: str) -> dict[str, Tensor]:
    """Return the LoRA's tensors under the names of a layout; `base` is the pipeline's folder."""
    if layout is Format.COMFYUI:
        return to_comfyui(lora, family)
    if layout is Format.DIFFUSERS:
        return to_diffusers(lora, family)
    if family != "flux":
        raise ConfigError(
            f"UNO's layout is one of FLUX, and this is a LoRA of {family}. Type: --format diffusers"
        )
    config: Mapping[str, Any] = read_json(base / "transformer" / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return to_uno(lora, Blocks(config["num_layers"], config["num_single_layers"], width))


def _notes(layout: Format, named: Mapping[str, Tensor], reader: str) -> str:
    """Return the section of the card about the file itself."""
    ranks = {
        len(x) for name, x in named.items() if name.endswith((DOWN, ".down.weight", ".lora_down.weight"))
    }
    of_rank = (
        f"Every module of it has rank {max(ranks)}" if len(ranks) == 1 else "Each module says its own rank"
    )
    own = {
        Format.DIFFUSERS: " and strength 1, as the header says too (lora_adapter_metadata)",
        Format.COMFYUI: ", and its alpha is that rank: strength 1",
        Format.UNO: " and strength 1, without an alpha",
    }
    said = f"\n## File\n\n`{FILES[layout]}` was checked with {reader}, which reads it as the change that was trained. "
    section = f"{said}{of_rank}{own[layout]}.\n"
    return f"{section}\n{in_unos_code(FILES[layout], max(ranks))}\n" if layout is Format.UNO else section


def _open(run: Path) -> RunFolder:
    """Open a run of align or personalize; raise RunError for any other."""
    start = "pixrl align RECIPE --out DIR, or pixrl personalize RECIPE --out DIR"
    if not run.is_dir():
        raise RunError(f"There is no run folder {run}. To make a run that can be exported, type: {start}")
    folder = RunFolder.open(run, allow_changed=True)
    if folder.kind not in KINDS:
        raise RunError(
            f"{run} is a run of kind {folder.kind!r}, which trains no LoRA and no weights: there is nothing to export. "
            f"Type: {start}"
        )
    return folder


def _left_out(config: AlignConfig, base: Path) -> tuple[str, ...]:
    """Return the parts that diffusers must be told to do without: SD3's T5, where the run or its model had none."""
    optional = OPTIONAL_PARTS.get(pipeline_name(base), ())
    present = components(base) if Path(config.model).is_dir() else optional
    return tuple(name for name in optional if not config.t5 or name not in present)


def _lora(
    folder: RunFolder, config: AlignConfig, tensors: Mapping[str, Tensor], slot: Slot, kind: str
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return the LoRA that the run trained, added to the one that was merged below it."""
    state = {name.removeprefix(_SLOTS): x for name, x in tensors.items() if name.startswith(_SLOTS)}
    trained = slot_lora(state, slot.value, config.lora.alpha / config.lora.rank)
    if not trained:
        raise CheckpointError(f"The checkpoint holds no LoRA in the slot {slot.value!r}.")
    if config.lora.base is None:
        return trained
    below = read_lora(Path(config.lora.base), kind)
    if start_if_any(folder).get("merged", [digest(below)]) != [digest(below)]:
        raise CheckpointError(
            f"{config.lora.base} is not the LoRA that {folder.path} was trained on top of. Put that one back."
        )
    return added([below, trained])


def _describe(folder: RunFolder, config: AlignConfig, facts: Facts, place: Path, notes: str) -> Path:
    """Write the card, with `notes` at its end, and its pictures; return the card's path."""
    pairs = shown_pairs(folder)
    for pair in pairs:
        for source, name in pair.files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place / name, source.read_bytes())
    write_atomic(place / CARD, (encodable(write_card(folder, config, facts, pairs)) + notes).encode())
    return place / CARD
