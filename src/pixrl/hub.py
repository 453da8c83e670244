"""Where checkpoints come from, and what their folders say about themselves.

A checkpoint reference is one of

    toy:NAME                          shipped with the package
    FOLDER                            in the published diffusers / transformers layout
    owner/name, owner/name@revision   a hub id; a branch, tag or commit pins it
    FILE.safetensors                  a whole pipeline in one file, described by the folder of the same name beside it,
    FILE.safetensors@CONFIG           or by CONFIG: a folder or a hub id, which also holds what the file lacks
    path/to/file.py:Name@REFERENCE    any of these, loaded by an adapter of yours; or module:Name@REFERENCE

All end as a local folder, which `check_folder` (hub_check.py) refuses when it is half written, before anything heavy
is imported; hub_fetch.py downloads. This module imports neither torch nor the model libraries.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pixrl import hub_check
from pixrl.errors import CheckpointError, InputError, did_you_mean
from pixrl.hub_check import (
    T5_COMPONENTS,
    TOY_ROOT,
    Layout,
    check_folder,
    components,
    read_header,
    read_json,
    remedy,
)
from pixrl.hub_fetch import CONFIG_FILES, SAFETENSORS, fetch_files, fetch_model, fetch_pipeline, is_hub_id
from pixrl.text import require_path

__all__ = [
    "CARD_FILE",
    "TOY_NAMES",
    "TOY_PREFIX",
    "TOY_ROOT",
    "Card",
    "Checkpoint",
    "Layout",
    "Presence",
    "check_folder",
    "checkpoint_fingerprint",
    "components",
    "fingerprint",
    "folder",
    "full_path",
    "locate",
    "read_card",
    "read_json",
    "resolve",
    "split_adapter",
    "split_single_file",
    "weight_files",
]

TOY_PREFIX = "toy:"
TOY_NAMES = ("clip", "vae", "segmenter", "identity", "preference", "sd3", "flux")
TOY_GENERATORS = ("sd3", "flux")
CARD_FILE = "pixrl.json"
SINGLE_FILE = ".safetensors"
_ADAPTER = re.compile(r"((?:[^@]+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*)@(.+)")
_BESIDE_WEIGHTS = (
    "*config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", CARD_FILE,
    "README.md",
)  # fmt: skip
"""What a transformers folder holds beside its weights."""


class Presence(BaseModel):
    """The calibrated thresholds of RMLer's selection for one checkpoint and its similarity encoder."""

    model_config = ConfigDict(frozen=True, extra="allow")
    threshold: float
    balance: float


class Card(BaseModel):
    """The settings a checkpoint was trained with (`pixrl.json` in its folder); None where it does not say.

    Further keys are kept in `model_extra`: a card also carries provenance that nothing here reads.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    steps: int | None = None
    guidance: float | None = None
    resolution: int | None = None
    max_sequence_length: int | None = None
    vocabulary: tuple[str, ...] | None = None
    exemplar_prompt: str = "A photo of {concept}"
    presence: Presence | None = None
    clip: str | None = None
    segmenter: str | None = None
    colors: tuple[str, ...] | None = None
    color_templates: tuple[str, ...] | None = None
    color_background: tuple[float, float, float] | None = None
    color_zoom: bool | None = None
    min_area: float | None = None
    score_evidence: float | None = None
    position_ids: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline on the disk."""

    folder: Path
    """Its configs and, but for what `file` holds, its weights."""
    file: Path | None = None
    """The one file that holds the weights, in the layout of the model's authors."""
    adapter: str | None = None
    """The class that the reference names to load it; None: the one that loads pipelines of its class."""


