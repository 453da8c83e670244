"""Published weights: finding and reading them, and the provenance that scores carry of them.

A checkpoint is a transformers folder with safetensors or pytorch_model.bin, one .pt file, or shards with an index. A
pickled file is read by torch's weights-only reader, which builds tensors and plain containers and refuses everything
else: nothing in it is run. Keys that do not fit are named, each with the nearest expected one.

Provenance is a flat table of strings. The main model has the keys `model` (id with checksum), `revision` and `licence`;
those of every further part begin with its name: `segmenter`, `segmenter_revision`, `segmenter_licence` and so on.
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
from pixrl.hub import fetch_files, fetch_model, fingerprint, resolve
from pixrl.hub_check import BIN, BIN_INDEX, misfits, read_json, some
from pixrl.plugins import Caught
from pixrl.untrusted import plain

LAYOUTS = (("model.safetensors", "model.safetensors.index.json"), (BIN, BIN_INDEX))
"""The names of whole weights and of the index of their shards, in the order in which transformers looks for them."""
LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError)
"""The exceptions that transformers raises where a folder does not fit."""
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""The keys under which training code saves a state dict beside other things."""


def published_folder(ref: str | Path, patterns: Sequence[str]) -> Path:
    """Return the local folder of a reference; fetch a hub id's files that match the patterns if not cached.

    Raises:
        CheckpointError: the folder does not exist, or the hub does not give it.
        InputError: the reference is none of toy:NAME, a folder and a hub id.
    """
    found = resolve(ref)
    if isinstance(found, Path):
        return found
    return fetch_files(found, patterns)


def published_model(ref: str | Path, beside: Sequence[str]) -> Path:
    """Return a model's local folder; fetch a hub id's files that match `beside`, and weights in one format.

    Raises:
        CheckpointError: the folder does not exist, or the hub does not give it.
        InputError: the reference is none of toy:NAME, a folder and a hub id.
    """
    found = resolve(ref)
    return found if isinstance(found, Path) else fetch_model(found, beside)


def require_file(folder: Path, name: str) -> Path:
    """Return the path of a file in a checkpoint's folder.

    Raises:
        CheckpointError: it is missing; the message lists what the folder holds.
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
    """Return the provenance of weights: id with checksum, the hub's commit (or `local`), and the licence."""
    is_snapshot = folder.parent.name == "snapshots"
    return {
        "model": f"{ref} ({fingerprint(folder, files)})",
        "revision": folder.name if is_snapshot else "local",
        "licence": licence,
    }


def weight_shards(folder: Path) -> list[Path]:
    """Return the files that a folder's weights are read from: one, or those of its index; .bin comes last.

    Raises:
        CheckpointError: there is none, or a listed shard is missing.
    """
    for single, index in LAYOUTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            listed = read_json(folder / index).get("weight_map")
            if not isinstance(listed, Mapping) or not listed:
                raise CheckpointError(f"{folder / index} has no weight_map: half written? Download it again.")
            return [require_file(folder, name) for name in sorted(set(listed.values()))]
    names = ", ".join(name for layout in LAYOUTS for name in layout)
    raise CheckpointError(f"{folder} holds no weights: none of {names}.")


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Read one or several files as name -> tensor, on the CPU and, where the format allows, memory-mapped.

    Raises:
        CheckpointError: a file is cut short, or holds anything but tensors.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            try:
                weights |= load_file(file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{file} cannot be read as safetensors ({error}): cut short, or another format? Download it again."
                ) from error
            continue
        with Caught() as caught:
            mapped = zipfile.is_zipfile(file) or None
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
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
        named = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if not named:
            raise CheckpointError(
                f"{file} holds no named weights, only {some([str(key) for key in content])}."
            )
        weights |= named
    return weights


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load every weight into a module, which keeps its dtype.

    Raises:
        CheckpointError: a weight is missing, left over or of another shape; the message names the weight and what was
            expected.
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
    """Build a frozen transformers model of a class and configuration from weights under transformers' names.

    `options` are further arguments of the class; `source` names the weights in messages.

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
    """Load a frozen transformers model of a class from a local folder, which may hold more than the class needs.

    Args:
        kind: the class; for a folder with pytorch_model.bin no Auto class.
        folder: the folder of its config, and of its weights as `weight_shards` finds them.
        dtype: the type of the model's weights.
        may_lack: parts of the names of weights that may be missing, since the output does not depend on them.
        options: further arguments of the class.

    Raises:
        CheckpointError: it cannot be read, or a weight is missing.
    """
    arguments = folder_arguments(kind, folder, dtype)
    model, missing, _ = from_pretrained(kind, folder, arguments | options)
    refuse_misfits([key for key in missing if not any(part in key for part in may_lack)], [], folder)
    return model


def folder_arguments(kind: Any, folder: Path, dtype: torch.dtype) -> dict[str, object]:
    """Return the arguments of a class's `from_pretrained` for a folder; pytorch_model.bin is read by `read_weights`.

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
    """Load a frozen model of a class; return it with the names of missing weights and of unexpected ones.

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
    """Return the class that a mapping of transformers (MODEL_MAPPING ...) has for the model of a folder's config.

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
    """Return the arguments of `from_pretrained` for weights that are already read."""
    return {
        "pretrained_model_name_or_path": None,
        "config": config,
        "state_dict": dict(weights),
        "dtype": dtype,
    }


