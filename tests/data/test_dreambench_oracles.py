"""DreamBench's file and pictures, told apart by content: a made-up checkout of three subjects."""

from pathlib import Path

import pytest
from PIL import Image

from pixrl.data.subject_prompts import subject_prompts
from pixrl.data.subjects import SubjectSet, load_subjects

TEXT = """Classes
subject_name,class
tin,can
rex,dog
tom,cat

Prompts

Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
"a {0} {1} on top of a dirt road".format(unique_token, class_token),
]

Live Subject Prompts
prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a {0} {1} in the snow'.format(unique_token, class_token),
]
"""
COLOURS = {
    "tin": ("red", "lime", "blue"),
    "rex": ("black", "white", "gray"),
    "tom": ("cyan", "yellow", "magenta"),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> SubjectSet:
    folder = tmp_path_factory.mktemp("dreambooth")
    for name, colours in COLOURS.items():
        for number, colour in enumerate(colours):
            path = folder / "dataset" / name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), colour).save(path)
    (folder / "dataset" / "prompts_and_classes.txt").write_text(TEXT)
    return load_subjects(folder)


def colours_of(pictures: object) -> list[tuple[int, ...]]:
    assert isinstance(pictures, list)
    return [tuple((255 * picture[:, 0, 0]).round().int().tolist()) for picture in pictures]


def rgb(name: str) -> tuple[int, ...]:
    return Image.new("RGB", (1, 1), name).getpixel((0, 0))  # type: ignore[return-value]


def test_subjects_are_in_the_files_order_with_their_own_pictures_in_the_folders(checkout: SubjectSet) -> None:
    assert [(one.name, one.word) for one in checkout] == [("tin", "can"), ("rex", "dog"), ("tom", "cat")]
    for subject in checkout:
        assert [Path(str(one)).name for one in subject.references] == ["00.png", "01.png", "02.png"]
        assert colours_of(subject.tensors()) == [rgb(colour) for colour in COLOURS[subject.name]]


def test_objects_and_live_subjects_are_asked_their_own_prompts_without_the_rare_token(
    checkout: SubjectSet,
) -> None:
    assert [one.prompts for one in checkout] == [
        ("a can in the jungle", "a can on top of a dirt road"),
        ("a dog wearing a red hat", "a dog in the snow"),
        ("a cat wearing a red hat", "a cat in the snow"),
    ]


def test_the_model_is_shown_the_first_references_and_rewards_all(checkout: SubjectSet) -> None:
    prompts = subject_prompts(checkout, count=2)
    for number, prompt in enumerate(prompts):
        name = list(COLOURS)[number // 2]
        expected = [rgb(colour) for colour in COLOURS[name]]
        assert prompt.metadata["subject"] == name
        assert colours_of(prompt.metadata["shown"]) == expected[:2]
        assert colours_of(prompt.metadata["reference"]) == expected
