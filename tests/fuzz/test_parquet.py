"""Lists of prompts in .parquet."""

from pathlib import Path

import pyarrow as arrow
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tests.fuzz.budget import LINE, fuzz, unless_refused

from pixrl.data.prompts import load_prompts


@fuzz
@given(st.lists(LINE, min_size=1, unique=True), st.booleans())
def test_what_is_written_is_read(place: Path, prompts: list[str], categories: bool) -> None:
    path = place / "list.parquet"
    column = arrow.array(prompts)
    table = arrow.table(
        {"prompt": column.dictionary_encode() if categories else column, "n": range(len(prompts))}
    )
    parquet.write_table(table, path)
    found = load_prompts(path)
    assert {prompt.text for prompt in found} <= set(prompts)
    assert len(found) == len(prompts) or found.notes


@fuzz
@given(st.binary(), st.integers(0, 2**16), st.binary(max_size=8))
def test_damaged_files_are_refused_or_read(place: Path, content: bytes, at: int, piece: bytes) -> None:
    path = place / "any.parquet"
    parquet.write_table(arrow.table({"prompt": ["an owl", "a cat"], "n": [1, 2]}), path)
    whole = path.read_bytes()
    at %= len(whole)
    for damaged in (content, whole[:at] + piece + whole[at + len(piece) :], whole[:at]):
        path.write_bytes(damaged)
        unless_refused(lambda: load_prompts(path))
