"""The mixing coefficients of one child as a file, for programs that apply them: `integrations/comfyui` reads it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from pixrl.errors import ConfigError, InputError
from pixrl.fusion.config import KIND, FuseConfig, open_run
from pixrl.jobs import fuse as fuse_job
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import RunFolder
from pixrl.runs.log import load_coefficients

FORMAT = "pixrl-coefficients"
TAKEN = ("columns", "tokens", "velocity")
"""The mixings that ComfyUI's conditionings can say; the others change with the sampling step."""


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
    if config.mixing.kind not in TAKEN:
        raise ConfigError(
            f"The children of {run} are mixed by {config.mixing.kind}, which changes with the sampling step, so no "
            f"conditioning can say it: ComfyUI's node takes {', '.join(TAKEN)}."
        )
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
        "mixing": json.dumps(config.mixing.model_dump(mode="json")),
        "pooled": config.pooled.value,
        "seed": str(seed),
    }
    return safetensors.torch.save({"coefficients_ND": values_ND.float().cpu().contiguous()}, about)
