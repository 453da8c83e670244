"""Inputs from the field, each reduced to its point: every row of the table that is about text or pictures.

B36 (odd prompts) had a NUL in its second line, which is a control character and refused with its place; its other
lines are read as they are.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from typer.testing import CliRunner

from pixrl import cli, config
from pixrl.data.pairs import read_pairs
from pixrl.data.pictures import read_picture
from pixrl.data.prompts import Prompt, Split, load_prompts
from pixrl.data.subject_prompts import subject_prompts
from pixrl.data.subjects import load_subjects, read_classes
from pixrl.errors import ConfigError, InputError
from pixrl.report.align import class_word
from pixrl.runs.config import AlignConfig, PersonalizeConfig
from pixrl.runs.data import checksum

CASES = Path(__file__).parent / "cases"
REWARD = {"rewards": [{"name": "geneval"}]}


def texts(source: Path, **given: Any) -> list[str]:
    return [prompt.text for prompt in load_prompts(source, **given)]


def subject_folder(place: Path) -> Path:
    """A subject with one picture, its class word and one prompt."""
    place.mkdir(parents=True)
    shutil.copy(CASES / "rgba.png", place / "a.png")
    (place / "class.txt").write_text("owl")
    (place / "prompts.txt").write_text("an owl in the snow\n")
    return place


# --- lists of prompts ------------------------------------------------------------------------------------------------


def test_repeats_are_counted_and_noted() -> None:
    geneval = load_prompts(CASES / "B01_repeats.jsonl")
    assert [prompt.text for prompt in geneval] == ["a photo of an owl", "a photo of two snails"]
    (note,) = geneval.notes
    assert "B01_repeats.jsonl: 2 of 4 rows repeat others" in note
    assert "line 3 repeats line 1: 'a photo of an owl'; line 4 repeats line 2" in note
    drawbench = load_prompts(CASES / "B02_repeats.txt")
    assert [prompt.text for prompt in drawbench] == ["a red boat beside a blue car", "a green cup"]
    assert "1 of 3 rows" in drawbench.notes[0]


def test_a_row_is_distinct_by_prompt_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(
        '{"prompt": "café", "n": 1, "m": 2}\n{"prompt": "café", "n": 2}\n{"m": 2, "n": 1, "prompt": " cafe\\u0301"}\n'
    )
    found = load_prompts(path)
    assert [prompt.metadata["n"] for prompt in found] == [1, 2]
    assert "line 3 repeats line 1" in found.notes[0]


def test_partiprompts_and_hps() -> None:
    (owl,) = load_prompts(CASES / "B05_parti.tsv")
    assert owl == Prompt("a photo of an owl", {"Category": "Animals", "Challenge": "Basic", "Note": ""})
    assert texts(CASES / "B05_hps.json") == ["a photo of an owl", "a photo of a snail"]
    assert texts(CASES / "B05_parti.tsv", column="Category") == ["Animals"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.jsonl", '{"text": "an owl"}\n{"text": "a cat"}'),
        ("list.json", '[{"text": "an owl"}, {"text": "a cat"}]'),
        ("list.json", '{"00a1": {"text": "an owl"}, "00a2": {"text": "a cat"}}'),
        ("list.json", '{"text": ["an owl", "a cat"], "count": 2}'),
        ("list.csv", "id,text\n1,an owl\n2,a cat\n"),
        ("list.tsv", "id\ttext\n1\tan owl\n2\ta cat\n"),
    ],
)
def test_the_recipe_names_the_column(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    recipe = config.load(AlignConfig, {**REWARD, "prompts": {"source": str(path), "column": "text"}})
    for split in Split:  # without a source of its own, the evaluation reads the training's
        source, column = recipe.prompts_of(split)
        assert texts(Path(source), column=column) == ["an owl", "a cat"]
    with pytest.raises(InputError):
        load_prompts(path, column="tex")
    with pytest.raises(InputError):
        load_prompts(path)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("id,text\n1,an owl\n")
    with pytest.raises(
        InputError, match=r"has no column 'prompt' or .*; it has id, text\. Name it: --set prompts\.col"
    ):
        load_prompts(path)
    with pytest.raises(InputError, match=r"has no column 'tex'; it has id, text\. Did you mean 'text'\?"):
        load_prompts(path, column="tex")
    path.write_text("text,text\nan owl,a cat\n")
    with pytest.raises(InputError, match="several columns 'text'"):
        load_prompts(path, column="text")
    for source in (CASES / "B02_repeats.txt", "toy:geneval"):
        with pytest.raises(InputError, match="has no columns"):
            load_prompts(source, column="text")


@pytest.mark.parametrize(
    ("kind", "recipe", "message"),
    [
        (
            AlignConfig,
            {"evaluation": {"column": "text"}},
            "evaluation.column names a column of evaluation.source",
        ),
        (PersonalizeConfig, {"prompts": {"column": "text"}}, "prompts.column has no effect"),
    ],
)
def test_a_column_without_effect(kind: type[AlignConfig], recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(kind, {**REWARD, **recipe})


def test_tsv_as_partiprompts_and_as_pandas_write_it(tmp_path: Path) -> None:
    """PartiPrompts' file has one prompt that begins with a quoted word; pandas doubles quotes within quotes."""
    path = tmp_path / "list.tsv"
    path.write_text('Prompt\tn\n"G I G" in paint\t1\n"a ""sign"""\t2\n"whole"\t3\n')
    assert texts(path) == ['"G I G" in paint', 'a "sign"', '"whole"']
    path.write_text("Prompt\tn\nan owl\n")
    with pytest.raises(InputError, match=r"line 2 has not 2 cells .* such a list is a \.csv"):
        load_prompts(path)


