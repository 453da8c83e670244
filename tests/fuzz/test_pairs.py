"""Lists of pairs: what is written is read again, and any lines are read or refused."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANY_BYTES, ANYTHING, fuzz, soup, unless_refused

from pixrl.data.pairs import check_concepts, parse_pairs, read_pairs

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=8), min_size=1, max_size=2)
NAMES = st.lists(WORDS.map(" ".join), min_size=2, max_size=4, unique=True)


@fuzz
@given(st.lists(NAMES, min_size=1, max_size=8))
def test_what_is_written_is_read(place: Path, lists: list[list[str]]) -> None:
    path = place / "pairs.txt"
    path.write_text("".join(f"{' & '.join(names)}\n" for names in lists))
    found = read_pairs(path)
    assert {frozenset(names) for names in found} == {frozenset(names) for names in lists}
    assert len(found) + len(found.notes) == len(lists)


@fuzz
@given(
    ANY_BYTES
    | soup("owl", "snail", "&", " ", "#", "\n", "\r\n", "\x85").map(
        lambda text: text.encode(errors="replace")
    )
)
def test_any_bytes_are_read_or_refused(place: Path, content: bytes) -> None:
    path = place / "any.txt"
    path.write_bytes(content)
    found = unless_refused(lambda: read_pairs(path))
    assert found is None or all(len(names) > 1 and all(names) for names in found)


@fuzz
@given(st.lists(ANYTHING))
def test_any_words_are_concepts_or_refused(words: list[str]) -> None:
    unless_refused(lambda: parse_pairs(words))
    found = unless_refused(lambda: check_concepts(words))
    assert found is None or (len(found) > 1 and "".join(found).encode())
