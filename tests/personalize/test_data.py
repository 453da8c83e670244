"""Prompts x subjects: what a prompt carries, targets, numbers of references."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pixrl import rewards
from pixrl.data.pictures import PictureStore, to_tensors
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.data.subject_prompts import subject_prompts
from pixrl.data.subjects import Subject, SubjectSet, check_targets, load_subjects
from pixrl.errors import ConfigError, InputError
from pixrl.rewards.references import of_subject
from pixrl.runs.config import PersonalizeConfig
from pixrl.runs.data import PromptSampler
from pixrl.runs.loaded import LoadedRun, check_references
from pixrl.toy.language import parse
from pixrl.types import RewardBatch
from tests import tiny_dino
from tests.personalize.conftest import make_subject
from tests.tolerance import MODEL, rounding


def test_every_prompt_of_every_subject(subjects: Path) -> None:
    found = subject_prompts(load_subjects(subjects), count=1)
    assert [prompt.text for prompt in found][:4] == [
        "a dog in snow",
        "a red dog",
        "an old dog",
        "a cat in snow",
    ]
    about = found[3].metadata
    assert (about["subject"], about["class"]) == ("tom", "cat")
    shown, reference = about["shown"], about["reference"]
    assert isinstance(shown, list) and isinstance(reference, list)
    assert [tuple(one.shape) for one in reference] == [(3, 40, 48), (3, 48, 48)]
    assert len(shown) == 1 and torch.equal(shown[0], reference[0])
    entry = {"include", "exclude"}
    assert "target" not in about and set(about) == {"subject", "class", "shown", "reference"} | entry
    assert about["include"] == [{"class": "cat", "count": 1}]
    assert about["exclude"] == [{"class": "cat", "count": 2}]
    assert about.get("tag") is None
    assert dict(about).keys() == set(about)


def test_pictures_are_read_once(subjects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixrl.data import pictures as module

    found = subject_prompts(load_subjects(subjects), count=2)
    reads: list[Path] = []
    real = module.read_picture
    monkeypatch.setattr(module, "read_picture", lambda path: reads.append(path) or real(path))
    for prompt in found:
        for key in ("shown", "reference"):
            assert prompt.metadata[key]
    assert len(reads) == len(set(reads)) == 4


def test_numbers_of_references(subjects: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    shutil.copytree(subjects, folder)
    make_subject(folder / "zoe", pictures=3, word="owl")
    loaded = load_subjects(folder)
    assert len(subject_prompts(loaded, count=2)) == 9
    with pytest.raises(InputError, match=r"'rex' has 2.*--set references\.count=2"):
        subject_prompts(loaded, count=3)
    with pytest.raises(InputError, match=r"rex: 2, zoe: 3.*--set references\.count=2"):
        subject_prompts(loaded, count=None)


def test_toy_targets_show_what_the_prompt_asks_for() -> None:
    loaded = load_subjects("toy:subjects")
    subject = loaded[0]
    assert len(subject.targets) == len(subject.prompts)
    prompts = subject_prompts(loaded, count=1)
    first, last = prompts[0], prompts[len(subject.prompts) - 1]
    pictures = [first.metadata["target"], last.metadata["target"]]
    assert all(isinstance(one, Tensor) and one.shape == (3, 128, 128) for one in pictures)
    assert torch.equal(prompts[0].metadata["target"], pictures[0])  # type: ignore[arg-type]
    assert not torch.equal(*pictures)  # type: ignore[arg-type]
    assert parse(first.text).background is not None


def test_uno_subjects_of_one_folder_have_names_of_their_own(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "other/a.png"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "all" / name)
    paths = [["all/a.png"], ["all/b.png", "all/c.png"], ["all/a.png", "all/b.png"], ["all/other/a.png"]]
    entries = [{"prompt": f"a dog {place}", "image_paths": one} for place, one in enumerate(paths)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    found = load_subjects(str(tmp_path / "list.json"))
    assert [subject.name for subject in found] == ["all-a", "all-b+c", "all-a+b", "other"]
    for count in (None, 2):
        with pytest.raises(InputError, match=r"all-a.*references\.count=1"):
            subject_prompts(found, count=count)


def test_large_references_are_reduced_once(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "dog" / "0.png")
    Image.new("RGB", (1024, 200), "red").save(tmp_path / "dog" / "1.png")
    (tmp_path / "dog" / "class.txt").write_text("dog")
    (tmp_path / "dog" / "prompts.txt").write_text("a dog in snow\n")
    prompt = next(iter(subject_prompts(load_subjects(str(tmp_path / "dog")))))
    large, small = prompt.metadata["reference"]  # type: ignore[misc]
    assert (tuple(large.shape), tuple(small.shape)) == ((3, 512, 1024), (3, 200, 1024))
    assert prompt.metadata["reference"][0] is large  # type: ignore[index]


def test_small_references_are_kept_bit_for_bit(subjects: Path) -> None:
    loaded = load_subjects(subjects)
    (prompt, *_) = subject_prompts(loaded)
    expected = [
        torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in loaded[0].pictures()
    ]
    found = prompt.metadata["reference"]
    assert isinstance(found, list) and len(found) == 2
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_more_pictures_than_fit_as_floats_are_not_decoded_again() -> None:
    pictures = [Image.new("RGB", (40, 40), (k, 0, 0)) for k in range(4)]
    each = 3 * 40 * 40
    store, read = PictureStore(levels=4 * each, floats=2 * 4 * each), []

    def ask(number: int) -> Tensor:
        return store.get((number,), lambda: read.append(number) or pictures[number])  # type: ignore[func-returns-value]

    for _ in range(3):
        for number in range(4):
            assert torch.equal(ask(number), to_tensors([pictures[number]])[0])
    assert read == [0, 1, 2, 3]
    assert ask(3) is ask(3)
    assert [one._bytes for one in (store._floats, store._levels)] == [2 * 4 * each, 4 * each]


def test_numbers_of_references_are_counted_by_subject_not_by_name() -> None:
    red = Image.new("RGB", (40, 40), "red")
    both = SubjectSet("x", tuple(Subject("rex", "dog", ("a dog",), (red,) * n) for n in (1, 2)))
    with pytest.raises(InputError, match=r"rex: 1, rex: 2.*--set references\.count=1"):
        subject_prompts(both, count=None)
    with pytest.raises(InputError, match=r"references\.count is 2, but the subject 'rex' has 1"):
        subject_prompts(both, count=2)


class Strict:
    """Rewards in which one finds nothing in a red reference."""

    names = ("identity",)

    def reference_problems(self, metadata: Mapping[str, object]) -> dict[str, str]:
        return {"identity": "too red"} if self._red(metadata) else {}

    def unused_references(self, metadata: Mapping[str, object]) -> dict[str, list[int]]:
        return {"identity": [1]} if self._red(metadata) else {}

    def _red(self, metadata: Mapping[str, object]) -> bool:
        (one,) = metadata["reference"]  # type: ignore[misc]
        return bool(one[0].min() == 1)


def shop_of(train: PromptSet, evaluated: PromptSet, share: float) -> LoadedRun:
    """As much of a workshop as the check of references looks at."""
    config = PersonalizeConfig.model_validate(
        {"rewards": [{"name": "identity", "kind": "dino_seg"}], "scoring": {"max_failed_share": share}}
    )
    unused: Any = None
    sampler = PromptSampler(train, per_step=1, seed=0)
    rewards: Any = Strict()
    return LoadedRun(config, unused, unused, unused, sampler, evaluated, rewards, unused, unused)


def test_each_subject_is_inspected(tmp_path: Path) -> None:
    """All pictures in one folder, and one subject's name in two sources."""
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{"prompt": f"a dog {one}", "image_paths": [f"{name}.png"]} for one in range(2)])
        )
    entries = [{"prompt": "a dog", "image_paths": [f"{name}.png"]} for name in "abc"]
    (tmp_path / "all.json").write_text(json.dumps(entries))
    every, red, blue = (
        subject_prompts(load_subjects(tmp_path / f"{name}.json")) for name in ("all", "a", "b")
    )
    with pytest.raises(InputError, match="no picture of 1 of 3 subject"):
        check_references(shop_of(every, every, 0.3))
    (note,) = check_references(shop_of(every, every, 0.4))
    assert note.startswith("identity: 1 reference picture(s) of 1 subject(s)") and note.endswith("'a'")
    renamed = PromptSet(red.name, tuple(Prompt(one.text, {**one.metadata, "subject": "b"}) for one in red))
    for train, evaluated in ((renamed, blue), (blue, renamed)):
        with pytest.raises(InputError, match=r"no picture of 1 of 2 subject\(s\); 'b': too red"):
            check_references(shop_of(train, evaluated, 0.1))


