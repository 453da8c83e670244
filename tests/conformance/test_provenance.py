"""Every score says what it depends on: id with checksum, revision and licence of each checkpoint, and sees another."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny, tiny_blip, tiny_flant5
from tests.conformance.test_table import REWARDS, SERVED, batch_of, options_of
from tests.rewards.services import TOKEN, service_for

from pixrl import rewards
from pixrl.rewards.clip import FusionScorer
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.segmentation import Foreground
from pixrl.rewards.weights import describe_function, part

CHECKSUM = re.compile(r".+ \([0-9a-f]{16}\)")
PARTS: dict[str, dict[str, str]] = {
    "aesthetic": {"model": "model", "head": "head"},
    "clip_image": {"model": "model", "segmenter": "segmenter"},
    "dino_seg": {"model": "model", "segmenter": "segmenter"},
    "geneval": {"model": "segmenter", "color_clip": "clip"},
    "hpsv2": {"model": "model", "processor": "processor"},
    "hpsv3": {"model": "model", "processor": "processor"},
    "image_reward": {"model": "model", "tokenizer": "tokenizer"},
    "ocr": {"model": "model", "detector": "detector"},
    "preference": {"model": "model", "processor": "processor"},
    "python": {"model": "function"},
    "vqascore": {"model": "model", "tokenizer": "tokenizer", "vision": "vision"},
}
"""Reward -> part in its provenance -> option that says where the part is; other rewards have their model alone."""
EVERY_PART = [(name, key) for name in REWARDS for key in PARTS.get(name, {"model": "model"})]


def all_options(name: str, folder: Path) -> dict[str, object]:
    """A reward's options, with every part that it can have."""
    options = options_of(name, folder)
    if name == "clip_image":
        options["segmenter"] = tiny.segmenter(folder / "segmenter")
    if name == "preference":
        options["processor"] = tiny.clip(folder / "processor")
    if name == "vqascore":
        options["vision"] = tiny_flant5.vision_tower(folder / "tower")
        options["model"] = tiny_flant5.flant5(folder / "without_tower", folder / "tower", with_tower=False)
        options["tokenizer"] = tiny_flant5.tokenizer(folder / "t5")
    if name == "image_reward":
        options["tokenizer"] = tiny_blip.vocabulary(folder / "bert")
    return options


def provenance_of(name: str, options: dict[str, object]) -> dict[str, str]:
    return dict(rewards.load(name, **options).score(batch_of(name)).provenance)


@pytest.mark.parametrize("name", REWARDS)
def test_id_checksum_revision_and_licence_of_every_part(name: str, tmp_path: Path) -> None:
    found = provenance_of(name, all_options(name, tmp_path))
    for key in PARTS.get(name, {"model": "model"}):
        prefix = "" if key == "model" else f"{key}_"
        assert CHECKSUM.fullmatch(found[key]), found[key]
        assert found[f"{prefix}revision"] == "local"
        assert found[f"{prefix}licence"]
    assert all(found.values())


@pytest.mark.parametrize(("name", "key"), EVERY_PART)
def test_another_part_is_seen_and_named(name: str, key: str, tmp_path: Path) -> None:
    options = all_options(name, tmp_path)
    before = provenance_of(name, options)
    option = PARTS.get(name, {"model": "model"})[key]
    change(Path(str(options[option]).removesuffix(":brightness")), words=key in ("processor", "tokenizer"))
    after = provenance_of(name, options)
    assert {entry for entry in before | after if before.get(entry) != after.get(entry)} == {key}


def change(place: Path, *, words: bool) -> None:
    """Other weights, another vocabulary or another function, of the same form."""
    if words:
        for name in ("vocab.txt", "config.json", "tokenizer_config.json"):
            if (place / name).is_file():
                with (place / name).open("a") as file:
                    file.write("zzz\n" if name == "vocab.txt" else "\n")
        return
    for file in [place] if place.is_file() else sorted(place.iterdir()):
        CHANGES.get(file.suffix, lambda file: None)(file)


def moved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the scale, which `preference` writes out."""
    kept = {key: x for key, x in weights.items() if not x.is_floating_point() or key == "logit_scale"}
    return {key: x + 0.01 for key, x in weights.items()} | kept


def change_safetensors(file: Path) -> None:
    save_file(moved(load_file(file)), file, metadata={"format": "pt"})


def change_pickle(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    wrapped = "state_dict" in content
    torch.save({"state_dict": moved(content["state_dict"])} if wrapped else moved(content), file)


CHANGES: dict[str, Callable[[Path], None]] = {
    ".safetensors": change_safetensors,
    ".pt": change_pickle,
    ".pth": change_pickle,
    ".bin": change_pickle,
    ".py": lambda file: file.write_text(f"{file.read_text()}# changed\n") and None,
}


def test_the_fusion_scorer_describes_both_its_models(tmp_path: Path) -> None:
    folders = {"model": tiny.clip(tmp_path / "clip"), "foreground": tiny.segmenter(tmp_path / "segmenter")}

    def describe() -> dict[str, str]:
        scorer = FusionScorer(ClipSimilarity(folders["model"]), Foreground(folders["foreground"]))
        return dict(scorer.provenance)

    for key, folder in folders.items():
        before = describe()
        assert CHECKSUM.fullmatch(before[key])
        assert {"revision", "licence", "foreground_revision", "foreground_licence"} <= before.keys()
        change(folder, words=False)
        assert {entry for entry, value in describe().items() if before[entry] != value} == {key}


@pytest.mark.parametrize("name", SERVED)
def test_what_a_service_is_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge's weights are not seen; a reward server says what its own reward does."""
    monkeypatch.setenv("PIXRL_REWARD_TOKEN", TOKEN)
    with service_for(name, tmp_path) as options:
        found = rewards.load(name, **options).score(batch_of("python")).provenance
    assert found["model"] and found["licence"]
    assert name == "judge" or (CHECKSUM.fullmatch(found["model"]) and found["revision"] == "local")


def test_the_parts_of_a_part() -> None:
    inner = part("color_clip", {"model": "a (0)", "licence": "MIT", "processor": "b (1)"})
    assert inner == {"color_clip": "a (0)", "color_clip_licence": "MIT", "color_clip_processor": "b (1)"}


def judge(images: object, prompts: object, metadata: object) -> list[float]:
    return []


class Judge:
    def __call__(self, images: object, prompts: object, metadata: object) -> list[float]:
        return []


def test_functions_are_known_by_their_file() -> None:
    plain = describe_function(judge)
    assert plain["model"].startswith(f"{__name__}:judge (") and CHECKSUM.fullmatch(plain["model"])
    assert (plain["revision"], plain["licence"]) == ("local", "its own")
    for given in (functools.partial(judge), functools.wraps(judge)(lambda *given: 0)):
        assert describe_function(given) == plain
    assert describe_function(Judge())["model"].startswith(f"{__name__}:Judge (")
    assert describe_function(json.dumps, "mine.py:f")["model"].startswith("mine.py:f (")
    assert describe_function(len)["model"] == "builtins:len (no source file)"
