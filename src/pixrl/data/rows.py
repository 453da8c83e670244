"""Files of prompts as rows: a text, what else the row says, and where it stands.

| file | a row |
|---|---|
| .txt | a line |
| .jsonl | a line: an object with a prompt, all of which becomes metadata; or a text |
| .json | an entry of a list, alone or under the key of the prompts, or of an object of objects: as above |
| .csv, .tsv | a line below the first one, which names the columns; the others become metadata |
| .parquet | a row; other columns of text, numbers and truth values become metadata; needs pyarrow |
| a folder | the caption beside a picture, as trainers keep them: owl.caption or owl.txt beside owl.png |
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pixrl.data.pictures import list_pictures
from pixrl.errors import InputError, did_you_mean
from pixrl.text import lines, parse_json, read_text, require_file, require_text

COLUMNS = ("prompt", "prompts", "caption")
"""The names, in any case, of a column of prompts; the first one that is there is taken."""
CAPTION_SUFFIXES = (".caption", ".txt")
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
PARQUET_EXTRA = "pip install 'pixrl[parquet]'"
_QUOTED = re.compile(r'\A"((?:[^"]*"")+[^"]*)"\Z')
"""A cell of a .tsv as most programs mean it: quotes are letters, save where doubled ones say that they are not."""
_LINE = 'Each line is one object, like {"prompt": "a photo of an owl"}.'
_ENTRY = 'Write a list like ["a photo of an owl"] or [{"prompt": "a photo of an owl"}].'


@dataclass(frozen=True)
class Row:
    """A prompt with its metadata, and its place in the file for messages."""

    place: str
    text: str
    metadata: Mapping[str, object]
    column: str | None = None
    """The key under which the metadata hold the prompt too; None where they do not."""


def read_rows(path: Path, column: str | None = None) -> list[Row]:
    """Read the rows of a file, in its order; prompts lose the white space around them.

    Args:
        path: ends in one of `FORMATS`.
        column: which column or key holds the prompts; None: the first of `COLUMNS` that is there.

    Raises:
        InputError: the file is missing or not what its ending says; no such column; a column of a file without any.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(path, column)
    if kind == ".txt" and column is not None:
        raise InputError(
            f"{path} has no columns, so {column!r} names none: leave prompts.column out, or give a list with columns."
        )
    text = read_text(path)
    if kind == ".txt":
        return [Row(f"line {number}", line.strip(), {}) for number, line in enumerate(lines(text), 1)]
    if kind == ".jsonl":
        return [
            _row(path, f"line {n}", parse_json(line, str(path), line=n, like=_LINE), column, _LINE)
            for n, line in enumerate(lines(text), 1)
        ]
    return _read_json(path, text, column) if kind == ".json" else _read_table(path, text, column)


def read_captions(folder: Path) -> tuple[list[Row], list[Path]]:
    """Read the captions beside a folder's pictures, and return them with the pictures that have none.

    Raises:
        InputError: a caption is empty or of several lines; a file is neither picture, caption nor note.
    """
    rows, without = [], []
    for picture in list_pictures(folder):
        file = caption_of(picture)
        if file is None:
            without.append(picture)
            continue
        text = read_text(file).strip()
        if len(lines(text)) > 1:
            raise InputError(
                f"{file} holds {len(lines(text))} lines; the caption of a picture is one. Join them."
            )
        rows.append(Row(file.name, text, {}))
    return rows, without


