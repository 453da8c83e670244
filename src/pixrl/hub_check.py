"""What a checkpoint's folder holds, and whether it is whole: every listed part there, of its class, not cut short.

Only configs and the headers of safetensors files are read. This module imports neither torch nor the model libraries.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pixrl.errors import CheckpointError
from pixrl.libraries import in_checkout
from pixrl.untrusted import parse_json

TOY_ROOT = Path(__file__).parent / "toy" / "checkpoints"
INDEX = "model_index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""Weights as torch.save writes them, whole, and the list of their shards."""
T5_COMPONENTS = ("text_encoder_3", "tokenizer_3")
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How what torch.save and pickle write begins."""
_CACHED = re.compile(r"models--(?:(?!--).)+--.+")
"""A repository's folder in the hub's cache."""
_SHARD = re.compile(r"(.+?)(\.fp16)?-\d{5}-of-\d{5}\.safetensors")
NAMED = 3
"""How many keys an error names."""


class Layout(StrEnum):
    """The published folder layouts."""

    PIPELINE = "pipeline"
    TRANSFORMERS = "transformers"
    REWARD = "reward"
    """TRANSFORMERS, or with pytorch_model.bin where there are no safetensors: for `rewards.weights`, which reads
    tensors alone."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    dtype: str
    """As safetensors writes it: F32, BF16, I64 ..."""
    shape: tuple[int, ...]


def remedy(path: Path) -> str:
    """Return what to type to get a complete checkpoint, as a sentence."""
    if path.is_relative_to(TOY_ROOT):
        if in_checkout("toy_build"):
            return f"Type: pixrl toy build --stage {path.relative_to(TOY_ROOT).parts[0]}"
        return "It comes with pixrl: install that again, in a checkout: pip install --force-reinstall --no-deps ."
    parts = path.parts  # in the hub's cache: models--OWNER--NAME/snapshots/COMMIT/...
    at = next((n for n, part in enumerate(parts[:-2]) if _CACHED.fullmatch(part)), None)
    if at is None or parts[at + 1] != "snapshots":
        return "Save or download it again, for example: hf download OWNER/NAME --local-dir FOLDER"
    commit, inside = parts[at + 2], "/".join(parts[at + 3 :])
    main = Path(*parts[: at + 1], "refs", "main")
    words = ["hf download", parts[at].removeprefix("models--").replace("--", "/")]
    if inside:
        words.append(inside if path.suffix else f"--include '{inside}/*'")
    if not main.is_file() or main.read_text(encoding="utf-8").strip() != commit:
        words.append(f"--revision {commit}")
    return f"Download it again: {' '.join(words)} --force-download"


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in a checkpoint's file.

    Raises:
        CheckpointError: the file is missing or holds anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete. {remedy(path)}")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}): half written? {remedy(path)}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object. {remedy(path)}")
    return content


def check_folder(path: Path, layout: Layout) -> None:
    """Refuse a folder that is not whole.

    Raises:
        CheckpointError: a listed part, its config or its weights are missing, of another class or cut short.
    """
    if layout is not Layout.PIPELINE:
        _check_model(path, bin_too=layout is Layout.REWARD)
        return
    for name, kind in components(path).items():
        part = path / name
        if not part.is_dir():
            raise CheckpointError(
                f"{path}/{INDEX} lists the component {name!r} ({kind}), but the folder {part} is missing. "
                f"{remedy(part)}"
            )
        if "Tokenizer" in kind:
            if not any((part / one).is_file() for one in ("tokenizer.json", "vocab.json", "spiece.model")):
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


