"""UNO's lists."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.fuzz.budget import ANYTHING, LINE, fuzz, unless_refused

from pixrl.data.subjects import load_subjects

PATH = st.sampled_from(["a.png", "./b.png", "deep/a.png"])
ENTRY = st.fixed_dictionaries(
    {"prompt": LINE},
    optional={"image_tgt_path": PATH, "note": LINE},
).flatmap(
    lambda entry: st.one_of(
        st.lists(PATH, min_size=1, max_size=3).map(lambda paths: {**entry, "image_paths": paths}),
        PATH.map(lambda path: {**entry, "image_path": path}),
    )
)
VALUE = ANYTHING | st.none() | st.integers() | st.lists(PATH | ANYTHING, max_size=2) | PATH
ODD = st.dictionaries(
    st.sampled_from(["prompt", "image_paths", "image_path", "image_tgt_path", "classes"]), VALUE, max_size=5
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uno")
    (folder / "deep").mkdir()
    for name in ("a.png", "b.png", "deep/a.png"):
        Image.new("RGB", (32, 32), "red").save(folder / name)
    return folder


@fuzz
@given(st.lists(ENTRY, min_size=1, max_size=5))
def test_what_is_written_is_read(pictures: Path, entries: list[dict[str, Any]]) -> None:
    path = pictures / "list.json"
    path.write_text(json.dumps(entries), "utf-8")
    found = load_subjects(path)
    asked = [(prompt, subject.references) for subject in found for prompt in subject.prompts]
    assert {prompt for prompt, _ in asked} <= {entry["prompt"] for entry in entries}
    assert len(asked) == len(entries) or found.notes
    assert len({subject.name for subject in found}) == len(found)


@fuzz
@given(st.lists(ODD, max_size=3), st.booleans())
def test_odd_entries_are_read_or_refused(
    pictures: Path, entries: list[dict[str, Any]], ascii_only: bool
) -> None:
    path = pictures / "any.json"
    text = json.dumps(entries, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = unless_refused(lambda: load_subjects(path))
    assert found is None or all(subject.references and subject.prompts for subject in found)
