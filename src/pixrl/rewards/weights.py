"""Published weights: a transformers folder, with safetensors or pytorch_model.bin; one .pt, or shards with an index.

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
from pixrl.hub_check import BIN, BIN_INDEX, misfits, some
from pixrl.hub_fetch import fetch_files, fetch_model
from pixrl.plugins import Caught

LAYOUTS = (("model.safetensors", "model.safetensors.index.json"), (BIN, BIN_INDEX))
"""Weights whole and the index of their shards, in the order in which transformers takes them."""
LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError)
"""What transformers raises where a folder does not fit."""
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


def published_model(ref: str | Path, beside: Sequence[str]) -> Path:
    """`published_folder` of a model: of a hub id, the files that match `beside` and the weights of one format.

    Raises:
        CheckpointError: the folder does not exist, or the hub does not give it.
        InputError: the reference is none of toy:NAME, a folder and a hub id.
    """
    found = resolve(ref)
    return found if isinstance(found, Path) else fetch_model(found, beside)


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
    """The weight files that a folder's model is loaded from: the only one, or those of its index; .bin comes last.

    Raises:
        CheckpointError: there is none, or a listed shard is missing.
    """
    for single, index in LAYOUTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _listed(folder, folder / index)
    names = ", ".join(name for layout in LAYOUTS for name in layout)
    raise CheckpointError(f"{folder} holds no weights: none of {names}.")


def _listed(folder: Path, index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, Mapping) or not listed:
        raise CheckpointError(f"{index} has no weight_map: half written? Download it again.")
    return [require_file(folder, name) for name in sorted(set(listed.values()))]


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
    arguments = _given(config, weights, dtype)
    model, missing, unexpected = from_pretrained(kind, source, arguments | options)
    refuse_misfits(missing, unexpected, source)
    return model


def load_folder(
    kind: Any, folder: Path, dtype: torch.dtype, *, may_lack: Sequence[str] = (), **options: object
) -> Any:
    """A frozen transformers model of a class from a local folder, which may hold more than the class needs.

    Args:
        kind: the class; for a folder with pytorch_model.bin no Auto class.
        folder: its config, and its weights as `weight_shards` finds them.
        dtype: of the model's weights.
        may_lack: parts of the names of weights that the output does not depend on.
        options: further arguments of the class.

    Raises:
        CheckpointError: it cannot be read, or a weight is missing.
    """
    arguments = folder_arguments(kind, folder, dtype)
    model, missing, _ = from_pretrained(kind, folder, arguments | options)
    refuse_misfits([key for key in missing if not any(part in key for part in may_lack)], [], folder)
    return model


def folder_arguments(kind: Any, folder: Path, dtype: torch.dtype) -> dict[str, object]:
    """What `from_pretrained` of a class takes to load a folder; pytorch_model.bin is read by `read_weights`.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
    """
    files = weight_shards(folder)
    if files[0].suffix == ".safetensors":
        return {"pretrained_model_name_or_path": folder, "local_files_only": True, "dtype": dtype}
    return _given(_config(kind.config_class, folder), read_weights(files), dtype)


def from_pretrained(
    kind: Any, source: Path, arguments: Mapping[str, object]
) -> tuple[Any, list[str], list[str]]:
    """A frozen model of a class, and the names of the weights that were missing and of those that it does not know.

    Raises:
        CheckpointError: transformers refuses the arguments, which stand for `source`.
    """
    try:
        model, report = kind.from_pretrained(output_loading_info=True, **arguments)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{source} could not be loaded as a {kind.__name__}: {error}") from error
    missing, unexpected = (sorted(report[keys]) for keys in ("missing_keys", "unexpected_keys"))
    return model.requires_grad_(False).eval(), missing, unexpected


def class_in(mapping: Any, folder: Path) -> Any:
    """The class that one of transformers' mappings (MODEL_MAPPING ...) has for the model of a folder's config.

    Raises:
        CheckpointError: transformers does not know the model, or the mapping has no class for it.
    """
    from transformers import AutoConfig

    config = _config(AutoConfig, folder)
    if type(config) not in mapping:
        known = ", ".join(sorted(repr(str(one.model_type)) for one in mapping))
        raise CheckpointError(f"{folder} holds a {config.model_type!r} model, which is none of {known}.")
    return mapping[type(config)]


def _config(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{folder}/config.json could not be read: {error}") from error


def _given(config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, object]:
    """The arguments of `from_pretrained` for weights that are already read."""
    return {
        "pretrained_model_name_or_path": None,
        "config": config,
        "state_dict": dict(weights),
        "dtype": dtype,
    }


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
