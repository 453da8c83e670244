"""Lists of prompts, from the toy world or from a file.

| source | what |
|---|---|
| `toy:geneval`, `toy:geneval/counting,colors` | the toy world's GenEval prompts, all six tasks or some |
| `list.txt` | one prompt a line |
| `list.jsonl` | one object a line with a `prompt`, all of which becomes metadata; GenEval's files are such |
| `list.csv` | a column of prompts; the other columns become metadata |
| `list.parquet` | a column of prompts; other columns of text and numbers become metadata; needs pyarrow |

Published files call their prompts `prompt` (GenEval), `prompts` or `Prompts` (DrawBench), or `caption` (Pick-a-Pic,
PartiPrompts).
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

from pixrl.data.toy import toy_prompts
from pixrl.errors import InputError, did_you_mean
from pixrl.hub import TOY_PREFIX

COLUMNS = ("prompt", "prompts", "caption")
"""What a column of prompts may be called, in any case; the first one that is there."""
PARQUET_EXTRA = "pip install 'pixrl[parquet]'"
DUPLICATES_SHOWN = 5


class Split(StrEnum):
    """The two halves of the toy world's prompts. A file is one list: it is the same for both."""

    TRAIN = "train"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class Prompt:
    """What a picture is asked for, and what else is known of it: one GenEval entry where there is one."""

    text: str
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the source's order, all different."""

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


@dataclass(frozen=True)
class _Row:
    """A prompt and where it stands, for messages."""

    place: str
    text: str
    metadata: Mapping[str, object]


def load_prompts(source: str | Path, *, split: str = Split.TRAIN) -> PromptSet:
    """The prompts of a source (see the table above).

    Args:
        source: `toy:geneval`, with tasks or without, or the path of a .txt, .jsonl, .csv or .parquet file.
        split: of the toy world's prompts: `train`, or `evaluation` for those that no training has seen. A file is read
            as it is for either.

    Raises:
        InputError: no such source, split or task; a file that is missing, empty, not UTF-8 (with byte and line), cut
            short or without a column of prompts; an empty or repeated prompt (with the line numbers).
    """
    if split not in list(Split):
        raise InputError(f"Unknown split {split!r}.{did_you_mean(str(split), Split)} Use {', '.join(Split)}.")
    name = str(source)
    if name.startswith(TOY_PREFIX):
        toy = toy_prompts(name.removeprefix(TOY_PREFIX), held_out=split == Split.EVALUATION)
        return PromptSet(name, tuple(Prompt(text, metadata) for text, metadata in toy))
    path = Path(source)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(
            f"{name!r} is no list of prompts.{did_you_mean(name, [f'{TOY_PREFIX}geneval'])} "
            f"Give toy:geneval or a file that ends in {', '.join(_READERS)}."
        )
    rows = read(path)
    if not rows:
        raise InputError(f"{path} holds no prompts. Write at least one into it, or give toy:geneval.")
    _refuse_empty(path, rows)
    _refuse_duplicates(path, rows)
    return PromptSet(name, tuple(Prompt(row.text, row.metadata) for row in rows))


def _read_lines(path: Path) -> list[_Row]:
    lines = _lines(read_text(path))
    return [_Row(f"line {number}", line.strip(), {}) for number, line in enumerate(lines, 1)]


def _read_jsonl(path: Path) -> list[_Row]:
    rows = []
    for number, line in enumerate(_lines(read_text(path)), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number} is not JSON: {error.msg} at character {error.pos + 1}. "
                'Each line is one object, like {"prompt": "a photo of an owl"}.'
            ) from None
        column = _find_column(list(entry)) if isinstance(entry, dict) else None
        if column is None or not isinstance(entry[column], str):
            keys = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise InputError(
                f'{path}, line {number} has no text under "prompt" (found: {keys or "nothing"}). '
                'Each line is one object, like {"prompt": "a photo of an owl"}.'
            )
        rows.append(_Row(f"line {number}", entry[column].strip(), entry))
    return rows


