"""Where checkpoints come from, and what their folders say about themselves.

A checkpoint reference is `toy:NAME` (shipped with the package), a local folder, or a hub id `owner/name`. All three
end as a local folder in the published diffusers / transformers layout; `check_folder` refuses a half-written one
before anything heavy is imported. This module imports neither torch nor the model libraries.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pixrl.errors import CheckpointError, InputError, did_you_mean

TOY_PREFIX = "toy:"
TOY_ROOT = Path(__file__).parent / "toy" / "checkpoints"
TOY_NAMES = ("clip", "vae", "segmenter", "identity", "preference", "sd3", "flux")
CARD_FILE = "pixrl.json"
_TRANSFORMERS_FILES = (
    "*config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", CARD_FILE,
)  # fmt: skip
_T5_COMPONENTS = ("text_encoder_3", "tokenizer_3")


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


class Layout(StrEnum):
    """The two published folder layouts."""

    PIPELINE = "pipeline"
    TRANSFORMERS = "transformers"


def resolve(ref: str | Path) -> Path | str:
    """The folder of `toy:NAME` or of a local path; a hub id is given back as it is. Nothing is downloaded.

    Raises:
        CheckpointError: the toy checkpoint or the folder does not exist.
        InputError: the reference is none of the three kinds.
    """
    text = str(ref)
    if text.startswith(TOY_PREFIX):
        return _toy_folder(text.removeprefix(TOY_PREFIX))
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if isinstance(ref, Path) or text.startswith((".", "/", "~")) or "\\" in text or path.exists():
        raise CheckpointError(
            f"The checkpoint folder {text!r} does not exist. Give a folder with a model_index.json or config.json, "
            f"a hub id such as 'stabilityai/sdxl-turbo', or one of {_toy_list()}."
        )
    owner, slash, name = text.partition("/")
    if slash and owner and name and "/" not in name and not any(c.isspace() for c in text):
        return text
    raise InputError(
        f"{text!r} is not a checkpoint reference.{did_you_mean(f'{TOY_PREFIX}{text}', _toy_refs())} "
        f"Give {_toy_list()}, a local folder, or a hub id 'owner/name'."
    )


def folder(ref: str | Path, layout: Layout) -> Path:
    """The complete local folder of a reference, downloaded where it is a hub id and not yet in the cache."""
    found = resolve(ref)
    path = found if isinstance(found, Path) else _download(found, layout)
    check_folder(path, layout)
    return path


def read_card(ref: str | Path) -> Card:
    """The card of a toy or local checkpoint; an empty one where there is none or the reference is a hub id."""
    found = resolve(ref)
    path = Path(found) / CARD_FILE
    if isinstance(found, str) or not path.is_file():
        return Card()
    try:
        return Card.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: the entry {where!r} is wrong: {first['msg']}.") from error


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a checkpoint's file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete. {_remedy(path)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}): half written? {_remedy(path)}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object. {_remedy(path)}")
    return content


def check_folder(path: Path, layout: Layout) -> None:
    """Refuses a folder in which a listed component, its config or its weights are missing or cut short."""
    if layout is Layout.TRANSFORMERS:
        _check_model(path)
        return
    for name, kind in components(path).items():
        part = path / name
        if not part.is_dir():
            raise CheckpointError(
                f"{path}/model_index.json lists the component {name!r} ({kind}), but the folder {part} is missing. "
                f"{_remedy(path)}"
            )
        _check_component(part, kind)


def components(path: Path) -> dict[str, str]:
    """Component name -> class name, as `model_index.json` lists them; T5 is left out where its folders are absent."""
    index = read_json(path / "model_index.json")
    listed = {
        name: str(entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    if not any((path / name).is_dir() for name in _T5_COMPONENTS):
        listed = {name: kind for name, kind in listed.items() if name not in _T5_COMPONENTS}
    return listed


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


def _content_hash(file: Path) -> str:
    blob = file.resolve().name
    if file.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _toy_refs() -> list[str]:
    return [f"{TOY_PREFIX}{name}" for name in TOY_NAMES]


def _toy_list() -> str:
    return ", ".join(_toy_refs())


def _toy_folder(name: str) -> Path:
    path = TOY_ROOT / name
    if name not in TOY_NAMES:
        raise InputError(
            f"There is no toy checkpoint {name!r}.{did_you_mean(name, TOY_NAMES)} There are {_toy_list()}."
        )
    if not path.is_dir():
        raise CheckpointError(f"The toy checkpoint {name!r} is not in {TOY_ROOT}. {_remedy(path)}")
    return path


def _remedy(path: Path) -> str:
    """What to type to get a complete checkpoint."""
    if path.is_relative_to(TOY_ROOT):
        return f"Type: pixrl toy build --stage {path.relative_to(TOY_ROOT).parts[0]}"
    return "Save or download it again, for example: hf download OWNER/NAME --local-dir FOLDER"


def _download(repo: str, layout: Layout) -> Path:
    try:
        if layout is Layout.PIPELINE:
            from diffusers import DiffusionPipeline

            return Path(DiffusionPipeline.download(repo, use_safetensors=True))
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, allow_patterns=list(_TRANSFORMERS_FILES)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {repo!r} could not be fetched from the hub: {error}. Check the name and the connection, "
            f"download it once with: hf download {repo}, or give a local folder or one of {_toy_list()}."
        ) from error


def _check_component(part: Path, kind: str) -> None:
    if "Tokenizer" in kind:
        if not any((part / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise CheckpointError(
                f"{part} holds no tokenizer.json, vocab.json or spiece.model. {_remedy(part)}"
            )
    elif "Scheduler" in kind:
        read_json(part / "scheduler_config.json")
    elif kind.endswith(("Processor", "Extractor", "ProcessorFast", "ProcessorPil")):
        read_json(part / "preprocessor_config.json")
    else:
        _check_model(part)


def _check_model(part: Path) -> None:
    read_json(part / "config.json")
    files = list(_listed_shards(part)) or sorted(part.glob("*.safetensors"))
    if not files:
        pickled = sorted([*part.glob("*.bin"), *part.glob("*.ckpt")])
        found = f" It has {pickled[0].name}, but pickled weights are never loaded." if pickled else ""
        raise CheckpointError(f"{part} holds no .safetensors weights.{found} {_remedy(part)}")
    for file in files:
        _check_safetensors(file)


def _listed_shards(part: Path) -> Iterator[Path]:
    for index in sorted(part.glob("*.safetensors.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, Mapping):
            raise CheckpointError(f"{index} has no weight_map. {_remedy(part)}")
        yield from (part / name for name in sorted(set(shards.values())))


def _check_safetensors(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: its index lists it. {_remedy(file)}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file} is cut short: {size} bytes, its header alone needs more. {_remedy(file)}"
            )
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} is damaged: its header is not JSON. {_remedy(file)}") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{file} is cut short: {size} bytes of {expected}. {_remedy(file)}")
