"""Every published data format on a small file of its kind, and on the published file itself where it is at hand."""

import json
from pathlib import Path

import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import parquet

from pixrl.data.pairs import read_pairs
from pixrl.data.pictures import read_pictures
from pixrl.data.prompts import Prompt, load_prompts
from pixrl.data.subjects import load_subjects
from pixrl.errors import InputError

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data"


def published(name: str) -> Path:
    """A published file; the test is skipped where it is not at hand."""
    path = PUBLISHED / name
    if not path.is_file():
        pytest.skip(f"the published file is not at {path}")
    return path


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def picture(path: Path, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side + 8), (200, 20, 20)).save(path)
    return path


# --- pairs: RMLer's and CreTok's -------------------------------------------------------------------------------------


def test_pairs_as_cretok_and_rmler_write_them(tmp_path: Path) -> None:
    pairs = read_pairs(
        write(tmp_path, "pairs.txt", "Alpaca&Lion\nangora&indian elephant  \nOwl&alpaca\nLion&Alpaca\n")
    )
    assert pairs.pairs == (("Alpaca", "Lion"), ("angora", "indian elephant"), ("Owl", "Alpaca"))
    assert len(pairs.notes) == 2  # one spelling unified, one pair repeated


@pytest.mark.parametrize(
    ("name", "concepts"), [("cangjie_200_pairs.txt", 94), ("imagenet_200_pairs.txt", 100)]
)
def test_the_published_pairs(name: str, concepts: int) -> None:
    pairs = read_pairs(published(name))
    assert (len(pairs), len(pairs.concepts)) == (200, concepts)


# --- prompts: GenEval, PickScore, DrawBench --------------------------------------------------------------------------

GENEVAL = (
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 3}],
        "exclude": [{"class": "clock", "count": 4}],
        "prompt": "a photo of three clocks",
    },
)


def test_geneval_metadata(tmp_path: Path) -> None:
    lines = "".join(f"{json.dumps(entry)}\n" for entry in GENEVAL)
    prompts = load_prompts(write(tmp_path, "evaluation_metadata.jsonl", lines))
    assert [prompt.text for prompt in prompts] == ["a photo of a bench", "a photo of three clocks"]
    assert [prompt.metadata for prompt in prompts] == list(GENEVAL)


def test_the_published_geneval_metadata() -> None:
    prompts = load_prompts(published("geneval_evaluation_metadata.jsonl"))
    tags = [str(prompt.metadata["tag"]) for prompt in prompts]
    counts = {tag: tags.count(tag) for tag in dict.fromkeys(tags)}
    assert counts == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip


def test_pickscore_prompts_as_text(tmp_path: Path) -> None:
    """Flow-GRPO's dataset/pickscore/train.txt: one prompt a line, commas, quotes and all."""
    path = write(tmp_path, "train.txt", 'a "red" owl, 4k, masterpiece\nportrait of a knight; oil on canvas\n')
    assert [prompt.text for prompt in load_prompts(path)] == [
        'a "red" owl, 4k, masterpiece',
        "portrait of a knight; oil on canvas",
    ]


def test_pickscore_prompts_as_jsonl(tmp_path: Path) -> None:
    """Pick-a-Pic calls them captions."""
    (owl,) = load_prompts(
        write(tmp_path, "pick.jsonl", '{"ranking_id": 7, "caption": "an owl", "label_0": 1.0}\n')
    )
    assert owl == Prompt("an owl", {"ranking_id": 7, "caption": "an owl", "label_0": 1.0})


def test_drawbench_as_csv(tmp_path: Path) -> None:
    """The sheet's own heading: Prompts,Category."""
    content = (
        'Prompts,Category\nA red colored car.,Colors\n"A stop sign, on the right of a dog.",Positional\n'
    )
    car, sign = load_prompts(write(tmp_path, "drawbench.csv", content))
    assert car == Prompt("A red colored car.", {"Category": "Colors"})
    assert sign.text == "A stop sign, on the right of a dog."


def test_drawbench_and_pick_a_pic_as_parquet(tmp_path: Path) -> None:
    """Pictures within the file stay there; text and numbers become metadata."""
    path = tmp_path / "test.parquet"
    parquet.write_table(arrow.table({"prompts": ["a red car"], "category": ["Colors"]}), path)
    assert load_prompts(path)[0] == Prompt("a red car", {"category": "Colors"})
    columns = {"jpg_0": [b"\xff\xd8"], "caption": ["an owl"], "label_0": [1.0], "are_different": [True]}
    parquet.write_table(arrow.table(columns), path)
    assert load_prompts(path)[0] == Prompt("an owl", {"label_0": 1.0, "are_different": True})


# --- subjects: DreamBench, UNO, a folder of pictures -----------------------------------------------------------------

CLASSES = """Classes

subject_name,class
backpack,backpack
dog6,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} on top of pink fabric'.format(unique_token, class_token),
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
]
"""


def test_a_dreambench_checkout(tmp_path: Path) -> None:
    write(tmp_path, "dataset/prompts_and_classes.txt", CLASSES)
    for name in ("backpack/00.jpg", "backpack/01.jpg", "dog6/00.jpg"):
        picture(tmp_path / "dataset" / name)
    backpack, dog = load_subjects(tmp_path)
    assert (backpack.name, backpack.word, len(backpack.references)) == ("backpack", "backpack", 2)
    assert backpack.prompts == ("a backpack in the jungle", "a backpack on top of pink fabric")
    assert (dog.name, dog.word, dog.prompts) == ("dog6", "dog", ("a dog wearing a red hat",))


def test_unos_list(tmp_path: Path) -> None:
    picture(tmp_path / "dreambooth/dataset/backpack/02.jpg")
    entry = {"prompt": "a backpack in the snow", "image_paths": ["./dreambooth/dataset/backpack/02.jpg"]}
    (backpack,) = load_subjects(write(tmp_path, "dreambench_singleip.json", json.dumps([entry], indent=4)))
    assert (backpack.name, backpack.prompts) == ("backpack", ("a backpack in the snow",))
    assert backpack.pictures()[0].size == (40, 48)


def test_the_published_uno_list(tmp_path: Path) -> None:
    """Its 750 entries, with a made-up picture at each of its thirty paths."""
    text = published("uno_dreambench_singleip.json").read_text()
    for path in {one for entry in json.loads(text) for one in entry["image_paths"]}:
        picture(tmp_path / path)
    subjects = load_subjects(write(tmp_path, "list.json", text))
    assert len(subjects) == 30
    assert sum(len(subject.prompts) for subject in subjects) == 750


def test_a_folder_of_reference_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "b.jpg", 64)
    picture(tmp_path / "a.png")
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert [image.size for image in read_pictures(tmp_path)] == [(40, 48), (64, 72)]
    with pytest.raises(InputError, match="holds no pictures"):
        read_pictures(write(tmp_path, "empty/notes.txt", "x").parent)
    with pytest.raises(InputError, match="There is no folder"):
        read_pictures(tmp_path / "missing")
    (tmp_path / "c.heic").write_bytes(b"x")
    with pytest.raises(InputError, match="is not read"):
        read_pictures(tmp_path)