def test_half_an_emoji_is_refused_by_doctor_and_align_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"kind: align\nmodel: nowhere\nprompts: {{source: {CASES / 'B06_surrogate.jsonl'}}}\n"
        "rewards: [{name: python, options: {function: 'm:f'}}]\n"
    )
    where = "line 1, character 30 is half a character (U+D83D, a lone surrogate)"
    for command in (["doctor", str(recipe)], ["align", str(recipe), "--out", "run"]):
        done = CliRunner().invoke(cli.app, command)
        assert where in " ".join(done.output.split())
        assert done.exit_code in (1, 2) and "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == [recipe]


def test_unos_lists_of_half_an_emoji(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text('[\n {"prompt": "an owl \\ud83d", "image_paths": ["a.png"]}\n]')
    with pytest.raises(InputError, match=r"list\.json, line 2, character 21 is half a character"):
        load_subjects(path)


def test_utf16_of_windows() -> None:
    assert texts(CASES / "B09_utf16.txt") == ["a photo of a red owl", "a photo of a blue snail"]


def test_next_line_is_no_end_of_line() -> None:
    assert read_pairs(CASES / "B17_nel_pairs.txt").pairs == (("owl", "snail"), ("bear", "cat"))


def test_a_category_of_pandas_is_kept() -> None:
    owl, snail = load_prompts(CASES / "B19_dictionary.parquet")
    assert owl == Prompt("an owl", {"cat": "x"}) and snail == Prompt("a snail", {"cat": "y"})


def test_odd_prompts_are_kept_and_a_nul_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"B36_odd\.txt, line 2, character 9 is the control character U\+0000"
    ):
        load_prompts(CASES / "B36_odd.txt")
    content = (CASES / "B36_odd.txt").read_bytes()
    path = tmp_path / "odd.txt"
    path.write_bytes(content.replace(b"\0", b""))
    written = path.read_text(encoding="utf-8").split("\n")
    assert texts(path) == [line.strip() for line in written if line]


CLASSES = """Classes

subject_name,class
backpack,backpack
backpack,backpack
dog6,dog

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} on grass'.format(unique_token, class_token),
'a {0} {1} in the snow'.format(unique_token, class_token),
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a hat'.format(unique_token, class_token),
]
"""