def refuse_misfits(missing: Sequence[str], unexpected: Sequence[str], source: Path) -> None:
    """Refuse missing or unexpected keys; do nothing where there are none.

    Raises:
        CheckpointError: there are some; the message names the first few, each unexpected one with the nearest missing
            one.
    """
    if missing or unexpected:
        raise CheckpointError(
            f"{source} does not fit: {misfits(missing, unexpected)}. Is it another model's checkpoint?"
        )


def under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose names begin with a prefix, under their names without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


NOT_STATED = "not stated: see the model's page"
"""The licence where neither the folder nor a table of known licences states one."""
Licences = Mapping[str, str]
"""Hub id -> licence of published weights."""
NONE_KNOWN: Licences = {}
NON_COMMERCIAL = "BRIA RMBG-2.0: non-commercial use only, commercial use by agreement with BRIA AI"
"""The licence of RMBG weights, whatever their folder states."""
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
"""The suffixes of single files of weights."""
WORDS = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*processor_config.json",
)
"""The patterns of the files that are needed of a checkpoint whose weights are not."""
_FIELD = re.compile(r"^(license|license_name):(.*)$", re.MULTILINE)


def describe(ref: str | Path, path: Path, licences: Licences = NONE_KNOWN) -> dict[str, str]:
    """Return the provenance of a folder's weights, or of one file: id, checksum, revision, licence.

    `licences` are those of `licence`.

    Raises:
        CheckpointError: the folder holds no weights.
    """
    folder, files = (path.parent, [path]) if path.is_file() else (path, weight_shards(path))
    return describe_files(ref, folder, files, licences)


def describe_files(
    ref: str | Path, folder: Path, files: Iterable[Path], licences: Licences = NONE_KNOWN
) -> dict[str, str]:
    """Return the provenance of some files of a folder: id, checksum, revision, licence."""
    return origin(ref, folder, files, licence(ref, folder, licences))


def licence(ref: str | Path, folder: Path, licences: Licences = NONE_KNOWN, known: str = NOT_STATED) -> str:
    """Return the licence of weights: what the front matter of their folder's README states, or what is known.

    Args:
        ref: the user's reference to them.
        folder: their folder.
        licences: hub id -> licence of published weights.
        known: the licence where neither states one.
    """
    stated = _front_matter(folder / "README.md")
    if "rmbg" in f"{ref} {stated}".lower():
        return NON_COMMERCIAL
    if str(ref).startswith("toy:"):
        return "Apache-2.0"
    return stated or licences.get(str(ref).partition("@")[0], known)


def is_weight_file(ref: str | Path) -> bool:
    """Return whether a reference is the path of one file, not a folder or a hub id."""
    return Path(str(ref)).suffix in WEIGHT_SUFFIXES


def find_file(ref: str | Path, name: str) -> Path:
    """Return one file of a published checkpoint; `ref` is the file itself, a folder that holds `name`, or a hub id.

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
    """Return the folder of a checkpoint's config, tokenizer and preprocessing; its weights are not fetched.

    Raises:
        CheckpointError: it has no config, or the hub does not give it.
    """
    folder = published_folder(ref, WORDS)
    require_file(folder, "config.json")
    return folder


def _front_matter(readme: Path) -> str | None:
    """Return the README's `license`, or its `license_name` where that is `other`."""
    if not readme.is_file():
        return None
    opening, head, *_ = (*readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2), "")
    found = [] if opening else _FIELD.findall(head)
    fields = {name: text for name, given in found if (text := plain(given.strip().strip("'\"")))}
    stated = fields.get("license")
    return fields.get("license_name", stated) if stated == "other" else stated


OWN_LICENCE = "its own"
"""The licence of the user's own functions."""


def part(name: str, provenance: Mapping[str, str]) -> dict[str, str]:
    """Return a part's provenance under its name in the whole's: `model` becomes NAME, any other key NAME_key."""
    return {name if key == "model" else f"{name}_{key}": value for key, value in provenance.items()}


def describe_words(
    ref: str | Path,
    folder: Path,
    patterns: Sequence[str] = WORDS,
    known: str = NOT_STATED,
    licences: Licences = NONE_KNOWN,
) -> dict[str, str]:
    """Return the provenance of a checkpoint's config, tokenizer and preprocessing, with those files' checksum.

    Args:
        ref: the user's reference to it.
        folder: the folder of its files.
        patterns: the files' names.
        known: the licence of the published checkpoint, where neither the folder nor `licences` states one.
        licences: hub id -> licence of published weights.
    """
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return origin(ref, folder, files, licence(ref, folder, licences, known))


def describe_function(function: Callable[..., object], label: str | None = None) -> dict[str, str]:
    """Return the provenance of the user's function: its import path with the checksum of its file.

    The checksum does not cover the files that this one imports. `label` replaces the import path.
    """
    inner = unwrapped(function)
    named = inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)
    path = f"{named.__module__}:{named.__qualname__}"
    module = inspect.getmodule(named)
    file = None if module is None else vars(module).get("__file__")
    checksum = "no source file"
    if file is not None and Path(file).is_file():
        checksum = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return {
        "model": f"{path if label is None else label} ({checksum})",
        "revision": "local",
        "licence": OWN_LICENCE,
    }


def source_of(function: Callable[..., object]) -> str:
    """Return the source of a function, which alone tells what it did where no import path leads back to it."""
    inner = unwrapped(function)
    try:
        return inspect.getsource(inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner))
    except (OSError, TypeError):
        return f"no source: {function!r}"


def unwrapped(function: Callable[..., object]) -> Callable[..., object]:
    """Return the function behind decorators and `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    inner: Callable[..., object] = inspect.unwrap(function)
    return inner
