"""Atomic checkpoints with checksums.

`checkpoints/step-000100/` holds tensors.safetensors, state.json and checksums.json. It appears under its name only
when all of it is on the disk. Only safetensors and JSON: reading one never runs code.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pixrl.errors import CheckpointError
from pixrl.runs.files import (
    discard,
    disk_full,
    disk_guard,
    free_bytes,
    fsync_folder,
    replace_folder,
    sha256,
    temporary,
    write_durable,
)

if TYPE_CHECKING:
    from torch import Tensor

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

TENSORS = "tensors.safetensors"
STATE = "state.json"
CHECKSUMS = "checksums.json"
SET_ASIDE = ".set-aside"
"""The suffix of checkpoints that nothing reads: damaged ones, and those of steps that are drawn again."""
_NAME = re.compile(r"step-(\d{6,})")
_log = logging.getLogger("pixrl")


def step_folder(run_path: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return Path(run_path) / "checkpoints" / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder from its name. Raises CheckpointError for any other folder."""
    match = _NAME.fullmatch(Path(folder).name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint folder; its name would be like step-000100.")
    return int(match[1])


def save(folder: Path, tensors: Mapping[str, "Tensor"], state: Mapping[str, JSON]) -> None:
    """Write a checkpoint, all of it or nothing; one of the same step is replaced.

    Raises:
        RunError: the disk is full; no part of the checkpoint is left.
    """
    from safetensors.torch import save as save_tensors  # here: who only looks at a run needs no torch

    folder = Path(folder).absolute()
    step_of(folder)
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    files = {
        TENSORS: save_tensors(copies),
        STATE: (json.dumps(state, indent=1, ensure_ascii=False) + "\n").encode(),
    }
    checksums = {name: sha256(content) for name, content in files.items()}
    files[CHECKSUMS] = (json.dumps(checksums, indent=1) + "\n").encode()
    needed = sum(len(content) for content in files.values())
    beside = temporary(folder, "tmp")
    with disk_guard(folder, needed):
        try:
            beside.mkdir(parents=True, exist_ok=True)
            if free_bytes(beside) < needed:
                raise disk_full(folder, needed)
            for name, content in files.items():
                write_durable(beside / name, content)
            fsync_folder(beside)
            replace_folder(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read the tensors and the state of a checkpoint. JSON has turned the state's tuples into lists.

    Raises:
        CheckpointError: a file is missing or does not match its checksum; the message names the last good checkpoint.
    """
    from safetensors.torch import load as load_tensors

    folder = Path(folder).absolute()
    try:
        files = _read_verified(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_offer(folder)}") from None
    return load_tensors(files[TENSORS]), json.loads(files[STATE])


def latest(run_path: Path, at_most: int | None = None) -> Path | None:
    """Find the newest whole checkpoint of step `at_most` or earlier; damaged ones are skipped with a warning."""
    in_range = (f for f in reversed(all_folders(run_path)) if at_most is None or step_of(f) <= at_most)
    return next((folder for folder in in_range if _is_whole(folder)), None)


def keep_last(run_path: Path, count: int) -> None:
    """Delete every checkpoint older than the newest `count` whole ones; `count` is at least 1."""
    if count < 1:
        raise ValueError(f"keep_last: count is {count}; at least one checkpoint is kept.")
    kept = 0
    for folder in reversed(all_folders(run_path)):
        if kept == count:
            discard(folder)
        elif _is_whole(folder):
            kept += 1


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that only a person finds it, and return its new path."""
    place = folder.with_name(folder.name + SET_ASIDE)
    if place.exists():
        discard(place)
    os.rename(folder, place)
    fsync_folder(folder.parent)
    return place


def set_aside_after(run_path: Path, step: int) -> None:
    """Set aside the checkpoints of later steps than `step`, from which a resumed run does not go on."""
    for folder in all_folders(run_path):
        if step_of(folder) > step:
            set_aside(folder)


def read_state(folder: Path) -> dict[str, Any] | None:
    """Read the state of a checkpoint; None where the checkpoint is damaged."""
    try:
        state: dict[str, Any] = json.loads(_read_verified(folder)[STATE])
    except CheckpointError:
        return None
    return state


def problem_of(folder: Path) -> str | None:
    """Say why a checkpoint is damaged; None where it is whole."""
    try:
        _read_verified(folder)
    except CheckpointError as error:
        return str(error)
    return None


def all_folders(run_path: Path) -> list[Path]:
    """List the checkpoints of a run, whole or damaged, oldest first."""
    place = Path(run_path).absolute() / "checkpoints"
    found = [entry for entry in place.iterdir() if _NAME.fullmatch(entry.name)] if place.is_dir() else []
    return sorted(found, key=step_of)


def _is_whole(folder: Path) -> bool:
    problem = problem_of(folder)
    if problem is not None:
        _log.warning("Skipped a damaged checkpoint: %s", problem)
    return problem is None


def _read_verified(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, or CheckpointError naming the one that is missing or damaged."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint {folder}.")
    try:
        checksums = json.loads((folder / CHECKSUMS).read_bytes())
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder / CHECKSUMS} is missing or damaged: a half-written checkpoint."
        ) from None
    if not isinstance(checksums, dict) or set(checksums) != {TENSORS, STATE}:
        raise CheckpointError(f"{folder / CHECKSUMS} does not list {TENSORS} and {STATE}.")
    files = {}
    for name, expected in checksums.items():
        path = folder / name
        content = path.read_bytes() if path.is_file() else None
        if content is None:
            raise CheckpointError(f"{path} is missing.")
        if sha256(content) != expected:
            raise CheckpointError(f"{path} does not match its checksum.")
        files[name] = content
    return files


def _offer(folder: Path) -> str:
    run = folder.parent.parent
    good = latest(run)
    if good is None:
        return f"No good checkpoint is left; to begin with its recipe, type: pixrl resume {run}"
    return f"The last good one is {good}; to go on from it, type: pixrl resume {run}"