def test_repeats_in_dreambenchs_file_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(CLASSES)
    (backpack, _), notes = read_classes(path)
    assert backpack == ("backpack", "backpack", ("a backpack in the snow", "a backpack on grass"))
    first, second = notes
    assert "line 5 repeats the subject 'backpack'" in first
    assert "line 13 repeats the prompt 'a {0} {1} in the snow'" in second
    path.write_text(CLASSES.replace("backpack,backpack\ndog6", "backpack,bag\ndog6"))
    with pytest.raises(InputError, match="line 5 calls 'backpack' 'bag', and a line before 'backpack'"):
        read_classes(path)


# --- subjects --------------------------------------------------------------------------------------------------------


def test_unos_singular_key(tmp_path: Path) -> None:
    shutil.copy(CASES / "B16_image_path.json", tmp_path / "list.json")
    (tmp_path / "ref").mkdir()
    Image.open(CASES / "exif1.jpg").save(tmp_path / "ref" / "a.jpg")
    (tile,) = load_subjects(tmp_path / "list.json")
    assert tile.prompts == ("a striped tile on a shelf",)
    assert tile.references == tile.targets == (tmp_path / "ref" / "a.jpg",)


def test_captions_beside_pictures(tmp_path: Path) -> None:
    """Where prompts.txt is there too, it says what is asked."""
    place = tmp_path / "owl"
    shutil.copytree(CASES / "B20_kohya_caption", place)
    found = load_subjects(place)
    assert found[0].prompts == ("a photo of an owl on the grass", "a photo of an owl on the beach")
    assert "prompts.txt says what is asked, so the caption a.caption is not read" in found.notes[0]
    (place / "prompts.txt").unlink()
    found = load_subjects(place)
    assert found[0].prompts == ("owl",) and "b.png without a caption" in found.notes[0]
    assert texts(place) == ["owl"]
    (place / "b.txt").write_text("an owl, again\n")
    assert texts(place) == ["owl", "an owl, again"]
    (place / "b.txt").write_text("an owl\nand a cat\n")
    with pytest.raises(InputError, match=r"b\.txt holds 2 lines; the caption of a picture is one"):
        load_prompts(place)


def test_a_folder_without_captions(tmp_path: Path) -> None:
    shutil.copy(CASES / "rgba.png", tmp_path / "a.png")
    with pytest.raises(
        InputError, match=r"holds no captions: files beside its pictures.* \.caption or \.txt"
    ):
        load_prompts(tmp_path)


def test_junk_of_systems_is_passed_over_with_a_note(tmp_path: Path) -> None:
    for name in ("__MACOSX", "@eaDir"):
        (tmp_path / "all" / name).mkdir(parents=True)
    subject = subject_folder(tmp_path / "all" / "my_owl")
    for name in (".DS_Store", "Thumbs.db", "._a.png", "@eaDir"):
        (subject / name).write_bytes(b"\0") if name != "@eaDir" else (subject / name).mkdir()
    found = load_subjects(tmp_path / "all")
    assert [one.name for one in found] == ["my_owl"] and len(found[0].references) == 1
    first, second = found.notes
    assert first.endswith("all: passed over what systems leave there: @eaDir, __MACOSX")
    assert second.endswith(
        "my_owl: passed over what systems leave there: .DS_Store, ._a.png, @eaDir, Thumbs.db"
    )
    assert subject_prompts(found).notes == found.notes


def test_folders_whose_names_are_not_utf8(tmp_path: Path) -> None:
    place = subject_folder(tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"my_\xf6wl"))
    for source in (place, place.parent):
        found = load_subjects(source)
        assert found[0].name == "my_\\xf6wl"
        assert checksum(subject_prompts(found))
    assert texts(place / "prompts.txt") == ["an owl in the snow"]
    assert class_word(str(place.parent), found[0].name) == class_word(str(place), found[0].name) == "owl"


# --- pictures --------------------------------------------------------------------------------------------------------

SRGB = ((0.4360, 0.3851, 0.1431), (0.2225, 0.7169, 0.0606), (0.0139, 0.0971, 0.7141))
"""Colorants to XYZ under D50, as in the sRGB profile."""
PROFILES = {
    "icc_p3.png": ((0.5151, 0.2920, 0.1571), (0.2412, 0.6922, 0.0666), (-0.0011, 0.0419, 0.7841)),
    "icc_adobe98like.png": ((0.6097, 0.2053, 0.1492), (0.3111, 0.6257, 0.0632), (0.0195, 0.0609, 0.7446)),
}
"""Those of the profiles in the files; both have the curve of sRGB."""


