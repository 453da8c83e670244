"""Lists of prompts in .jsonl and .json."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANY_BYTES, LINE, fuzz, soup, unless_refused

from pixrl.data.prompts import load_prompts
from pixrl.text import parse_json

KEYS = st.text("abcdé", min_size=1, max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | LINE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.builds(
    lambda rest, prompt: {**rest, "prompt": prompt}, st.dictionaries(KEYS, JSON, max_size=3), LINE
)
SOUP = soup(
    '{"prompt": ',
    '"',
    "}",
    "[",
    "]",
    ",",
    ":",
    "\\ud83d",
    "\\udd89",
    "\\u0000",
    "\\",
    "1e999",
    "NaN",
    "\n",
    "-",
    "9" * 5000,
)


@fuzz
@given(st.lists(ENTRY, min_size=1, unique_by=json.dumps), st.booleans())
def test_what_is_written_is_read(place: Path, entries: list[dict[str, Any]], ascii_only: bool) -> None:
    path = place / "list.jsonl"
    path.write_text("".join(f"{json.dumps(entry, ensure_ascii=ascii_only)}\n" for entry in entries), "utf-8")
    alone = place / "list.json"
    alone.write_text(json.dumps(entries, ensure_ascii=ascii_only, indent=1), "utf-8")
    for found in (load_prompts(path), load_prompts(alone)):
        read = [dict(prompt.metadata) for prompt in found]
        assert all(prompt.text == prompt.metadata["prompt"] for prompt in found)
        assert all(entry in entries for entry in read)
        assert len(read) == len(entries) or found.notes


@fuzz
@given(ANY_BYTES | SOUP.map(lambda text: text.encode("utf-8", "surrogatepass")), st.none() | st.just("text"))
def test_any_bytes_are_read_or_refused(place: Path, content: bytes, column: str | None) -> None:
    for name in ("any.jsonl", "any.json"):
        (place / name).write_bytes(content)
        found = unless_refused(lambda path=place / name: load_prompts(path, column=column))
        assert found is None or all(prompt.text.encode() for prompt in found)


@fuzz
@given(SOUP.map(lambda text: text.encode(errors="ignore").decode()))
def test_json_that_is_read_holds_text_alone(text: str) -> None:
    found = unless_refused(lambda: parse_json(text, "any"))
    assert json.dumps(found, ensure_ascii=False).encode()  # half of a pair would have no bytes
