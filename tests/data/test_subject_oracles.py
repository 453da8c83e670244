"""Subjects and what their prompts carry, with pictures told apart by colour."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.data.test_dreambench_oracles import colours_of, rgb

from pixrl.data.subject_prompts import subject_prompts
from pixrl.data.subjects import SubjectSet, check_targets, load_subjects
from pixrl.errors import InputError

ENTRIES = [
    {"prompt": "a red hat on a dog", "image_paths": ["hat.png", "dog.png"], "image_tgt_path": "red.png"},
    {"prompt": "a dog under a hat", "image_paths": ["hat.png", "dog.png"], "image_tgt_path": "green.png"},
    {"prompt": "a dog with a hat", "image_paths": ["dog.png", "hat.png"], "image_tgt_path": "blue.png"},
    {"prompt": "a dog in a hat", "image_paths": ["dog.png", "hat.png"]},
]
COLOURS = {"hat": "yellow", "dog": "black", "red": "red", "green": "lime", "blue": "blue"}


@pytest.fixture
def listed(tmp_path: Path) -> SubjectSet:
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 32), colour).save(tmp_path / f"{name}.png")
    entries = [
        entry | {"classes": [Path(path).stem for path in entry["image_paths"]]}  # type: ignore[union-attr]
        for entry in ENTRIES
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    return load_subjects(tmp_path / "list.json")


def test_a_list_keeps_the_order_of_references_and_gives_each_prompt_its_own_target(
    listed: SubjectSet,
) -> None:
    assert [one.words for one in listed] == [("hat", "dog"), ("dog", "hat")]
    for subject, order in zip(listed, (("hat", "dog"), ("dog", "hat")), strict=True):
        assert colours_of(subject.tensors()) == [rgb(COLOURS[name]) for name in order]
    targets = [[one.target(number) for number in range(2)] for one in listed]
    shown = [[None if found is None else found().getpixel((0, 0)) for found in pair] for pair in targets]
    assert shown == [[rgb("red"), rgb("lime")], [rgb("blue"), None]]


def test_every_prompts_target_is_asked_for(listed: SubjectSet) -> None:
    check_targets(SubjectSet("first", listed.subjects[:1]))
    with pytest.raises(InputError, match=r"'a dog in a hat'.* has none"):
        check_targets(listed)


def test_what_each_prompt_carries(listed: SubjectSet) -> None:
    prompts = subject_prompts(listed, count=1)
    assert [prompt.text for prompt in prompts] == [entry["prompt"] for entry in ENTRIES]
    for entry, prompt in zip(ENTRIES, prompts, strict=True):
        order = [Path(path).stem for path in entry["image_paths"]]
        about = prompt.metadata
        assert colours_of(about["shown"]) == [rgb(COLOURS[order[0]])]
        assert colours_of(about["reference"]) == [rgb(COLOURS[name]) for name in order]
        several = about["subjects"]
        assert isinstance(several, list)
        assert [one["class"] for one in several] == order
        assert colours_of([one["reference"] for one in several]) == [rgb(COLOURS[name]) for name in order]
        target = entry.get("image_tgt_path")
        assert ("target" in about) == (target is not None)
        if target is not None:
            assert colours_of([about["target"]]) == [rgb(COLOURS[Path(str(target)).stem])]


def test_folders_keep_the_order_of_names_pictures_and_prompts(tmp_path: Path) -> None:
    for name, colours in (("tom", ("red", "lime")), ("rex", ("blue", "black"))):
        folder = tmp_path / name
        folder.mkdir()
        for number, colour in enumerate(colours):
            Image.new("RGB", (40, 32), colour).save(folder / f"{number}.png")
        (folder / "class.txt").write_text("dog")
        (folder / "prompts.txt").write_text(f"a dog of {name}\nanother dog of {name}\n")
    loaded = load_subjects(tmp_path)
    assert [(one.name, one.prompts) for one in loaded] == [
        (name, (f"a dog of {name}", f"another dog of {name}")) for name in ("rex", "tom")
    ]
    assert [colours_of(one.tensors()) for one in loaded] == [
        [rgb("blue"), rgb("black")], [rgb("red"), rgb("lime")],
    ]  # fmt: skip
    prompts = subject_prompts(loaded, count=None)
    first = [colours_of(prompt.metadata["shown"])[0] for prompt in prompts]
    assert first == [rgb("blue")] * 2 + [rgb("red")] * 2
    assert [prompt.text for prompt in prompts][2:] == ["a dog of tom", "another dog of tom"]
    assert prompts[0].metadata["include"] == [{"class": "dog", "count": 1}]
    assert prompts[0].metadata["exclude"] == [{"class": "dog", "count": 2}]


def test_the_toy_worlds_splits_are_told_apart() -> None:
    training, held_out = (load_subjects("toy:subjects", split=split) for split in ("train", "evaluation"))
    assert len(training) == 2 * len(held_out) == 64


def test_a_large_picture_keeps_its_proportions(tmp_path: Path) -> None:
    Image.new("RGB", (2048, 512), "red").save(tmp_path / "0.png")
    (tmp_path / "class.txt").write_text("dog")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    (picture,) = subject_prompts(load_subjects(tmp_path))[0].metadata["reference"]  # type: ignore[misc]
    assert isinstance(picture, torch.Tensor) and tuple(picture.shape) == (3, 256, 1024)