def linear(levels: np.ndarray) -> np.ndarray:
    x = levels / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded(x: np.ndarray) -> np.ndarray:
    x = x.clip(0, 1)
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", PROFILES)
def test_colour_profiles_are_applied(name: str) -> None:
    given = np.asarray(Image.open(CASES / name), dtype=np.float64)
    found = np.asarray(read_picture(CASES / name), dtype=np.float64)
    expected = encoded(linear(given) @ np.array(PROFILES[name]).T @ np.linalg.inv(np.array(SRGB)).T)
    assert np.abs(found - expected).max() <= 2  # of 255: colorants of 16 bits, and two roundings to levels
    assert np.abs(found - given).max() > 10


def test_profiles_of_other_modes(tmp_path: Path) -> None:
    """An sRGB profile changes nothing; transparency and grey stay; a profile of another colour space is refused."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colours = Image.open(CASES / "icc_p3.png")
    p3 = colours.info["icc_profile"]
    path = tmp_path / "a.png"
    colours.save(path, icc_profile=srgb)
    assert np.array_equal(np.asarray(read_picture(path)), np.asarray(colours))
    half = colours.convert("RGBA")
    half.putalpha(128)
    half.save(path, icc_profile=p3)
    shown = np.asarray(read_picture(CASES / "icc_p3.png"), dtype=np.float64)
    assert np.abs(np.asarray(read_picture(path)) - (255 + (shown - 255) * 128 / 255)).max() <= 1
    colours.convert("L").save(path, icc_profile=p3)
    grey = np.asarray(read_picture(path), dtype=np.float64)
    assert np.abs(grey - np.asarray(colours.convert("L"))[..., None]).max() <= 1
    colours.quantize().save(path, icc_profile=p3)
    assert np.abs(np.asarray(read_picture(path)) - shown).max() <= 1
    colours.convert("CMYK").save(tmp_path / "a.jpg", icc_profile=p3)
    with pytest.raises(
        InputError, match="profile that cannot be applied: it is one for RGB, and the picture is CMYK"
    ):
        read_picture(tmp_path / "a.jpg")
    colours.save(path, icc_profile=b"no profile")
    with pytest.raises(InputError, match="colour profile that cannot be applied"):
        read_picture(path)


def test_sixteen_bits_a_channel_are_refused() -> None:
    """docs/data.md: more than 8 bits a channel is an error; PIL would cut RGB of 16 bits in silence."""
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        read_picture(CASES / "B12_rgb16.png")


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}
"""What a viewer does with a picture of an EXIF orientation; 0, 1 and 9 mean nothing."""


@pytest.mark.parametrize("number", range(10))
def test_turned_pictures(number: int) -> None:
    path = CASES / f"exif{number}.jpg"
    stored = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(np.asarray(read_picture(path)), TURNS.get(number, lambda x: x)(stored))


def test_turned_pictures_of_other_formats() -> None:
    """The same picture in four formats; JPEG changes its flat colours by a few levels."""
    turned = np.asarray(read_picture(CASES / "exif6.png"), dtype=np.float64)
    corners = [turned[y, x] for y in (2, -3) for x in (2, -3)]
    for name in ("exif6.tif", "exif6.webp", "exif6.jpg"):
        other = np.asarray(read_picture(CASES / name), dtype=np.float64)
        assert other.shape == turned.shape
        found = [other[y, x] for y in (2, -3) for x in (2, -3)]
        assert np.abs(np.array(found) - np.array(corners)).max() <= 8, name


def test_transparent_pictures() -> None:
    for name in ("rgba.png", "palette_trns.png"):
        shown = Image.open(CASES / name).convert("RGBA")
        alpha = np.asarray(shown, dtype=np.float64)[..., 3:] / 255
        expected = np.asarray(shown, dtype=np.float64)[..., :3] * alpha + 255 * (1 - alpha)
        assert (alpha < 1).any() and np.abs(np.asarray(read_picture(CASES / name)) - expected).max() <= 1
