"""Where checkpoints come from, and what their folders say about themselves.

A checkpoint reference is one of

    toy:NAME                          shipped with the package
    FOLDER                            in the published diffusers / transformers layout
    owner/name, owner/name@revision   a hub id; a branch, tag or commit pins it
    FILE.safetensors                  a whole pipeline in one file, described by the folder of the same name beside it,
    FILE.safetensors@CONFIG           or by CONFIG: a folder or a hub id, which also holds what the file lacks
    path/to/file.py:Name@REFERENCE    any of these, loaded by an adapter of yours; or module:Name@REFERENCE

All end as a local folder, which `check_folder` (hub_check.py) refuses when it is half written, before anything heavy
is imported. With HF_HUB_OFFLINE=1, or without a connection, what lies in the hub's cache is taken. This module imports
neither torch nor the model libraries, and the hub's library only where something is fetched.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pixrl import hub_check
from pixrl.errors import CheckpointError, InputError, did_you_mean
from pixrl.hub_check import (
    T5_COMPONENTS,
    Layout,
    check_folder,
    read_header,
    read_json,
    remedy,
)
from pixrl.libraries import check_torchvision
from pixrl.text import require_path

TOY_PREFIX = "toy:"
TOY_NAMES = ("clip", "vae", "segmenter", "parts", "identity", "preference", "sd3", "turbo", "flux")
TOY_GENERATORS = ("sd3", "turbo", "flux")
CARD_FILE = "pixrl.json"
SINGLE_FILE = ".safetensors"
_ADAPTER = re.compile(r"((?:[^@]+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*)@(.+)")
_BESIDE_WEIGHTS = (
    "*config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", CARD_FILE,
    "README.md",
)  # fmt: skip
"""What a transformers folder holds beside its weights."""
CONFIG_FILES = ("*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model")
"""What describes a pipeline and its tokenizers, without weights."""
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
BINS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
"""The weights of a transformers model, whole or in shards."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
    parts: str | None = None
    mixing: str | None = None
    synonyms: dict[str, str] = Field(default_factory=dict)
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
    """The one file that holds the weights, in the layout of the model's authors, where there is such a file."""
    adapter: str | None = None
    """The class that the reference names to load it; None: the one that loads pipelines of its class."""


def resolve(ref: str | Path, layout: Layout | None = None) -> Path | str:
    """Return the folder of `toy:NAME` or of a local path, and a hub id as it is. Nothing is downloaded.

    `layout`: PIPELINE where a generator is wanted; then messages offer toy generators alone.

    Raises:
        CheckpointError: the toy checkpoint or the folder does not exist.
        InputError: the reference is none of the kinds.
    """
    text = split_adapter(ref)[1]
    toys = [f"{TOY_PREFIX}{name}" for name in (TOY_GENERATORS if layout is Layout.PIPELINE else TOY_NAMES)]
    if text.startswith(TOY_PREFIX):
        name = text.removeprefix(TOY_PREFIX)
        place = hub_check.TOY_ROOT / name
        if name not in TOY_NAMES:
            near = did_you_mean(text, toys)
            raise InputError(f"There is no toy checkpoint {name!r}.{near} There are {', '.join(toys)}.")
        if not place.is_dir():
            raise CheckpointError(
                f"The toy checkpoint {name!r} is not in {hub_check.TOY_ROOT}. {remedy(place)}"
            )
        return place
    path = Path(require_path(text, "the name of a checkpoint")).expanduser()
    if text and path.is_dir():
        return path
    if isinstance(ref, Path) or text.startswith((".", "/", "~")) or "\\" in text or path.exists():
        raise CheckpointError(
            f"The checkpoint folder {text!r} does not exist. Give a folder with a model_index.json or config.json, "
            f"a hub id such as 'stabilityai/sdxl-turbo', or one of {', '.join(toys)}."
        )
    if is_hub_id(text):
        return text
    near = did_you_mean(text, toys) or did_you_mean(f"{TOY_PREFIX}{text}", toys)
    raise InputError(
        f"{text!r} is not a checkpoint reference.{near} "
        f"Give {', '.join(toys)}, a local folder, or a hub id 'owner/name' or 'owner/name@revision'."
    )


def folder(ref: str | Path, layout: Layout, *, without: Sequence[str] = ()) -> Path:
    """Return the complete folder of a reference, downloaded where it is a hub id and not yet in the cache.

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
    """Return the pipeline of any reference, complete on the disk; SD3's third text encoder only where `t5` is true.

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