def components(path: Path) -> dict[str, str]:
    """Return the class name of each component that `model_index.json` lists, without T5 where its folders are absent.

    Raises:
        CheckpointError: the folder holds no pipeline.
    """
    if not (path / INDEX).is_file() and (path / "config.json").is_file():
        found = class_of(path) or "single model"
        whole = "Give a whole pipeline: its folder"
        if path.is_relative_to(TOY_ROOT):
            whole = "Give one that draws: toy:sd3, toy:turbo, toy:flux"
        elif (path.parent / INDEX).is_file():
            whole = f"Give the folder above it, {path.parent}"
        raise CheckpointError(
            f"{path} is a {found}, no image generator: it has no {INDEX}. {whole}, "
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
    """Return the class that a model's config.json names, in diffusers' or in transformers' way, or None."""
    config = read_json(part / "config.json")
    named = config.get("_class_name")
    architectures = config.get("architectures")
    if named is None and isinstance(architectures, list) and architectures:
        named = architectures[0]
    return None if named is None else str(named)


def is_model(kind: str) -> bool:
    """Return whether a component of that class has weights."""
    others = ("Tokenizer", "Scheduler", "Processor", "Extractor")
    return not any(word in kind for word in others)


def model_files(part: Path) -> list[Path]:
    """Return the safetensors files of one model: those that an index lists, or all.

    Raises:
        CheckpointError: they are shards, and the index that lists them is missing.
    """
    listed = list(_listed_shards(part))
    files = listed or sorted(part.glob("*.safetensors"))
    shards = [] if listed else [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if shards and len(shards) == len(files):
        index = part / f"{shards[0][1]}.safetensors.index{shards[0][2] or ''}.json"
        raise CheckpointError(
            f"{part} holds {len(files)} shards ({files[0].name}{_more(files, 1)}), but {index.name}, which says what "
            f"lies in which, is missing. {remedy(index)}"
        )
    return files


def bin_files(part: Path) -> list[Path]:
    """Return pytorch_model.bin, or the shards that its index lists; none where there is neither."""
    whole = part / BIN
    return [whole] if whole.is_file() else list(_listed_shards(part, BIN_INDEX))


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Return the dtype and shape of each tensor in a safetensors file that is complete.

    `huggingface_hub.parse_local_safetensors_file_metadata` reads the same header, but neither refuses a file whose
    tensors are cut short nor limits how deep an untrusted header nests.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or a pickle with a safetensors file's name.
    """
    _require_listed(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(_PICKLES) and length > size:
            raise CheckpointError(
                f"{file} is a pickle (torch.save) under the name of a safetensors file. A pickle can run code when it "
                f"is read, so it is never loaded: ask who made it for safetensors. {remedy(file)}"
            )
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file} is cut short: {size} bytes, its header alone needs more. {remedy(file)}"
            )
        try:
            header = parse_json(stream.read(length))
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


@dataclass(frozen=True)
class Reshaped:
    """A weight that has another shape than the config says."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} is {list(self.found)}, expected {list(self.expected)}"


def refuse_misfits(
    missing: Sequence[str],
    unexpected: Sequence[str],
    source: Path,
    kind: str,
    reshaped: Sequence[Reshaped] = (),
) -> None:
    """Refuse weights that do not fit a model; nothing happens where all lists are empty.

    Args:
        missing: weights that the model expects and the source lacks.
        unexpected: weights that the source has and the model does not know.
        source: a file or folder.
        kind: the model's class.
        reshaped: weights of another shape.

    Raises:
        CheckpointError: names the first few, each unexpected one with the nearest of the missing ones.
    """
    if missing or unexpected or reshaped:
        raise CheckpointError(
            f"The weights of {source} do not fit a {kind} of its config.json: "
            f"{misfits(missing, unexpected, reshaped)}. Config and weights belong to different models: take both from "
            f"the same one. {remedy(source)}"
        )


def misfits(missing: Sequence[str], unexpected: Sequence[str], reshaped: Sequence[Reshaped] = ()) -> str:
    """Return in words which keys do not fit: the first few, each unexpected one with the nearest missing one."""
    parts = []
    if reshaped:
        parts.append(f"{len(reshaped)} weights have another shape ({some([str(one) for one in reshaped])})")
    if missing:
        parts.append(f"{len(missing)} weights are missing ({some(missing)})")
    if unexpected:
        near = [(key, difflib.get_close_matches(key, missing, n=1, cutoff=0.4)) for key in unexpected[:NAMED]]
        named = [f"{key} (expected {close[0]}?)" if close else key for key, close in near]
        parts.append(f"{len(unexpected)} are not known ({', '.join(named)}{_more(unexpected)})")
    return " and ".join(parts)


def some(keys: Sequence[str]) -> str:
    """Return the first few names, and whether there are more, in words."""
    return f"{', '.join(keys[:NAMED])}{_more(keys)}"


def _more(keys: Sequence[object], named: int = NAMED) -> str:
    return ", ..." if len(keys) > named else ""


def _check_model(part: Path, *, bin_too: bool = False) -> None:
    """`bin_too`: pytorch_model.bin counts where there are no safetensors."""
    if (part / INDEX).is_file() and not (part / "config.json").is_file():
        raise CheckpointError(
            f"{part} is a whole pipeline ({read_json(part / INDEX).get('_class_name')}), and one model is needed: a "
            "folder with a config.json. Name one that is published for this (docs/rewards.md)"
            + (
                ", or toy:clip, toy:segmenter, toy:identity, toy:preference."
                if part.is_relative_to(TOY_ROOT)
                else "."
            )
        )
    read_json(part / "config.json")
    files = model_files(part)
    for file in files:
        read_header(file)
    bins = bin_files(part) if bin_too and not files else []
    for file in bins:
        _require_listed(file)
    if not files and not bins:
        or_bin = f" and neither {BIN} nor {BIN_INDEX}" if bin_too else ""
        pickled = sorted([*part.glob("*.bin"), *part.glob("*.ckpt")])
        why = "" if bin_too else ", but pickled weights are never loaded"
        found = f" It has {pickled[0].name}{why}." if pickled else ""
        raise CheckpointError(f"{part} holds no .safetensors weights{or_bin}.{found} {remedy(part)}")


def _require_listed(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: its index lists it. {remedy(file)}")


def _listed_shards(part: Path, indexes: str = "*.safetensors.index*.json") -> Iterator[Path]:
    for index in sorted(part.glob(indexes)):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, Mapping):
            raise CheckpointError(f"{index} has no weight_map. {remedy(part)}")
        yield from (part / name for name in sorted(set(shards.values())))
