"""Subjects from every source, and what can be wrong with them."""

import json
import struct
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixrl.data.pictures import LARGEST, list_pictures, read_picture, read_pictures, to_tensors
from pixrl.data.subject_prompts import subject_prompts
from pixrl.data.subjects import Subject, load_subjects
from pixrl.errors import InputError
from pixrl.runs.data import checksum
from pixrl.toy.language import parse
from pixrl.toy.random_scenes import held_out_subjects, subject_scene
from pixrl.toy.scene import SIDE, render
from pixrl.toy.vocabulary import KINDS

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data"
TURNED = 6
"""EXIF orientation of a camera turned by a quarter."""


def picture(path: Path, size: tuple[int, int] = (40, 48), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def make_subject(folder: Path, word: str = "dog", prompts: str = "a dog in the snow\na red Dog\n") -> Path:
    picture(folder / "b.png")
    picture(folder / "a.jpg", (64, 32))
    (folder / "class.txt").write_text(f"{word}\n")
    (folder / "prompts.txt").write_text(prompts)
    return folder


# --- masks -----------------------------------------------------------------------------------------------------------


def mask(file: Path, size: tuple[int, int] = (40, 48), mode: str = "L") -> Path:
    """White, or opaque, on the left half."""
    levels = Image.new("L", size, 0)
    levels.paste(255, (0, 0, size[0] // 2, size[1]))
    image = Image.new("RGB", size, "blue")
    if mode == "A":
        image.putalpha(levels)
    (image if mode == "A" else levels).save(file)
    return file


@pytest.mark.parametrize("mode", ["L", "A"])
def test_masks_of_ones_own_go_with_their_pictures(mode: str, tmp_path: Path) -> None:
    folder = make_subject(tmp_path / "dog")
    mask(folder / "b.mask.png", mode=mode)
    subjects = load_subjects(folder)
    assert [one.name for one in subjects[0].references if isinstance(one, Path)] == ["a.jpg", "b.png"]
    metadata = subject_prompts(subjects)[0].metadata
    first, second = metadata["mask"]
    assert first is None and second.shape == (3, 48, 40) == metadata["reference"][1].shape
    assert second[:, :, :20].eq(1).all() and second[:, :, 20:].eq(0).all()
    before = checksum(subject_prompts(subjects))
    (folder / "b.mask.png").unlink()
    without = subject_prompts(load_subjects(folder))
    assert "mask" not in without[0].metadata and checksum(without) != before


def test_a_mask_of_a_large_picture_is_reduced_with_it(tmp_path: Path) -> None:
    folder = make_subject(tmp_path / "dog")
    size = (LARGEST + 500, 900)
    picture(folder / "c.png", size)
    mask(folder / "c.mask.png", size)
    metadata = subject_prompts(load_subjects(folder))[0].metadata
    assert metadata["mask"][2].shape == metadata["reference"][2].shape


@pytest.mark.parametrize(
    ("name", "size", "colour", "said"),
    [
        ("b.mask.png", (48, 40), None, "is 48x40, and its picture b.png is 40x48"),
        ("b.mask.png", (40, 48), "black", "is black everywhere"),
        ("b.mask.png", (40, 48), "white", "is white everywhere"),
        ("c.mask.png", (40, 48), None, "is a mask without a picture: it belongs to c.jpg or .png"),
    ],
)
def test_masks_that_fit_no_picture(
    name: str, size: tuple[int, int], colour: str | None, said: str, tmp_path: Path
) -> None:
    folder = make_subject(tmp_path / "dog")
    if colour is None:
        mask(folder / name, size)
    else:
        picture(folder / name, size, colour)
    with pytest.raises(InputError, match=said):
        load_subjects(folder)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_camera_that_was_turned(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 40), "blue")
    image.paste("red", (0, 0, 32, 40))
    exif = Image.Exif()
    exif[0x0112] = TURNED
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    shown = read_picture(tmp_path / "turned.jpg")
    assert shown.size == (40, 64)
    assert shown.getpixel((20, 5))[0] > 200  # what was left is on top
    assert shown.getpixel((20, 60))[2] > 200


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 20, 40))
    image.putpixel((30, 0), (0, 0, 0, 128))
    image.save(tmp_path / "alpha.png")
    shown = read_picture(tmp_path / "alpha.png")
    assert shown.mode == "RGB"
    assert [shown.getpixel(at) for at in ((5, 5), (35, 5))] == [(255, 255, 255), (255, 0, 0)]
    assert shown.getpixel((30, 0))[0] == pytest.approx(127, abs=1)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("grey.tiff" if mode == "CMYK" else "grey.png")
    Image.new("RGB", (40, 40), (255, 255, 255)).convert(mode).save(path)
    shown = read_picture(path)
    assert (shown.mode, shown.getpixel((3, 3))) == ("RGB", (255, 255, 255))


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 20, 40))
    image.save(tmp_path / "palette.png", transparency=0)
    shown = read_picture(tmp_path / "palette.png")
    assert [shown.getpixel(at) for at in ((5, 5), (35, 5))] == [(255, 0, 0), (255, 255, 255)]


