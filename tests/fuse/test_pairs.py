"""Lists of concepts: what is read, what is noted, and what is refused with file, line and content."""

from pathlib import Path

import pytest

from pixrl.data.pairs import check_concepts, is_wordless, parse_pairs, read_pairs, split_picture
from pixrl.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(folder: Path, text: str) -> Path:
    path = folder / "pairs.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_pairs_with_and_without_spaces_and_more_concepts(tmp_path):
    found = read_pairs(write(tmp_path, "owl & snail\nowl&frog \n  car  &  red  cup&tree\n"))
    assert found.pairs == (("owl", "snail"), ("owl", "frog"), ("car", "red cup", "tree"))
    assert found.concepts == ("owl", "snail", "frog", "car", "red cup", "tree")
    assert found.notes == ()


def test_duplicates_are_dropped_whatever_their_case_and_order_and_noted(tmp_path):
    path = write(tmp_path, "owl & Snail\nSNAIL & owl\nfrog & cat\n")
    found = read_pairs(path)
    assert found.pairs == (("owl", "Snail"), ("frog", "cat"))
    assert any(f"{path}, line 2" in note and "line 1" in note and "left out" in note for note in found.notes)


def test_a_concept_is_spelled_as_where_it_first_appears(tmp_path):
    found = read_pairs(write(tmp_path, "Indian elephant & owl\nindian elephant & cat\n"))
    assert found.pairs[1] == ("Indian elephant", "cat")
    assert "'indian elephant' is spelled 'Indian elephant'" in found.notes[0]


def test_comments_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_bytes("\ufeff# animals\r\nowl & snail\r\n".encode())
    assert read_pairs(path).pairs == (("owl", "snail"),)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("owl snail", "'owl snail' has no '&'"),
        ("owl &", "'owl &' has nothing on one side"),
        ("& owl", "nothing on one side"),
        ("owl & & cat", "nothing on one side"),
        ("Owl & owl", "'Owl & owl' names the same concept twice"),
        ("   ", "is empty"),
        (
            "owl & photo.png",
            "'photo.png' is a picture, and a list holds words alone. Fuse it by itself: pixrl fuse owl photo.png",
        ),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_content(tmp_path, line, says):
    path = write(tmp_path, f"cat & frog\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    assert f"{path}, line 2" in str(caught.value)
    assert says in str(caught.value)


def test_an_empty_file_a_missing_file_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="names no concepts"):
        read_pairs(write(tmp_path, ""))
    with pytest.raises(InputError, match="There is no file"):
        read_pairs(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="begins as UTF-16 and is none"):
        read_pairs(tmp_path / "b.txt")


def test_a_list_in_memory_is_named_in_messages():
    with pytest.raises(InputError, match="the list of pairs, line 1"):
        parse_pairs(["owl"])


@pytest.mark.parametrize(
    ("concepts", "says"),
    [
        (["owl"], "only 'owl' was given"),
        ([], "none was given"),
        (["owl", "OWL "], "'OWL' is given twice"),
        (["owl", " "], "A concept is empty"),
    ],
)
def test_concepts_must_be_two_or_more_different_names(concepts, says):
    with pytest.raises(InputError, match=says):
        check_concepts(concepts)


@pytest.mark.parametrize(("name", "count"), [("cangjie_200_pairs", 200), ("imagenet_200_pairs", 200)])
def test_the_published_lists_load(name, count):
    path = SHARED / f"{name}.txt"
    if not path.is_file():
        pytest.skip(
            f"{path} is not here: the published lists have no licence and do not travel with the code"
        )
    found = read_pairs(path)
    assert len(found) == count
    assert all(concept == concept.strip() for concept in found.concepts)
    assert len({concept.casefold() for concept in found.concepts}) == len(found.concepts)


@pytest.mark.parametrize(
    ("concept", "name", "file"),
    [
        ("photo.png", "photo.png", "photo.png"),
        ("pictures/my owl.JPG", "my owl.JPG", "pictures/my owl.JPG"),
        ("owl.heic", "owl.heic", "owl.heic"),
        ("my owl = pictures/a=b.webp", "my owl", "pictures/a=b.webp"),
        ("a png", "a png", None),
        ("a photo of a jpg", "a photo of a jpg", None),
        ("x=y", "x=y", None),
    ],
)
def test_a_concept_is_a_word_or_the_file_of_a_picture(concept, name, file):
    assert split_picture(concept) == (name, file)
    assert is_wordless(name) == (name == Path(file or "").name)
    assert check_concepts(["snail", name]) == ("snail", name)
