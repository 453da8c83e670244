"""Published weights: where they lie, how they are read, and what the provenance of a score says of them.

A checkpoint is a transformers folder, with safetensors or pytorch_model.bin; one .pt, or shards with an index. A
pickled file is read by torch's weights-only reader, which builds tensors and plain containers and refuses everything
else: nothing in it is run. Keys that do not fit are named, each with the nearest one that was expected.

Provenance is a flat table of texts. The main model is `model` (id with checksum), `revision` and `licence`; every
further part has its own name in front: `segmenter`, `segmenter_revision`, `segmenter_licence`, and what else it says.
"""

import functools
import hashlib
import inspect
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from pixrl.untrusted import plain

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


NOT_STATED = "not stated: see the model's page"
Licences = Mapping[str, str]
NONE_KNOWN: Licences = {}
NON_COMMERCIAL = "BRIA RMBG-2.0: non-commercial use only, commercial use by agreement with BRIA AI"
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
WORDS = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*processor_config.json",
)
"""What is needed of a checkpoint whose weights are not."""
_FIELD = re.compile(r"^(license|license_name):(.*)$", re.MULTILINE)


def describe(ref: str | Path, path: Path, licences: Licences = NONE_KNOWN) -> dict[str, str]:
    """Provenance of the weights that a folder's model is loaded from, or of one file: id, checksum, revision, licence.

    `licences`: see `licence`.

    Raises:
        CheckpointError: the folder holds no weights.
    """
    folder, files = (path.parent, [path]) if path.is_file() else (path, weight_shards(path))
    return describe_files(ref, folder, files, licences)


def describe_files(
    ref: str | Path, folder: Path, files: Iterable[Path], licences: Licences = NONE_KNOWN
) -> dict[str, str]:
    """The same of some files of a folder."""
    return origin(ref, folder, files, licence(ref, folder, licences))


def licence(ref: str | Path, folder: Path, licences: Licences = NONE_KNOWN, known: str = NOT_STATED) -> str:
    """The licence of weights: what the README in their folder states in its front matter, or what is known of them.

    Args:
        ref: what the user calls them.
        folder: where they lie.
        licences: hub id -> licence of published weights.
        known: the licence where neither says.
    """
    stated = _front_matter(folder / "README.md")
    if "rmbg" in f"{ref} {stated}".lower():
        return NON_COMMERCIAL
    if str(ref).startswith("toy:"):
        return "Apache-2.0"
    return stated or licences.get(str(ref).partition("@")[0], known)


def is_weight_file(ref: str | Path) -> bool:
    """Whether a reference is the path of one file, not a folder or a hub id."""
    return Path(str(ref)).suffix in WEIGHT_SUFFIXES


def find_file(ref: str | Path, name: str) -> Path:
    """One file of a published checkpoint: `ref` is the file itself, a folder that holds `name`, or a hub id.

    Raises:
        CheckpointError: there is no such file, or the hub does not give it.
    """
    given = Path(str(ref)).expanduser()
    if is_weight_file(ref):
        if not given.is_file():
            raise CheckpointError(
                f"The file {str(ref)!r} does not exist. Give {name}, its folder, or a hub id."
            )
        return given
    return require_file(published_folder(ref, (name, "README.md")), name)


def words_folder(ref: str | Path) -> Path:
    """The folder of a checkpoint's config, tokenizer and preprocessing; its weights are not fetched.

    Raises:
        CheckpointError: it has no config, or the hub does not give it.
    """
    folder = published_folder(ref, WORDS)
    require_file(folder, "config.json")
    return folder


def _front_matter(readme: Path) -> str | None:
    """`license`, or `license_name` where that is `other`."""
    if not readme.is_file():
        return None
    opening, head, *_ = (*readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2), "")
    found = [] if opening else _FIELD.findall(head)
    fields = {name: text for name, given in found if (text := plain(given.strip().strip("'\"")))}
    stated = fields.get("license")
    return fields.get("license_name", stated) if stated == "other" else stated


OWN_LICENCE = "its own"


def part(name: str, provenance: Mapping[str, str]) -> dict[str, str]:
    """A part's provenance under its name in the whole's: `model` becomes NAME, any other key NAME_key."""
    return {name if key == "model" else f"{name}_{key}": value for key, value in provenance.items()}


def describe_words(
    ref: str | Path,
    folder: Path,
    patterns: Sequence[str] = WORDS,
    known: str = NOT_STATED,
    licences: Licences = NONE_KNOWN,
) -> dict[str, str]:
    """Provenance of a checkpoint of which config, tokenizer and preprocessing are taken: with those files' checksum.

    Args:
        ref: what the user calls it.
        folder: where its files lie.
        patterns: their names.
        known: the licence of the published checkpoint, where neither the folder nor `licences` states one.
        licences: hub id -> licence of published weights.
    """
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return origin(ref, folder, files, licence(ref, folder, licences, known))


def describe_function(function: Callable[..., object], label: str | None = None) -> dict[str, str]:
    """Provenance of a function of the user's: its import path with the checksum of the file that it is written in.

    A file that this one imports is not in the checksum.
    """
    inner = unwrapped(function)
    named = inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)
    path = f"{named.__module__}:{named.__qualname__}"
    return {
        "model": f"{path if label is None else label} ({_source_hash(named)})",
        "revision": "local",
        "licence": OWN_LICENCE,
    }


def source_of(function: Callable[..., object]) -> str:
    """The text of a function, where it has one: of one that no import leads to again, all that tells what it did."""
    inner = unwrapped(function)
    try:
        return inspect.getsource(inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner))
    except (OSError, TypeError):
        return f"no source: {function!r}"


def unwrapped(function: Callable[..., object]) -> Callable[..., object]:
    """What is behind decorators and `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    inner: Callable[..., object] = inspect.unwrap(function)
    return inner


def _source_hash(function: Callable[..., object]) -> str:
    """16 hex digits from the file that the function is written in."""
    module = inspect.getmodule(function)
    file = None if module is None else vars(module).get("__file__")
    if file is None or not Path(file).is_file():
        return "no source file"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