def resolve(ref: str | Path, layout: Layout | None = None) -> Path | str:
    """The folder of `toy:NAME` or of a local path; a hub id is given back as it is. Nothing is downloaded.

    `layout`: PIPELINE where a generator is wanted; then messages offer toy generators alone.

    Raises:
        CheckpointError: the toy checkpoint or the folder does not exist.
        InputError: the reference is none of the kinds.
    """
    text = split_adapter(ref)[1]
    toys = TOY_GENERATORS if layout is Layout.PIPELINE else TOY_NAMES
    if text.startswith(TOY_PREFIX):
        return _toy_folder(text.removeprefix(TOY_PREFIX), toys)
    path = Path(require_path(text, "the name of a checkpoint")).expanduser()
    if text and path.is_dir():
        return path
    if isinstance(ref, Path) or text.startswith((".", "/", "~")) or "\\" in text or path.exists():
        raise CheckpointError(
            f"The checkpoint folder {text!r} does not exist. Give a folder with a model_index.json or config.json, "
            f"a hub id such as 'stabilityai/sdxl-turbo', or one of {_toy_list(toys)}."
        )
    if is_hub_id(text):
        return text
    refs = _toy_refs(toys)
    near = did_you_mean(text, refs) or did_you_mean(f"{TOY_PREFIX}{text}", refs)
    raise InputError(
        f"{text!r} is not a checkpoint reference.{near} "
        f"Give {_toy_list(toys)}, a local folder, or a hub id 'owner/name' or 'owner/name@revision'."
    )


def folder(ref: str | Path, layout: Layout, *, without: Sequence[str] = ()) -> Path:
    """The complete local folder of a reference, downloaded where it is a hub id and not yet in the cache.

    `without`: components of a pipeline that are not downloaded.
    """
    found = resolve(ref, layout)
    if isinstance(found, Path):
        path = found
    elif layout is Layout.PIPELINE:
        path = fetch_pipeline(found, without)
    elif layout is Layout.REWARD:
        path = fetch_model(found, _BESIDE_WEIGHTS)
    else:
        path = fetch_files(found, (*_BESIDE_WEIGHTS, *SAFETENSORS))
    check_folder(path, layout)
    return path


def locate(ref: str | Path, *, t5: bool = True) -> Checkpoint:
    """The pipeline of any reference, complete on the disk. `t5` False: SD3's third text encoder is not downloaded.

    Raises:
        CheckpointError: it is missing, half written, or cannot be fetched.
        InputError: the reference is none of the kinds.
    """
    adapter, place = split_adapter(ref)
    split = split_single_file(place)
    if split is None:
        whole = folder(place, Layout.PIPELINE, without=() if t5 else T5_COMPONENTS)
        return Checkpoint(whole, adapter=adapter)
    file, config = split
    if not file.is_file():
        raise CheckpointError(f"The checkpoint file {str(file)!r} does not exist (looked in {Path.cwd()}).")
    read_header(file)
    found = resolve(_config_of(file) if config is None else config, Layout.PIPELINE)
    path = fetch_files(found, CONFIG_FILES) if isinstance(found, str) else found
    read_json(path / hub_check.INDEX)
    return Checkpoint(path, file, adapter)


def split_adapter(ref: str | Path) -> tuple[str | None, str]:
    """The adapter, where one is named, and the checkpoint of `path/to/file.py:Name@REFERENCE`.

    Raises:
        InputError: a file of Python is named, and no checkpoint.
    """
    text = str(ref)
    if found := _ADAPTER.fullmatch(text):
        return found[1], found[2]
    if ".py:" in text and not Path(text).exists():
        raise InputError(
            f"{text!r} names an adapter, and no checkpoint that it loads. Give path/to/file.py:Name@FOLDER."
        )
    return None, text


def split_single_file(ref: str | Path) -> tuple[Path, str | None] | None:
    """The file and the CONFIG of `FILE.safetensors@CONFIG`; None for every other kind of reference."""
    text = split_adapter(ref)[1]
    name, at, config = text.partition(f"{SINGLE_FILE}@")
    if at:
        return Path(f"{name}{SINGLE_FILE}").expanduser(), config
    return (Path(text).expanduser(), None) if text.endswith(SINGLE_FILE) else None