def _read_csv(path: Path) -> list[_Row]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    try:
        names = list(reader.fieldnames or ())
        if not names:
            return []
        column = _prompt_column(path, names)
        for cells in reader:
            place = f"line {reader.line_num}"
            if None in cells or None in cells.values():
                raise InputError(
                    f"{path}, {place} has not {len(names)} cells as the first line has. "
                    'Put a prompt that holds a comma into quotes: "an owl, and a cat"'
                )
            rest = {name: value for name, value in cells.items() if name != column}
            rows.append(_Row(place, cells[column].strip(), rest))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}.") from None
    return rows


def _read_parquet(path: Path) -> list[_Row]:
    _require_file(path)
    try:
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"Reading {path} needs pyarrow, which is not installed. Type: {PARQUET_EXTRA}"
        ) from None
    try:
        schema = parquet.read_schema(path)
        column = _prompt_column(path, schema.names)
        plain = [field.name for field in schema if _is_plain(arrow, field.type)]
        entries = parquet.read_table(path, columns=list(dict.fromkeys([column, *plain]))).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from None
    rows = []
    for number, entry in enumerate(entries, 1):
        text = entry.pop(column)
        if not isinstance(text, str):
            raise InputError(f"{path}, row {number}: {column} is {text!r}, not text.")
        rows.append(_Row(f"row {number}", text.strip(), entry))
    return rows


def _is_plain(arrow: Any, kind: Any) -> bool:
    """Text, numbers and truth values; pictures and lists stay in the file."""
    types = arrow.types
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


_READERS: Mapping[str, Callable[[Path], list[_Row]]] = {
    ".txt": _read_lines,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _require_file(path: Path) -> None:
    if not path.exists():
        raise InputError(f"There is no file {str(path)!r} (looked in {Path.cwd()}).")
    if not path.is_file():
        raise InputError(f"{str(path)!r} is not a file. Give a list of prompts: {', '.join(_READERS)}.")


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark; an InputError names the byte and the line that is not UTF-8."""
    _require_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} (0x{content[error.start]:02x}), in line {line}. "
            f"Save it as UTF-8, for example: iconv -f latin1 -t utf-8 {path.name} > utf8{path.suffix}"
        ) from None


def _lines(text: str) -> list[str]:
    """The lines, numbered as an editor does; an end of line after the last one begins no other."""
    lines = re.split(r"\r\n|\n|\r", text)
    return lines[:-1] if not lines[-1] else lines


def _find_column(names: Sequence[str]) -> str | None:
    """The name that means prompts, as the file writes it."""
    by_meaning = {name.strip().lower(): name for name in reversed(names)}
    return next((by_meaning[column] for column in COLUMNS if column in by_meaning), None)


def _prompt_column(path: Path, names: Sequence[str]) -> str:
    column = _find_column(names)
    if column is None:
        guess = next((hint for name in names if (hint := did_you_mean(name.strip().lower(), COLUMNS))), "")
        raise InputError(
            f"{path} has no column {' or '.join(repr(column) for column in COLUMNS)}; it has {', '.join(names)}."
            f"{guess} Name the column of prompts 'prompt' in the first line."
        )
    return column


def _refuse_empty(path: Path, rows: Sequence[_Row]) -> None:
    for row in rows:
        if not row.text:
            raise InputError(f"{path}, {row.place} holds no prompt. Write one or delete it.")


def _refuse_duplicates(path: Path, rows: Sequence[_Row]) -> None:
    first: dict[str, _Row] = {}
    repeats = [
        f"{row.place} repeats {first[row.text].place}: {row.text!r}"
        for row in rows
        if first.setdefault(row.text, row) is not row
    ]
    if repeats:
        more = len(repeats) - DUPLICATES_SHOWN
        shown = [*repeats[:DUPLICATES_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise InputError(
            f"{path} holds {len(repeats)} repeated prompt{'s' if len(repeats) > 1 else ''}; delete them:\n  "
            + "\n  ".join(shown)
        )
