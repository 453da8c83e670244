"""Captions beside pictures, and a subject's class word and prompts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.fuzz.budget import ANY_BYTES, LINE, fuzz, unless_refused

from pixrl.data.prompts import load_prompts
from pixrl.data.subjects import load_subjects


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject") / "owl"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), "red").save(folder / name)
    return folder


@fuzz
@given(LINE, st.sampled_from([".caption", ".txt"]), st.sampled_from(["", "\n", "\r\n\r\n"]))
def test_what_is_written_is_read(subject: Path, text: str, suffix: str, end: str) -> None:
    file = subject / f"a{suffix}"
    file.write_bytes(f"{text}{end}".encode())
    found = load_prompts(subject)
    file.unlink()
    assert [prompt.text for prompt in found] == [text] and len(found.notes) == 1


@fuzz
@given(ANY_BYTES, ANY_BYTES, st.sampled_from(["prompts.txt", "a.caption", "a.txt"]))
def test_any_bytes_are_read_or_refused(subject: Path, word: bytes, content: bytes, name: str) -> None:
    (subject / "class.txt").write_bytes(word)
    (subject / name).write_bytes(content)
    found = unless_refused(lambda: load_subjects(subject))
    (subject / name).unlink()
    assert found is None or (found[0].word and found[0].prompts)
