"""Lists of prompts in .csv and .tsv."""

import csv
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANY_BYTES, LINE, fuzz, soup, unless_refused

from pixrl.data.prompts import load_prompts

CELL = LINE | st.text('abc,"\n', max_size=6).map(str.strip).filter(bool)
SOUP = soup("prompt", "caption", ",", "\t", '"', '""', "\n", "\r\n", " ", "\0")


@fuzz
@given(st.lists(st.tuples(CELL, st.integers()), min_size=1, unique=True))
def test_what_is_written_is_read(place: Path, rows: list[tuple[str, int]]) -> None:
    path = place / "list.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("n", "prompt"), *((number, prompt) for prompt, number in rows)])
    found = load_prompts(path)
    read = [(prompt.text, int(str(prompt.metadata["n"]))) for prompt in found]
    assert read == rows or (set(read) < set(rows) and found.notes)


@fuzz
@given(
    st.lists(
        st.text('abc"', min_size=1, max_size=6).filter(lambda cell: cell.count('"') < 3),
        min_size=1,
        unique=True,
    )
)
def test_quotes_of_a_tsv_are_letters(place: Path, prompts: list[str]) -> None:
    path = place / "list.tsv"
    path.write_text("Prompt\tn\n" + "".join(f"{prompt}\t1\n" for prompt in prompts))
    assert [prompt.text for prompt in load_prompts(path)] == prompts


@fuzz
@given(ANY_BYTES | SOUP.map(lambda text: text.encode("utf-8", "surrogatepass")), st.none() | st.just("n"))
def test_any_bytes_are_read_or_refused(place: Path, content: bytes, column: str | None) -> None:
    for name in ("any.csv", "any.tsv"):
        (place / name).write_bytes(content)
        found = unless_refused(lambda path=place / name: load_prompts(path, column=column))
        assert found is None or all(prompt.text for prompt in found)