def full_path(ref: str) -> str:
    """A reference to a checkpoint or to data, what it names on this disk by its whole path; all else as it is.

    A run records such references, so that it means the same files from whichever folder it is resumed.
    """
    if not ref or ref.startswith(TOY_PREFIX):
        return ref
    if found := _ADAPTER.fullmatch(ref):
        file, _, name = found[1].rpartition(":")
        return f"{full_path(file) if file.endswith('.py') else file}:{name}@{full_path(found[2])}"
    name, at, config = ref.partition(f"{SINGLE_FILE}@")
    if at:
        return f"{full_path(name + SINGLE_FILE)}@{full_path(config)}"
    try:
        path = Path(ref).expanduser()
        return str(path.absolute()) if path.exists() else ref
    except (OSError, RuntimeError):  # a name that is too long, nobody's home: whoever reads it says so
        return ref


def _config_of(file: Path) -> Path:
    """The folder that describes a single file where none is named."""
    beside = file.with_suffix("")
    if not beside.is_dir():
        raise CheckpointError(
            f"{file} holds weights, but what pipeline it is must be told by configs, and there is no folder {beside}. "
            f"Name a folder or a hub id that has them: {file}@FOLDER, or {file}@stabilityai/stable-diffusion-3.5-medium"
        )
    return beside


def read_card(ref: str | Path, layout: Layout | None = None) -> Card:
    """The card of a toy or local checkpoint; an empty one where there is none or the reference is a hub id.

    Raises:
        CheckpointError, InputError: as `resolve`; CheckpointError, too, where the card is wrong.
    """
    split = split_single_file(ref)
    found = resolve(ref if split is None else split[1] or _config_of(split[0]), layout)
    path = Path(found) / CARD_FILE
    if isinstance(found, str) or not path.is_file():
        return Card()
    try:
        return Card.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: the entry {where!r} is wrong: {first['msg']}.") from error


def weight_files(path: Path) -> list[Path]:
    """Every safetensors file under a checkpoint's folder, sorted."""
    return sorted(path.rglob("*.safetensors"))


def fingerprint(path: Path, files: Iterable[Path] | None = None) -> str:
    """16 hex digits from the contents of a checkpoint's safetensors files, or of the given ones in its folder.

    Files in the hub's cache are links to blobs named by their sha256, which is then taken instead of reading them.
    """
    total = hashlib.sha256()
    for file in weight_files(path) if files is None else sorted(files):
        total.update(f"{file.relative_to(path).as_posix()}={_content_hash(file)}\n".encode())
    return total.hexdigest()[:16]


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits from all weights of a pipeline, its single file and an adapter's file of Python among them."""
    own = fingerprint(checkpoint.folder)
    code = Path((checkpoint.adapter or "").rpartition(":")[0])
    files = [checkpoint.file, code if code.suffix == ".py" else None]
    others = [_content_hash(file) for file in files if file is not None]
    if not others:
        return own
    return hashlib.sha256(" ".join((own, *others)).encode()).hexdigest()[:16]


def _content_hash(file: Path) -> str:
    blob = file.resolve().name
    if file.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _toy_refs(toys: Sequence[str]) -> list[str]:
    return [f"{TOY_PREFIX}{name}" for name in toys]


def _toy_list(toys: Sequence[str]) -> str:
    return ", ".join(_toy_refs(toys))


def _toy_folder(name: str, toys: Sequence[str]) -> Path:
    """`toys`: what is offered where there is none of that name."""
    path = hub_check.TOY_ROOT / name
    if name not in TOY_NAMES:
        near = did_you_mean(f"{TOY_PREFIX}{name}", _toy_refs(toys))
        raise InputError(f"There is no toy checkpoint {name!r}.{near} There are {_toy_list(toys)}.")
    if not path.is_dir():
        raise CheckpointError(f"The toy checkpoint {name!r} is not in {hub_check.TOY_ROOT}. {remedy(path)}")
    return path