def test_uno_lists_may_have_targets(tmp_path: Path) -> None:
    for name in ("ref", "wanted"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / f"{name}.png")
    entries = [
        {"prompt": "a dog in snow", "image_paths": ["ref.png"], "image_tgt_path": "wanted.png"},
        {"prompt": "a dog", "image_paths": ["ref.png"]},
    ]
    file = tmp_path / "list.json"
    file.write_text(json.dumps(entries))
    found = subject_prompts(load_subjects(file), count=1)
    assert isinstance(found[0].metadata["target"], Tensor)
    assert "target" not in found[1].metadata and "class" not in found[1].metadata
    entries[0]["image_tgt_path"] = 3  # type: ignore[assignment]
    file.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="image_tgt_path is 3"):
        load_subjects(file)
    entries[0]["image_tgt_path"] = "missing.png"
    file.write_text(json.dumps(entries))
    loaded = load_subjects(file)  # only supervised training needs targets
    with pytest.raises(InputError, match="no picture"):
        check_targets(loaded)
    entries[0]["image_tgt_path"] = "wanted.png"
    file.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"'a dog' of .* has none"):
        check_targets(load_subjects(file))
    check_targets(load_subjects("toy:subjects"))


TOGETHER = {"prompt": "a dog and a cat in snow", "image_paths": ["a.png", "b.png"], "classes": ["dog", "cat"]}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two pictures that a list shows together."""
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    return tmp_path / "list.json"


def test_several_subjects_in_one_picture(pair: Path) -> None:
    pair.write_text(json.dumps([TOGETHER]))
    (prompt,) = subject_prompts(load_subjects(pair), count=None)
    several, shown = prompt.metadata["subjects"], prompt.metadata["shown"]
    assert isinstance(several, list) and isinstance(shown, list)
    assert [one["class"] for one in several] == ["dog", "cat"]
    assert all(torch.equal(one["reference"], picture) for one, picture in zip(several, shown, strict=True))
    assert of_subject(prompt.metadata, 1)["class"] == "cat"
    assert of_subject(prompt.metadata, None) is prompt.metadata
    assert of_subject(prompt.metadata, 2) == of_subject({}, 0) == {}


def test_each_subject_is_judged_by_a_reward_of_its_own(pair: Path, tmp_path: Path) -> None:
    pair.write_text(json.dumps([TOGETHER]))
    (prompt,) = subject_prompts(load_subjects(pair), count=None)
    images = torch.stack([torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])])[:, :, None, None].expand(
        -1, -1, 40, 40
    )
    batch = RewardBatch(images, [prompt.text] * 2, [prompt.metadata] * 2)
    model = tiny_dino.dino(tmp_path / "dino")
    for subject, match in ((0, 0), (1, 1)):
        reward = rewards.load("dino_seg", model=str(model), mask="none", subject=subject)
        assert reward.score(batch).values_B[match] == pytest.approx(1, abs=rounding(torch.float32, MODEL))
        assert reward.score(batch).values_B[1 - match] < 1 - 2 * rounding(torch.float32, MODEL)
    missing = rewards.load("dino_seg", model=str(model), mask="none", subject=2).score(batch)
    assert missing.values_B.isnan().all() and "number 2" in str(missing.reasons[0])
    with pytest.raises(ConfigError, match="counts from 0"):
        rewards.load("dino_seg", model=str(model), mask="none", subject=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["dog"]}, "2 pictures and 1 classes"),
        ({"classes": "dog"}, "write it like"),
        (
            {"classes": ["dog", "owl"]},
            r"does not name its class 'owl'(.|\n)*mend the entry's classes in \S+\.json",
        ),
    ],
)
def test_classes_of_a_list(pair: Path, change: dict[str, object], message: str) -> None:
    pair.write_text(json.dumps([TOGETHER | change]))
    with pytest.raises(InputError, match=message):
        load_subjects(pair)
    pair.write_text(json.dumps([TOGETHER, TOGETHER | {"prompt": "a dog", "classes": []}]))
    with pytest.raises(InputError, match="Give the same everywhere"):
        load_subjects(pair)