def locate_configs(ref: str | Path) -> Checkpoint:
    """Return the configs of a pipeline; of a hub id they are downloaded, without weights.

    Raises:
        CheckpointError: they are missing, or cannot be fetched.
        InputError: the reference is none of the kinds.
    """
    adapter, place = split_adapter(ref)
    split = split_single_file(place)
    config = place if split is None else split[1] or _config_of(split[0])
    found = resolve(config, Layout.PIPELINE)
    path = fetch_files(found, CONFIG_FILES) if isinstance(found, str) else found
    read_json(path / hub_check.INDEX)
    return Checkpoint(path, adapter=adapter)


def split_adapter(ref: str | Path) -> tuple[str | None, str]:
    """Return the adapter, where one is named, and the checkpoint of `path/to/file.py:Name@REFERENCE`.

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
    """Return the file and the CONFIG of `FILE.safetensors@CONFIG`; None for every other kind of reference."""
    text = split_adapter(ref)[1]
    name, at, config = text.partition(f"{SINGLE_FILE}@")
    if at:
        return Path(f"{name}{SINGLE_FILE}").expanduser(), config
    return (Path(text).expanduser(), None) if text.endswith(SINGLE_FILE) else None


def full_path(ref: str) -> str:
    """Return a reference to a checkpoint or to data with the whole path of what it names on this disk.

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
    """Return the folder that describes a single file where none is named."""
    beside = file.with_suffix("")
    if not beside.is_dir():
        raise CheckpointError(
            f"{file} holds weights, but what pipeline it is must be told by configs, and there is no folder {beside}. "
            f"Name a folder or a hub id that has them: {file}@FOLDER, or {file}@stabilityai/stable-diffusion-3.5-medium"
        )
    return beside


def read_card(ref: str | Path, layout: Layout | None = None) -> Card:
    """Return the card of a toy or local checkpoint; an empty one where there is none, and for a hub id.

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
    """Return every safetensors file under a checkpoint's folder, sorted."""
    return sorted(path.rglob("*.safetensors"))


