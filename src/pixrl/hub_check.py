"""Whether a checkpoint's folder is whole: every listed part is there, of the listed class, and not cut short.

Only configs and the headers of safetensors files are read. This module imports neither torch nor the model libraries.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pixrl.errors import CheckpointError

TOY_ROOT = Path(__file__).parent / "toy" / "checkpoints"
INDEX = "model_index.json"
T5_COMPONENTS = ("text_encoder_3", "tokenizer_3")
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How what torch.save and pickle write begins."""
NAMED = 3
"""How many keys an error names."""


class Layout(StrEnum):
    """The two published folder layouts."""

    PIPELINE = "pipeline"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    dtype: str
    """As safetensors writes it: F32, BF16, I64 ..."""
    shape: tuple[int, ...]


def remedy(path: Path) -> str:
    """What to type to get a complete checkpoint."""
    if path.is_relative_to(TOY_ROOT):
        return f"Type: pixrl toy build --stage {path.relative_to(TOY_ROOT).parts[0]}"
    return "Save or download it again, for example: hf download OWNER/NAME --local-dir FOLDER"


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a checkpoint's file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete. {remedy(path)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}): half written? {remedy(path)}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object. {remedy(path)}")
    return content


def check_folder(path: Path, layout: Layout) -> None:
    """Refuses a folder in which a listed part, its config or its weights are missing, of another class or cut short."""
    if layout is Layout.TRANSFORMERS:
        _check_model(path)
        return
    for name, kind in components(path).items():
        part = path / name
        if not part.is_dir():
            raise CheckpointError(
                f"{path}/{INDEX} lists the component {name!r} ({kind}), but the folder {part} is missing. "
                f"{remedy(path)}"
            )
        _check_component(part, kind)


def components(path: Path) -> dict[str, str]:
    """Component name -> class name, as `model_index.json` lists them; T5 is left out where its folders are absent."""
    if not (path / INDEX).is_file() and (path / "config.json").is_file():
        found = class_of(path) or "single model"
        raise CheckpointError(
            f"{path} is a {found}, no image generator: it has no {INDEX}. Give the folder above it, "
            "or the hub id of a whole pipeline such as 'stabilityai/stable-diffusion-3.5-medium'."
        )
    index = read_json(path / INDEX)
    listed = {
        name: str(entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    if not any((path / name).is_dir() for name in T5_COMPONENTS):
        listed = {name: kind for name, kind in listed.items() if name not in T5_COMPONENTS}
    return listed


def class_of(part: Path) -> str | None:
    """The class that a model's config.json names, in diffusers' or in transformers' way; None where it names none."""
    config = read_json(part / "config.json")
    named = config.get("_class_name")
    architectures = config.get("architectures")
    if named is None and isinstance(architectures, list) and architectures:
        named = architectures[0]
    return None if named is None else str(named)


def is_model(kind: str) -> bool:
    """Whether a component of that class has weights."""
    others = ("Tokenizer", "Scheduler", "Processor", "Extractor")
    return not any(word in kind for word in others)


def model_files(part: Path) -> list[Path]:
    """The safetensors files of one model: those that an index lists, or all."""
    return list(_listed_shards(part)) or sorted(part.glob("*.safetensors"))


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Tensor name -> dtype and shape, from a safetensors file that is complete.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or a pickle with a safetensors file's name.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: its index lists it. {remedy(file)}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        _refuse_pickle(file, start)
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file} is cut short: {size} bytes, its header alone needs more. {remedy(file)}"
            )
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            found = {name: TensorHeader(str(e["dtype"]), tuple(e["shape"])) for name, e in tensors.items()}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{file} is damaged: its header is no safetensors header. {remedy(file)}"
            ) from error
    if size != 8 + length + end:
        raise CheckpointError(f"{file} is cut short: {size} bytes of {8 + length + end}. {remedy(file)}")
    return found


def _refuse_pickle(file: Path, start: bytes) -> None:
    """`start`: the first 8 bytes."""
    if start.startswith(_PICKLES) and int.from_bytes(start, "little") > file.stat().st_size:
        raise CheckpointError(
            f"{file} is a pickle (torch.save) under the name of a safetensors file. A pickle can run code when it is "
            f"read, so it is never loaded: ask who made it for safetensors. {remedy(file)}"
        )


def refuse_misfits(missing: Sequence[str], unexpected: Sequence[str], source: Path, kind: str) -> None:
    """Nothing where both are empty.

    Args:
        missing: weights that the model expects and the source lacks.
        unexpected: weights that the source has and the model does not know.
        source: a file or folder.
        kind: the model's class.

    Raises:
        CheckpointError: names the first few, each unexpected one with the nearest of the missing ones.
    """
    if missing or unexpected:
        raise CheckpointError(
            f"The weights of {source} do not fit a {kind} of its config.json: {misfits(missing, unexpected)}. "
            f"Config and weights belong to different models. {remedy(source)}"
        )


def misfits(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Which keys do not fit, in words: the first few, each unexpected one with the nearest of the missing ones."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights are missing ({some(missing)})")
    if unexpected:
        near = [(key, difflib.get_close_matches(key, missing, n=1, cutoff=0.4)) for key in unexpected[:NAMED]]
        named = [f"{key} (expected {close[0]}?)" if close else key for key, close in near]
        parts.append(f"{len(unexpected)} are not known ({', '.join(named)}{_more(unexpected)})")
    return " and ".join(parts)


def some(keys: Sequence[str]) -> str:
    """The first few, and whether there are more."""
    return f"{', '.join(keys[:NAMED])}{_more(keys)}"


def _more(keys: Sequence[str]) -> str:
    return ", ..." if len(keys) > NAMED else ""


def _check_component(part: Path, kind: str) -> None:
    if "Tokenizer" in kind:
        if not any((part / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise CheckpointError(
                f"{part} holds no tokenizer.json, vocab.json or spiece.model. {remedy(part)}"
            )
    elif "Scheduler" in kind:
        read_json(part / "scheduler_config.json")
    elif not is_model(kind):
        read_json(part / "preprocessor_config.json")
    else:
        _check_model(part)
        found = class_of(part)
        if found not in (None, kind):
            raise CheckpointError(
                f"{part}/config.json is that of a {found}, but {INDEX} says that {part.name!r} is a {kind}: "
                f"another model's files lie in this folder. {remedy(part)}"
            )


def _check_model(part: Path) -> None:
    read_json(part / "config.json")
    files = model_files(part)
    if not files:
        pickled = sorted([*part.glob("*.bin"), *part.glob("*.ckpt")])
        found = f" It has {pickled[0].name}, but pickled weights are never loaded." if pickled else ""
        raise CheckpointError(f"{part} holds no .safetensors weights.{found} {remedy(part)}")
    for file in files:
        read_header(file)


def _listed_shards(part: Path) -> Iterator[Path]:
    for index in sorted(part.glob("*.safetensors.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, Mapping):
            raise CheckpointError(f"{index} has no weight_map. {remedy(part)}")
        yield from (part / name for name in sorted(set(shards.values())))
