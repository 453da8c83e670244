"""DreamBench's prompts_and_classes.txt."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANY_BYTES, fuzz, soup, unless_refused

from pixrl.data.subjects import read_classes

WORD = st.text("abcdefgh", min_size=1, max_size=8)
SOUP = soup(
    "subject_name,class\n", "Object Prompts\n", "Live Subject Prompts\n", "\n", "]\n", "dog,dog\n", "cup,cup\n",
    "'a {0} {1} in the snow'.format(a, b),\n", "'a {0}", "{1}'", ".format(", '"', "{", "}",
)  # fmt: skip


def written(subjects: dict[str, str], objects: list[str], live: list[str]) -> str:
    def section(words: list[str]) -> str:
        return (
            "prompt_list = [\n" + "".join(f"'a {{0}} {{1}} {word}'.format(u, c),\n" for word in words) + "]\n"
        )

    listed = "".join(f"{name},{word}\n" for name, word in subjects.items())
    parts = (
        "Classes\n\nsubject_name,class",
        listed,
        "Object Prompts\n",
        section(objects),
        "Live Subject Prompts\n",
    )
    return "\n".join((*parts, section(live)))


@fuzz
@given(
    st.dictionaries(WORD, WORD | st.sampled_from(["dog", "cat"]), min_size=1, max_size=4),
    st.lists(WORD, min_size=1, max_size=4),
    st.lists(WORD, min_size=1, max_size=4),
)
def test_what_is_written_is_read(
    place: Path, subjects: dict[str, str], objects: list[str], live: list[str]
) -> None:
    path = place / "classes.txt"
    path.write_text(written(subjects, objects, live))
    found, notes = read_classes(path)
    assert {name: word for name, word, _ in found} == subjects
    for _, word, prompts in found:
        own = live if word in ("dog", "cat") else objects
        assert list(prompts) == [f"a {word} {end}" for end in dict.fromkeys(own)]
    assert len(notes) == len(objects) - len(set(objects)) + len(live) - len(set(live))


@fuzz
@given(ANY_BYTES | SOUP.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(place: Path, content: bytes) -> None:
    path = place / "any.txt"
    path.write_bytes(content)
    found = unless_refused(lambda: read_classes(path))
    assert found is None or all(name and word and prompts for name, word, prompts in found[0])
