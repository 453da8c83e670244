"""Lists of prompts, from the toy world or from a file.

| source | what |
|---|---|
| `toy:geneval`, `toy:geneval/counting,colors` | the toy world's GenEval prompts, all six tasks or some |
| `list.txt`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` | rows, as `pixrl.data.rows` reads them |
| a folder | the captions beside its pictures |

Published files call their prompts `prompt` (GenEval), `prompts` or `Prompts` (DrawBench), or `caption` (Pick-a-Pic);
any other column can be named. Rows are distinct by prompt and metadata.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pixrl.data.pictures import junk_note
from pixrl.data.rows import CAPTION_SUFFIXES, FORMATS, Row, read_captions, read_rows
from pixrl.data.toy import toy_prompts
from pixrl.errors import InputError, did_you_mean
from pixrl.hub import TOY_PREFIX
from pixrl.text import comparable, require_path

REPEATS_SHOWN = 3


class Split(StrEnum):
    """The two halves of the toy world's prompts. A file is one list: it is the same for both."""

    TRAIN = "train"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class Prompt:
    """A prompt with its metadata, such as its GenEval entry."""

    text: str
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """A list of prompts in the source's order, all different in their text or their metadata."""

    name: str
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()
    """The sentences about how the source was read: rows that repeat others, files that were passed over."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def load_prompts(source: str | Path, *, split: str = Split.TRAIN, column: str | None = None) -> PromptSet:
    """Load the prompts of a source (see the table above).

    Args:
        source: `toy:geneval`, with tasks or without, or the path of a file or of a folder of captions.
        split: of the toy world's prompts: `train`, or `evaluation` for those that no training has seen. A file is read
            as it is for either.
        column: the column or key of a file that holds the prompts; None: the first of `rows.COLUMNS` that is there.

    Raises:
        InputError: no such source, split, task or column; a file that is missing, empty, no text (with the place), cut
            short or without a column of prompts; an empty prompt (with its line).
    """
    if split not in list(Split):
        raise InputError(f"Unknown split {split!r}.{did_you_mean(str(split), Split)} Use {', '.join(Split)}.")
    name = require_path(str(source), "the source of prompts")
    path = Path(source)
    suffix = path.suffix.lower()
    if column is not None and (name.startswith(TOY_PREFIX) or suffix not in FORMATS):
        raise InputError(f"{name} has no columns, so {column!r} names none: leave prompts.column out.")
    if name.startswith(TOY_PREFIX):
        toy = toy_prompts(name.removeprefix(TOY_PREFIX), held_out=split == Split.EVALUATION)
        return PromptSet(name, tuple(Prompt(text, metadata) for text, metadata in toy))
    if suffix in FORMATS:
        return _distinct(name, read_rows(path, column), ())
    if path.is_dir():
        rows, without = read_captions(path)
        if not rows:
            raise InputError(
                f"{path} holds no captions: files beside its pictures, of the same names, that end in "
                f"{' or '.join(CAPTION_SUFFIXES)}. Write them, or give a file of prompts."
            )
        return _distinct(name, rows, (*junk_note([path]), *uncaptioned(path, without)))
    raise InputError(
        f"{name!r} is no list of prompts.{did_you_mean(name, [f'{TOY_PREFIX}geneval'])} "
        f"Give toy:geneval, a file that ends in {', '.join(FORMATS)}, or a folder of pictures with captions."
    )


def uncaptioned(folder: Path, pictures: Sequence[Path]) -> Iterator[str]:
    """Yield a note of the pictures without a caption, where there are any."""
    if pictures:
        more = f" and {len(pictures) - 1} more" if len(pictures) > 1 else ""
        yield f"{folder}: {pictures[0].name}{more} without a caption"


def _distinct(name: str, rows: Sequence[Row], notes: Sequence[str]) -> PromptSet:
    """Return the rows as prompts, each once, with a note of how many were left out."""
    if not rows:
        raise InputError(f"{name} holds no prompts. Write at least one into it, or give toy:geneval.")
    first: dict[str, Row] = {}
    repeats = []
    for row in rows:
        if not row.text:
            raise InputError(f"{name}, {row.place} holds no prompt. Write one or delete it.")
        known = first.setdefault(_key(row), row)
        if known is not row:
            repeats.append(f"{row.place} repeats {known.place}: {row.text!r}")
    prompts = tuple(Prompt(row.text, row.metadata) for row in first.values())
    return PromptSet(name, prompts, (*notes, *repeats_note(name, len(rows), repeats)))


def repeats_note(name: str, rows: int, repeats: Sequence[str]) -> Iterator[str]:
    """Yield a note of the rows that were left out, where there are any; `repeats` has a phrase for each of them."""
    if repeats:
        more = f"; and {len(repeats) - REPEATS_SHOWN} more" if len(repeats) > REPEATS_SHOWN else ""
        yield (
            f"{name}: {len(repeats)} of {rows} rows repeat others in all they say and are left out "
            f"({'; '.join(repeats[:REPEATS_SHOWN])}{more}). For several pictures of each prompt, set "
            "evaluation.per_prompt"
        )


def _key(row: Row) -> str:
    """Return what is the same for equal rows, however their letters are composed and their keys ordered."""
    rest = {name: value for name, value in row.metadata.items() if name != row.column}
    return comparable(json.dumps([row.text, rest], sort_keys=True, ensure_ascii=False))
