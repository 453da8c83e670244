"""Published weights outside transformers' folder layout: one .pt, one .safetensors, or shards with an index.

A pickled file is read by torch's weights-only reader, which builds tensors and plain containers and refuses everything
else: nothing in it is run. Keys that do not fit are named, each with the nearest one that was expected.
"""

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pixrl.errors import CheckpointError
from pixrl.hub import fingerprint, read_json, resolve
from pixrl.hub_check import misfits, some
from pixrl.hub_fetch import fetch_files
from pixrl.rewards.calls import Caught

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Names under which training code saves a state dict beside other things."""


def published_folder(ref: str | Path, patterns: Sequence[str]) -> Path:
    """The local folder of a reference; of a hub id, the files that fit the patterns are fetched where not yet cached.

    Raises:
        CheckpointError: the folder does not exist, or the hub does not give it.
        InputError: the reference is none of toy:NAME, a folder and a hub id.
    """
    found = resolve(ref)
    if isinstance(found, Path):
        return found
    return fetch_files(found, patterns)


def require_file(folder: Path, name: str) -> Path:
    """A file of a checkpoint's folder.

    Raises:
        CheckpointError: it is not there; says what is.
    """
    path = folder / name
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} is missing; the folder holds {there}. Download it again, for example: "
            f"hf download OWNER/NAME {name} --local-dir {folder}"
        )
    return path


def origin(ref: str | Path, folder: Path, files: Iterable[Path], licence: str) -> dict[str, str]:
    """What a score's provenance says of weights: id with checksum, the hub's commit (or `local`), and the licence."""
    is_snapshot = folder.parent.name == "snapshots"
    return {
        "model": f"{ref} ({fingerprint(folder, files)})",
        "revision": folder.name if is_snapshot else "local",
        "licence": licence,
    }


def weight_shards(folder: Path) -> list[Path]:
    """The weight files that a folder's index lists, or its only one; safetensors before .bin.

    Raises:
        CheckpointError: there is none, or a listed shard is missing.
    """
    for index in (folder / name for name in INDEXES):
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, Mapping) or not listed:
                raise CheckpointError(f"{index} has no weight_map: half written? Download it again.")
            return [require_file(folder, name) for name in sorted(set(listed.values()))]
    for single in (folder / name for name in SINGLES):
        if single.is_file():
            return [single]
    raise CheckpointError(f"{folder} holds no weights: none of {', '.join((*INDEXES, *SINGLES))}.")


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Name -> tensor of one or several files, on the CPU and, where the format allows it, mapped from the disk.

    Raises:
        CheckpointError: a file is cut short, or holds anything but tensors.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
    return weights


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Puts every weight into its place; the module keeps its dtype.

    Raises:
        CheckpointError: a weight is missing, left over or of another shape; says which, and what was expected.
    """
    expected = module.state_dict()
    refuse_misfits(
        [key for key in expected if key not in weights],
        [key for key in weights if key not in expected],
        source,
    )
    for key, tensor in expected.items():
        if tensor.shape != weights[key].shape:
            raise CheckpointError(
                f"{source}: {key} has the shape {list(weights[key].shape)}, but {list(tensor.shape)} was expected. "
                "Is it a checkpoint of another size?"
            )
    module.load_state_dict(dict(weights))


def build(
    kind: Any, config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype, source: Path, **options: object
) -> Any:
    """A frozen transformers model of a class and configuration, from weights under the names that it saves itself.

    `options` are further arguments of the class.

    Raises:
        CheckpointError: the weights do not fit.
    """
    try:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{source} could not be loaded as a {kind.__name__}: {error}") from error
    refuse_misfits(sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), source)
    return model.requires_grad_(False).eval()


def load_folder(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A frozen transformers model of a class from a local folder, which may hold more than the class needs.

    Raises:
        CheckpointError: it cannot be read, or a weight is missing.
    """
    try:
        model, report = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder} could not be loaded as a {kind.__name__}: {error}") from error
    refuse_misfits(sorted(report["missing_keys"]), [], folder)
    return model.requires_grad_(False).eval()


def refuse_misfits(missing: Sequence[str], unexpected: Sequence[str], source: Path) -> None:
    """Nothing where both are empty.

    Raises:
        CheckpointError: names the first few keys, each left-over one with the nearest of the missing ones.
    """
    if missing or unexpected:
        raise CheckpointError(
            f"{source} does not fit: {misfits(missing, unexpected)}. Is it another model's checkpoint?"
        )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}): cut short, or another format? Download it again."
        ) from error


def _read_pickled(file: Path) -> dict[str, Tensor]:
    with Caught() as caught:
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
        )
    if caught.failure is not None:
        raise CheckpointError(
            f"{file} cannot be read as weights: {caught.failure.reason}. It is cut short, or it holds more than "
            "tensors, which is never run. Download it again, or save its tensors as .safetensors."
        )
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not named weights.")
    weights = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{file} holds no named weights, only {some([str(key) for key in content])}.")
    return weights
