"""Lists of prompts in .txt: what is written is read again, and any bytes are read or refused."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANY_BYTES, LINE, fuzz, unless_refused

from pixrl.data.prompts import load_prompts
from pixrl.text import comparable, lines


@fuzz
@given(
    st.lists(LINE, min_size=1),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_is_written_is_read(place: Path, prompts: list[str], end: str, encoding: str) -> None:
    path = place / "list.txt"
    path.write_bytes("".join(f"{prompt}{end}" for prompt in prompts).encode(encoding))
    found = load_prompts(path)
    first = {comparable(prompt): prompt for prompt in reversed(prompts)}
    assert {comparable(prompt.text): prompt.text for prompt in found} == first
    assert bool(found.notes) == (len(first) < len(prompts))


@fuzz
@given(ANY_BYTES)
def test_any_bytes_are_read_or_refused(place: Path, content: bytes) -> None:
    path = place / "any.txt"
    path.write_bytes(content)
    found = unless_refused(lambda: load_prompts(path))
    assert found is None or all(len(lines(prompt.text)) == 1 for prompt in found)