def caption_of(picture: Path) -> Path | None:
    """Return the caption's file beside a picture, or None."""
    files = (picture.with_suffix(end) for end in CAPTION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _read_json(path: Path, text: str, column: str | None) -> list[Row]:
    if not text.strip():
        return []
    found = parse_json(text, str(path), like=_ENTRY)
    if isinstance(found, Mapping):
        key = column if column in found else _by_meaning(list(found))
        if key is not None and isinstance(found[key], list):
            found, column = found[key], None
    if isinstance(found, Mapping) and found and all(isinstance(one, Mapping) for one in found.values()):
        return [_row(path, f"entry {name!r}", entry, column, _ENTRY) for name, entry in found.items()]
    if isinstance(found, list):
        return [_row(path, f"entry {n}", entry, column, _ENTRY) for n, entry in enumerate(found, 1)]
    raise InputError(f"{path} is no list of prompts. {_ENTRY}")


def _row(path: Path, place: str, entry: object, column: str | None, like: str) -> Row:
    if isinstance(entry, str) and column is None:
        return Row(place, entry.strip(), {})
    keys = list(entry) if isinstance(entry, Mapping) else []
    key = _by_meaning(keys) if column is None else column
    text = entry.get(key) if isinstance(entry, Mapping) and key is not None else None
    if not isinstance(text, str):
        wanted = COLUMNS[0] if column is None else column
        there = ", ".join(keys) if isinstance(entry, Mapping) else type(entry).__name__
        raise InputError(
            f'{path}, {place} has no text under "{wanted}" (found: {there or "nothing"}).'
            f"{_named(keys, column)} {like}"
        )
    assert isinstance(entry, Mapping)
    return Row(place, text.strip(), entry, key)


def _read_table(path: Path, text: str, column: str | None) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    cells: Iterator[tuple[int, list[str]]]
    if path.suffix.lower() == ".csv":
        cells = ((reader.line_num, row) for row in reader if row)
        advice = 'Put a prompt that holds a comma into quotes: "an owl, and a cat"'
    else:
        cells = (
            (n, [_QUOTED.sub(lambda found: found[1].replace('""', '"'), cell) for cell in line.split("\t")])
            for n, line in enumerate(lines(text), 1)
            if line
        )
        advice = "A cell holds neither a tab nor an end of line; such a list is a .csv."
    rows = []
    try:
        _, names = next(cells, (0, []))
        chosen = _column(path, names, column) if names else ""
        for number, row in cells:
            if len(row) != len(names):
                raise InputError(
                    f"{path}, line {number} has not {len(names)} cells as the first line has. {advice}"
                )
            rest = dict(zip(names, row, strict=True))
            rows.append(Row(f"line {number}", rest.pop(chosen).strip(), rest))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}.") from None
    return rows


def _read_parquet(path: Path, column: str | None) -> list[Row]:
    require_file(path)
    try:
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"Reading {path} needs pyarrow, which is not installed. Type: {PARQUET_EXTRA}"
        ) from None
    try:
        schema = parquet.read_schema(path)
        chosen = _column(path, schema.names, column)
        plain = [field.name for field in schema if _is_plain(arrow, field.type)]
        entries = parquet.read_table(path, columns=list(dict.fromkeys([chosen, *plain]))).to_pylist()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from None
    rows = []
    for number, entry in enumerate(entries, 1):
        for name, value in entry.items():
            if isinstance(value, str):
                require_text(value, f"{path}, row {number}, {name}")
        text = entry.pop(chosen)
        if not isinstance(text, str):
            raise InputError(f"{path}, row {number}: {chosen} is {text!r}, not text.")
        rows.append(Row(f"row {number}", text.strip(), entry))
    return rows


def _is_plain(arrow: Any, kind: Any) -> bool:
    """Return whether a type is text, number, truth value or a dictionary of them (pandas' categories)."""
    types = arrow.types
    if types.is_dictionary(kind):
        return _is_plain(arrow, kind.value_type)
    tests = (
        types.is_string, types.is_large_string, types.is_string_view,
        types.is_integer, types.is_floating, types.is_boolean,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def _by_meaning(names: Sequence[str]) -> str | None:
    """Return the name that means prompts, as the file writes it."""
    by_meaning = {name.strip().lower(): name for name in reversed(names)}
    return next((by_meaning[column] for column in COLUMNS if column in by_meaning), None)


def _column(path: Path, names: Sequence[str], column: str | None) -> str:
    """Return the name of the column of prompts in a table's first line."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{path} has several columns {twice[0]!r}. Give each a name of its own.")
    found = _by_meaning(names) if column is None else column
    if found is None or found not in names:
        wanted = " or ".join(repr(one) for one in (COLUMNS if column is None else (column,)))
        guess = next((hint for name in names if (hint := did_you_mean(name.strip().lower(), COLUMNS))), "")
        raise InputError(
            f"{path} has no column {wanted}; it has {', '.join(names)}."
            f"{guess if column is None else ''}{_named(names, column)}"
        )
    return found


def _named(names: Sequence[str], column: str | None) -> str:
    """Return what to type where the prompts are under another name."""
    if column is not None:
        return did_you_mean(column, names)
    return f" Name it: --set prompts.column={names[0]}" if names else ""