def fingerprint(path: Path, files: Iterable[Path] | None = None) -> str:
    """Return 16 hex digits from the contents of a checkpoint's safetensors files, or of the given ones in its folder.

    Files in the hub's cache are links to blobs named by their sha256, which is then taken instead of reading them.
    """
    total = hashlib.sha256()
    for file in weight_files(path) if files is None else sorted(files):
        total.update(f"{file.relative_to(path).as_posix()}={_content_hash(file)}\n".encode())
    return total.hexdigest()[:16]


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hex digits from a pipeline's weights, its single file and its adapter's file of Python among them."""
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


def is_hub_id(text: str) -> bool:
    """Return whether a text reads as `owner/name` or `owner/name@revision`."""
    repo, at, revision = text.partition("@")
    return _REPO.fullmatch(repo) is not None and (not at or bool(re.fullmatch(r"[\w./-]+", revision)))


def split_revision(ref: str) -> tuple[str, str | None]:
    """Return the repository and the revision of `owner/name@revision`; None where nothing is pinned."""
    repo, _, revision = ref.partition("@")
    return repo, revision or None


def download_command(ref: str) -> str:
    """Return the command that downloads a repository, at its pinned revision where it has one."""
    repo, revision = split_revision(ref)
    return f"hf download {repo}" + (f" --revision {revision}" if revision else "")


def fetch_pipeline(ref: str, without: Sequence[str] = ()) -> Path:
    """Return the folder of a pipeline, downloaded but for the components `without` where it is not yet in the cache.

    Raises:
        CheckpointError: it cannot be had; says why and what to do.
    """
    repo, revision = split_revision(ref)
    check_torchvision()
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                repo, revision=revision, use_safetensors=True, **dict.fromkeys(without)
            )
        )
    except _failures() as error:
        raise explained(ref, error) from error


def fetch_files(ref: str, patterns: Sequence[str]) -> Path:
    """Return the folder of a repository with the files that match, downloaded where the cache lacks them.

    Raises:
        CheckpointError: it cannot be had; says why and what to do.
    """
    repo, revision = split_revision(ref)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except _failures() as error:
        raise explained(ref, error) from error


def fetch_model(ref: str, beside: Sequence[str]) -> Path:
    """Return the folder of a model: the files that match, and its safetensors, or pytorch_model.bin where it has none.

    Which of them the repository has is told by what came, so it works with the cache alone, too. Never both are
    downloaded.

    Raises:
        CheckpointError: it cannot be had; says why and what to do.
    """
    folder = fetch_files(ref, (*beside, *SAFETENSORS))
    has_safetensors = any(file for pattern in SAFETENSORS for file in folder.glob(pattern))
    return folder if has_safetensors else fetch_files(ref, BINS)


def _failures() -> tuple[type[Exception], ...]:
    """Return what the hub's library raises; without a connection that may be its transport's own error."""
    from huggingface_hub.errors import HTTPError

    return (OSError, ValueError, HTTPError)


def cached_folder(ref: str) -> Path | None:
    """Return where the cache holds a repository, complete or not, or None; nothing is asked of the hub."""
    repo, revision = split_revision(ref)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise InputError(f"{ref!r} is no hub id: {error}") from None


def explained(ref: str, error: BaseException) -> CheckpointError:
    """Return an error of the hub's library as one that says what to do."""
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = split_revision(ref)
    page = f"https://huggingface.co/{repo}"
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None:
        causes.append(current)
        current = current.__cause__ or current.__context__

    def any_is(kind: type[BaseException]) -> bool:
        return any(isinstance(one, kind) for one in causes)

    if any_is(GatedRepoError) and get_token():
        said = (
            f"{repo} is gated, and your token has no access: accept its licence at {page} with the token's account "
            "(hf auth whoami), then run the same command again."
        )
    elif any_is(GatedRepoError):
        said = (
            f"{repo} is gated, and no token is set: accept its licence at {page}, make a read token at "
            "https://huggingface.co/settings/tokens, and type: hf auth login (or set HF_TOKEN)."
        )
    elif any_is(RevisionNotFoundError):
        said = f"{repo} has no revision {revision!r}. Give a branch, a tag or a commit that {page}/commits/main lists."
    elif any_is(RepositoryNotFoundError):
        hint = "" if get_token() else " If it is private, give a token: hf auth login"
        said = f"The hub has no repository {repo!r}, or none that you may see.{hint}"
    elif is_offline_mode() or not any_is(HfHubHTTPError):
        why = str(error).strip()
        if is_offline_mode():
            why = "HF_HUB_OFFLINE is set, and the cache does not hold all of it"
        said = (
            f"The checkpoint {ref!r} could not be fetched from the hub: {why}. Check the name and the connection, "
            f"download it once where there is one: {download_command(ref)}, or give a local folder."
        )
    else:
        said = f"The hub did not give {ref!r}: {error}. Try again, or download it: {download_command(ref)}"
    return CheckpointError(said)


@dataclass(frozen=True)
class Remote:
    """What the hub says of a repository that is not in the cache."""

    weights: int
    """Bytes of those of its weights that would be downloaded."""


def ask(ref: str) -> Remote:
    """Ask the hub whether a repository can be downloaded, and how large it is; nothing is downloaded.

    Raises:
        CheckpointError: it cannot be; says why and what to do.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        raise CheckpointError(
            f"{ref!r} is not in the cache, and HF_HUB_OFFLINE is set. Where there is a connection, type: "
            f"{download_command(ref)}"
        )
    repo, revision = split_revision(ref)
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        if info.gated:
            HfApi().auth_check(repo)
    except _failures() as error:
        raise explained(ref, error) from error
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    # a pipeline's weights lie in its parts' folders, and of several variants (fp16) the plain one is fetched
    names, weights = list(sizes), list[str]()
    if "model_index.json" in names:
        for folder in (name.removesuffix("config.json") for name in names if name.count("/") == 1):
            inside = _matching(names, (f"{folder}*.safetensors",)) if folder.endswith("/") else []
            plain = [name for name in inside if name.removeprefix(folder).count(".") == 1]
            weights += plain or inside
    else:
        patterns = next((some for some in (SAFETENSORS, BINS) if _matching(names, some)), ("*.safetensors",))
        weights = _matching(names, patterns)
    return Remote(sum(sizes[name] for name in weights))


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the weights among the names that one of the patterns fits."""
    fitting = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    return [name for name in fitting if name.endswith((".safetensors", ".bin"))]