def test_unreadable_pictures(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.png"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a picture"):
            read_picture(tmp_path / name)
    with pytest.raises(InputError, match="There is no picture"):
        read_picture(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="cannot be read"):
        read_picture(tmp_path)


def test_a_bomb_is_not_opened(tmp_path: Path) -> None:
    path = picture(tmp_path / "bomb.bmp")
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<ii", 100_000, 100_000)
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="exceeds limit"):
        read_picture(path)


def test_deep_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        read_picture(tmp_path / "deep.png")


@pytest.mark.parametrize(("size", "good"), [((32, 32), True), ((31, 200), False), ((200, 31), False)])
def test_tiny_pictures_are_refused(size: tuple[int, int], good: bool, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", size)
    if good:
        assert read_picture(path).size == size
    else:
        with pytest.raises(InputError, match=f"is {size[0]}x{size[1]}; the shorter side must be at least 32"):
            read_picture(path)


def test_listing_pictures(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", ".hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_pictures(tmp_path)] == ["a.jpeg", "b.PNG"]
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(InputError, match=r"IMG_1\.HEIC is not read .* Save it as PNG or JPEG"):
        list_pictures(tmp_path)


@pytest.mark.parametrize("name", ["b.jp2", "c.jxl", "d.arw", "e.mp4", "photo", "prompts.bak"])
def test_a_file_that_is_neither_picture_nor_note_is_refused(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(b"x")
    ending = Path(name).suffix or "no ending"
    with pytest.raises(
        InputError, match=rf"{name} is not read \({ending}\).*if it is no picture, move it out"
    ):
        list_pictures(tmp_path)


def test_notes_and_what_systems_leave_are_passed_over(tmp_path: Path) -> None:
    for name in ("class.txt", "notes.md", "about.json", "Thumbs.db", "desktop.ini", "LICENSE", "._a.jxl"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("c.jfif", "b.JPE"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / name, format="JPEG")
    assert [path.name for path in list_pictures(tmp_path)] == ["b.JPE", "c.jfif"]
    assert [image.size for image in read_pictures(tmp_path)] == [(40, 40)] * 2


@pytest.mark.parametrize("target", ["nowhere.png", "l.png"])
def test_a_link_that_leads_nowhere_is_refused(target: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "k.png").symlink_to("a.png")
    assert [path.name for path in list_pictures(tmp_path)] == ["a.png", "k.png"]
    (tmp_path / "l.png").symlink_to(target)
    with pytest.raises(InputError, match=rf"l\.png is a link to {target}, which is not there"):
        list_pictures(tmp_path)


@pytest.mark.parametrize(("size", "good"), [((320, 40), True), ((321, 40), False), ((40, 20000), False)])
def test_strips_are_refused(size: tuple[int, int], good: bool, tmp_path: Path) -> None:
    path = picture(tmp_path / "strip.png", size)
    if good:
        assert read_picture(path).size == size
    else:
        with pytest.raises(InputError, match=f"{size[0]}x{size[1]}; the longer side may be at most 8 times"):
            read_picture(path)


def animated(path: Path, kind: str) -> Path:
    """Two frames."""
    first, second = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    first.save(path, format=kind, save_all=True, append_images=[second])
    return path


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.tiff"])
def test_several_frames_are_refused_in_folders_and_lists(name: str, tmp_path: Path) -> None:
    folder = make_subject(tmp_path / "rex")
    animated(folder / name, name[2:].upper())
    listed = write_list(tmp_path, [{"prompt": "a dog", "image_paths": [f"rex/{name}"]}])
    for source in (folder, listed):
        with pytest.raises(InputError, match=f"{name} holds several pictures.*Save the one that is meant"):
            load_subjects(source)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_a_gif_is_refused_under_any_name(name: str, frames: int, tmp_path: Path) -> None:
    if frames == 1:
        Image.new("RGB", (40, 40)).save(tmp_path / name, format="GIF")
    else:
        animated(tmp_path / name, "GIF")
    with pytest.raises(InputError, match=f"{name} is a GIF file inside.*Save it as PNG or JPEG"):
        load_subjects(write_list(tmp_path, [{"prompt": "a dog", "image_paths": [name]}]))


def test_a_phones_picture_with_a_preview_behind_it_is_read(tmp_path: Path) -> None:
    shown = read_picture(animated(tmp_path / "a.jpg", "MPO"))
    assert shown.getpixel((5, 5))[0] > 200  # the first one


def test_tensors_keep_their_sizes() -> None:
    tensors = to_tensors([Image.new("RGB", (4, 6), (255, 0, 51)), Image.new("L", (3, 2), 255)])
    assert [list(t.shape) for t in tensors] == [[3, 6, 4], [3, 2, 3]]
    assert tensors[0][:, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert tensors[0].dtype is torch.float32


# --- folders ---------------------------------------------------------------------------------------------------------


def test_one_folder(tmp_path: Path) -> None:
    (subject,) = load_subjects(make_subject(tmp_path / "rex"))
    assert (subject.name, subject.word, subject.prompts) == ("rex", "dog", ("a dog in the snow", "a red Dog"))
    assert [one.size for one in subject.pictures()] == [(64, 32), (40, 48)]
    assert [list(one.shape) for one in subject.tensors()] == [[3, 32, 64], [3, 48, 40]]
    assert load_subjects(tmp_path / "rex", split="evaluation").subjects == (subject,)


def test_a_folder_of_folders(tmp_path: Path) -> None:
    make_subject(tmp_path / "rex")
    make_subject(tmp_path / "tom", "stuffed animal", "two Stuffed Animals at night")
    (tmp_path / ".git").mkdir()
    subjects = load_subjects(tmp_path)
    assert [s.name for s in subjects] == ["rex", "tom"]
    assert len(subjects) == 2
    assert subjects[1].word == "stuffed animal"


def test_files_beside_the_folders_do_not_matter(tmp_path: Path) -> None:
    make_subject(tmp_path / "rex")
    (tmp_path / "photos.zip").write_bytes(b"x")
    assert [s.name for s in load_subjects(tmp_path)] == ["rex"]
    picture(tmp_path / "a.png")  # now it looks like a subject itself
    with pytest.raises(InputError, match=r"has no class\.txt"):
        load_subjects(tmp_path)


@pytest.mark.parametrize(
    ("word", "prompt", "good"),
    [
        (
            unicodedata.normalize("NFC", "Hündchen"),
            unicodedata.normalize("NFD", "ein Hündchen im Schnee"),
            True,
        ),
        (
            unicodedata.normalize("NFD", "Hündchen"),
            unicodedata.normalize("NFC", "ein Hündchen im Schnee"),
            True,
        ),
        ("stuffed animal", "a stuffed  animal in snow", True),
        ("stuffed animal", "a stuffed\u00a0animal in snow", True),
        ("犬", "雪の中の犬の写真", True),
        ("犬", "雪の中の猫の写真", False),
        ("dog", "a hotdog", False),
    ],
)
def test_how_a_prompt_may_name_its_class(word: str, prompt: str, good: bool, tmp_path: Path) -> None:
    folder = make_subject(tmp_path / "rex", word, prompt)
    if good:
        assert load_subjects(folder)[0].prompts == (prompt,)
    else:
        with pytest.raises(InputError, match="does not name its class"):
            load_subjects(folder)


def remove_pictures(folder: Path) -> None:
    for name in ("a.jpg", "b.png"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_pictures, "'rex' has no reference picture"),
        (lambda f: (f / "class.txt").unlink(), r"has no class\.txt with its class word"),
        (lambda f: (f / "class.txt").write_text(" \n"), r"class\.txt is empty\. Write what the subject is"),
        (lambda f: (f / "prompts.txt").unlink(), r"has no prompts\.txt with its prompts"),
        (lambda f: (f / "prompts.txt").write_text(""), "holds no prompts"),
        (lambda f: (f / "prompts.txt").write_bytes(b"a dog\na dog \xe9"), r"byte 12 \(0xe9\), in line 2"),
        (
            lambda f: (f / "prompts.txt").write_text("a dog\na hotdog"),
            r"Prompt 2 of the subject 'rex' does not name its class 'dog': 'a hotdog'.*mend \S+class\.txt",
        ),
        (lambda f: picture(f / "c.png", (10, 10)), "c.png is 10x10"),
        (lambda f: (f / "c.png").write_bytes(b"x"), "c.png cannot be read as a picture"),
        (lambda f: (f / "c.heic").write_bytes(b"x"), "c.heic is not read"),
    ],
)
def test_bad_folders(spoil: object, message: str, tmp_path: Path) -> None:
    folder = make_subject(tmp_path / "rex")
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_subjects(folder)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither a folder nor a \.json list .* toy:subjects"):
        load_subjects(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"'subject'\. Did you mean 'subjects'\?"):
        load_subjects("toy:subject")
    with pytest.raises(InputError, match="Unknown split"):
        load_subjects("toy:subjects", split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no class\.txt"):
        load_subjects(tmp_path / "empty")


def test_toy_subjects_of_the_two_splits_share_no_name() -> None:
    training, held_out = (
        {subject.name for subject in load_subjects("toy:subjects", split=split).subjects}
        for split in ("train", "evaluation")
    )
    assert (len(training), len(held_out)) == (64, 32)
    assert not training & held_out


# --- DreamBench and UNO ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """google/dreambooth with its published text file and made-up pictures."""
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published lists are not in {PUBLISHED}")
    dataset = tmp_path / "dreambooth" / "dataset"
    dataset.mkdir(parents=True)
    text = (PUBLISHED / "dreambench_prompts_and_classes.txt").read_text()
    (dataset / "prompts_and_classes.txt").write_text(text)
    known = json.loads((PUBLISHED / "dreambench.json").read_text())
    for entry in known["subjects"]:
        for name in {"00.jpg", entry["uno_reference"]}:
            picture(dataset / entry["name"] / name)
    return tmp_path


def test_dreambench(checkout: Path) -> None:
    subjects = load_subjects(checkout / "dreambooth")
    assert load_subjects(checkout / "dreambooth" / "dataset").subjects == subjects.subjects
    known = json.loads((PUBLISHED / "dreambench.json").read_text())
    assert [(s.name, s.word) for s in subjects] == [(k["name"], k["class"]) for k in known["subjects"]]
    for subject, entry in zip(subjects, known["subjects"], strict=True):
        templates = known["live_prompts" if entry["live"] else "object_prompts"]
        assert subject.word is not None
        assert list(subject.prompts) == [
            t.replace("{0} ", "").replace("{1}", subject.word) for t in templates
        ]
    assert sum(len(s.prompts) for s in subjects) == 750


def test_unos_list_asks_the_same_of_dreambench(checkout: Path) -> None:
    listed = checkout / "list.json"
    listed.write_text((PUBLISHED / "uno_dreambench_singleip.json").read_text())
    theirs, ours = load_subjects(listed), load_subjects(checkout / "dreambooth")
    assert {s.name: s.prompts for s in theirs} == {s.name: s.prompts for s in ours}
    assert all(len(s.references) == 1 and s.word is None for s in theirs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("subject_name,class", "", "no line 'subject_name,class'"),
        ("backpack,backpack", "backpack", "line 4: 'backpack' is not 'name,class'"),
        ("backpack,backpack\n", "backpack,backpack\nnobody,dog\n", "lists 'nobody', but there is no folder"),
        ("Object Prompts", "Objects", "no section 'Object Prompts'"),
        (".format(", "%(", "no prompts under 'Object Prompts'"),
        ("subject_name,class\n", "subject_name,class\n\n", "lists no subject"),
        (
            "in the jungle",
            "in {the} jungle",
            r"line 40: 'a \{0} \{1} in \{the} jungle' has braces other than",
        ),
        (
            "a {0} {1} in the jungle",
            "a {0}, {1} in the jungle",
            r"line 40: .*Write it like 'a \{0} \{1} in the",
        ),
        ("in the jungle", "in the { jungle", "line 40: .* has braces"),
        ("dog2,dog", "dog,cat", r"line \d+ calls 'dog' 'cat', and a line before 'dog'"),
    ],
)
def test_bad_dreambench_files(old: str, new: str, message: str, checkout: Path) -> None:
    file = checkout / "dreambooth" / "dataset" / "prompts_and_classes.txt"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        load_subjects(checkout / "dreambooth")


def test_one_subject_of_a_checkout_is_pointed_to_the_checkout(checkout: Path) -> None:
    dataset = checkout / "dreambooth" / "dataset"
    (dataset / "dog" / "more").mkdir()
    for folder in (dataset / "dog", dataset / "dog" / "more"):
        with pytest.raises(InputError, match=rf"has no class\.txt .*for all its subjects, give {dataset}$"):
            load_subjects(folder)


def test_a_dreambench_subject_without_pictures(checkout: Path) -> None:
    for file in (checkout / "dreambooth" / "dataset" / "vase").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="'vase' has no reference picture"):
        load_subjects(checkout / "dreambooth")


def write_list(folder: Path, entries: object) -> Path:
    path = folder / "list.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def test_uno_lists_with_several_references(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "0.png")
    picture(tmp_path / "hat.png")
    both = ["./cat/0.png", "hat.png"]
    entries = [{"prompt": "a cat with a hat", "image_paths": both, "image_tgt_path": "x.png"}]
    entries += [{"prompt": "a cat", "image_paths": both[:1]}, {"prompt": "two", "image_paths": both}]
    first, second = load_subjects(write_list(tmp_path, entries))
    assert (first.name, first.prompts, len(first.references)) == ("cat+hat", ("a cat with a hat", "two"), 2)
    assert (second.name, second.prompts) == ("cat", ("a cat",))


def test_uno_names_are_all_different(tmp_path: Path) -> None:
    lists = [["dog/0.png"], ["dog/1.png"], ["x/dog/1.png"], ["dog-1/0.png"], ["y/dog-1/1.png"]]
    for path in (one for paths in lists for one in paths):
        picture(tmp_path / path)
    entries = [{"prompt": "a dog", "image_paths": paths} for paths in lists]
    names = [subject.name for subject in load_subjects(write_list(tmp_path, entries))]
    assert names == ["dog-0", "dog-1", "dog-1-2", "dog-1-0", "dog-1-1"]
    more = [["a/p-2/0.png"], ["p/2-2.png"], ["q/p/2.png"], ["r/p/2.png"]]
    for path in (one for paths in more for one in paths):
        picture(tmp_path / path)
    entries = [{"prompt": "a dog", "image_paths": paths} for paths in more]
    names = [subject.name for subject in load_subjects(write_list(tmp_path, entries))]
    assert len(set(names)) == 4, names


def test_repeats_in_uno_lists_are_noted(tmp_path: Path) -> None:
    """The same prompt of the same pictures; with another target it is another row."""
    for name in ("a.png", "t.png"):
        picture(tmp_path / name)
    owl = {"prompt": "an owl", "image_paths": ["a.png"]}
    found = load_subjects(write_list(tmp_path, [owl, owl, {**owl, "image_tgt_path": "t.png"}]))
    assert found[0].prompts == ("an owl", "an owl")
    assert found[0].targets == (None, tmp_path / "t.png")
    assert "1 of 3 rows" in found.notes[0] and "entry 2 repeats entry 1: 'an owl'" in found.notes[0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{]", "line 1 is not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ({}, "must hold a list"),
        ([], "must hold a list"),
        (["a"], "entry 1 is 'a'"),
        ([{"image_paths": ["a.png"]}], "entry 1 has no prompt"),
        ([{"prompt": " ", "image_paths": ["a.png"]}], "entry 1 has no prompt"),
        ([{"prompt": "a"}], "entry 1 has no reference: image_paths is None"),
        ([{"prompt": "a", "image_paths": []}], r"has no reference: image_paths is \[\]"),
        ([{"prompt": "a", "image_paths": "a.png"}], "has no reference"),
        ([{"prompt": "a", "image_paths": ["nowhere.png"]}], "There is no picture"),
        (
            [{"prompt": "a", "image_paths": ["a.png"], "image_path": "a.png"}],
            "has both image_path and image_paths",
        ),
        ([{"prompt": "a", "image_path": 3}], r"has no reference: image_paths is \[3\]"),
    ],
)
def test_bad_uno_lists(entries: object, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        load_subjects(write_list(tmp_path, entries))


# --- the toy world ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> dict[str, list[Subject]]:
    return {split: list(load_subjects("toy:subjects", split=split)) for split in ("train", "evaluation")}


def test_the_held_out_subjects(toy: dict[str, list[Subject]]) -> None:
    held_out = toy["evaluation"]
    assert [s.word for s in held_out] == [s.kind for s in held_out_subjects()]
    assert len({s.name for s in held_out}) == 32
    assert all(len(s.references) == 4 for s in held_out)
    assert all(one.size == (SIDE, SIDE) for s in held_out for one in s.pictures())


def test_training_subjects_are_others(toy: dict[str, list[Subject]]) -> None:
    assert len(toy["train"]) == 64
    shown = {one.tobytes() for s in toy["evaluation"] for one in s.pictures()}
    assert not shown & {one.tobytes() for s in toy["train"] for one in s.pictures()}
    assert len(Counter(s.word for s in toy["train"])) > 15


def test_toy_prompts_name_the_class_and_what_it_lacks(toy: dict[str, list[Subject]]) -> None:
    for subject, known in zip(toy["evaluation"], held_out_subjects(), strict=True):
        assert len(subject.prompts) == len(set(subject.prompts)) == (23 if known.accessory else 29)
        for prompt in subject.prompts:
            read = parse(prompt)
            assert read.metadata["include"] == [{"class": known.kind, "count": 1}]
            assert known.accessory not in read.accessories
            assert read.accessories or read.background
    assert {s.word for s in toy["evaluation"]} == set(KINDS)


def test_toy_subjects_are_the_same_each_time(toy: dict[str, list[Subject]]) -> None:
    again = load_subjects("toy:subjects", split="evaluation")
    assert [one.tobytes() for s in again for one in s.pictures()] == [
        one.tobytes() for s in toy["evaluation"] for one in s.pictures()
    ]
    rng = np.random.default_rng((71, 3, 1, 0))
    drawn = render(subject_scene(held_out_subjects()[0], rng, added_accessory=0.0))
    assert again[0].pictures()[0].tobytes() == drawn.tobytes()


def test_loading_subjects_loads_no_torch(tmp_path: Path) -> None:
    make_subject(tmp_path / "rex")
    code = (
        f"import sys; from pixrl.data.subjects import load_subjects; load_subjects({str(tmp_path)!r});"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
