"""Rewards that cannot score here: the doctor finds what `pixrl align` would stumble over."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pixrl import api
from pixrl.data.prompts import Prompt
from pixrl.doctor import needs as doctor_needs
from pixrl.doctor.diagnosis import Findings, Need
from pixrl.doctor.rewards import find_rewards
from pixrl.errors import CheckpointError, PixrlError
from pixrl.hub import Remote
from pixrl.rewards import REWARDS as TABLE
from pixrl.rewards import checked_options, kind_of, load
from pixrl.rewards.base import path_options
from pixrl.rewards.settings import RewardSetting
from pixrl.rewards.zoo import blip_vqa
from tests import encoder_rewards, language_rewards, tiny
from tests.align.test_doctor import needs, toy
from tests.conformance.test_table import REWARDS, SERVED, options_of
from tests.rewards.services import TOKEN, service_for
from tests.tiny_bin import as_bin

VARIABLE = "PIXRL_REWARD_TOKEN"


def judged(name: str, **options: object) -> Findings:
    """What is said of a reward."""
    findings = Findings()
    find_rewards([RewardSetting(name=name, options=options)], [Prompt("a red owl")], findings)
    return findings


def loaded(*settings: RewardSetting) -> dict[str, int]:
    """The bytes of their models."""
    return find_rewards(settings, (), Findings())


def said(findings: Findings) -> dict[Need, str]:
    return {problem.need: problem.message for problem in findings.problems}


def clip(folder: Path) -> Path:
    return tiny.clip(folder / "clip")


@pytest.mark.parametrize("name", TABLE)
def test_every_reward_of_the_table_says_what_it_reads(name: str) -> None:
    kind = kind_of(name)
    needed = {key: one for key, one in inspect.signature(kind).parameters.items() if one.default is one.empty}
    assert needed.keys() <= kind.examples.keys()
    reads = kind.reads(checked_options(name, kind.examples))
    assert set(path_options(kind)) == {option for option in reads if option != "function"}


@pytest.mark.parametrize("name", REWARDS)
def test_nothing_is_missing_of_a_reward_that_loads(name: str, tmp_path: Path) -> None:
    options = options_of(name, tmp_path)
    load(name, **options)
    findings = Findings()
    found = find_rewards([RewardSetting(name=name, options=options)], (), findings)
    assert not findings.problems
    assert not findings.notes
    assert bool(found) == (name != "python")
    assert all(found.values())


@pytest.mark.parametrize("name", SERVED)
def test_a_service_that_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)
    with service_for(name, tmp_path) as options:
        assert not judged(name, **options).problems


def no_weights(folder: Path) -> dict[str, object]:
    path = clip(folder)
    (path / "model.safetensors").unlink()
    return {"model": str(path)}


def cut_short(folder: Path) -> dict[str, object]:
    path = clip(folder)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return {"model": str(path)}


def cut_head(folder: Path) -> dict[str, object]:
    options = encoder_rewards.OPTIONS["aesthetic"](folder)
    file = Path(str(options["head"]))
    file.write_bytes(file.read_bytes()[:-300])
    return options


def pieces_alone(folder: Path) -> dict[str, object]:
    options = language_rewards.OPTIONS["vqascore"](folder)
    words = Path(str(options["tokenizer"]))
    (words / "tokenizer.json").unlink()
    (words / "spiece.model").write_bytes(b"pieces")
    return options


def without_tokenizer(folder: Path) -> dict[str, object]:
    options = language_rewards.OPTIONS["image_reward"](folder)
    (Path(str(options["model"])) / "vocab.txt").unlink()
    return options


GENEVAL = {"clip": "toy:clip"}
SERVER = {"url": "http://127.0.0.1:9", "reward": "mine"}
JUDGE = {"base_url": "http://127.0.0.1:9/v1", "model": "judge-1"}
WRONG: list[tuple[str, str, Callable[[Path], dict[str, object]], Need, str]] = [
    ("no detector file", "geneval", lambda f: GENEVAL | {"detector": "m.pth"}, Need.WEIGHTS, "curl -O https://"),
    ("neither", "geneval", lambda f: GENEVAL, Need.SETTING, "neither is given"),
    ("both", "geneval", lambda f: GENEVAL | {"segmenter": "a", "detector": "b"}, Need.SETTING, "both are given"),
    ("no weights", "clip_text", no_weights, Need.WEIGHTS, "holds no .safetensors weights"),
    ("cut short", "clip_text", cut_short, Need.WEIGHTS, "is cut short"),
    ("cut head", "aesthetic", cut_head, Need.WEIGHTS, "is cut short"),
    ("another model", "clip_text", lambda f: {"model": "toy:segmenter"}, Need.WEIGHTS, "'clip' one is needed"),
    ("no head", "aesthetic", lambda f: {"head": "h.pth", "model": "toy:clip"}, Need.WEIGHTS, "no file 'h.pth'"),
    ("one file", "clip_text", lambda f: {"model": "a.pt"}, Need.WEIGHTS, "one file of weights"),
    ("no token", "remote", lambda f: SERVER, Need.TOKEN, f"{VARIABLE} is not set"),
    ("another token", "remote", lambda f: SERVER | {"token_env": "MINE"}, Need.TOKEN, "MINE is not set"),
    ("no key", "judge", lambda f: JUDGE | {"key_env": "KEY_OF_MINE"}, Need.TOKEN, "KEY_OF_MINE is not set"),
    ("nobody there", "judge", lambda f: JUDGE, Need.SERVICE, "http://127.0.0.1:9"),
    ("judge's prompt", "judge", lambda f: JUDGE | {"prompt": "hello"}, Need.SETTING, "never says {prompt}"),
    ("no module", "python", lambda f: {"function": "no_such_module:f"}, Need.SETTING, "could not be imported"),
    ("no such file", "python", lambda f: {"function": "none.py:f"}, Need.SETTING, "There is no file 'none.py'"),
    ("no such GPU", "clip_text", lambda f: {"model": "toy:clip", "device": "cuda:9"}, Need.DEVICE, "cuda:9"),
    ("a choice", "preference", lambda f: {"model": "toy:preference", "scale": "x"}, Need.SETTING, "unknown scale"),
    ("no tokenizer", "image_reward", without_tokenizer, Need.WEIGHTS, "tokenizer: google-bert/bert-base-uncased"),
    ("sentencepiece", "vqascore", pieces_alone, Need.PACKAGE, "needs sentencepiece"),
    ("spacy", "blip_vqa", language_rewards.OPTIONS["blip_vqa"], Need.PACKAGE, "pip install 'pixrl[compbench]'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "need", "message"), [one[1:] for one in WRONG], ids=[one[0] for one in WRONG]
)
def test_what_a_reward_lacks(
    name: str,
    options: Callable[[Path], dict[str, object]],
    need: Need,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for package in ("spacy", "sentencepiece"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(doctor_needs, "find_spec", lambda name: None)
    monkeypatch.setattr(blip_vqa, "find_spec", lambda name: None)
    given = options(tmp_path)
    assert message in said(judged(name, **given))[need]
    if name != "blip_vqa":  # it asks for spaCy when it scores
        with pytest.raises(PixrlError):
            load(name, **given | ({"patience": 0} if "url" in given or "base_url" in given else {}))


def test_published_flow_grpo_without_its_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_needs, "ask", lambda ref: Remote(1))
    found = needs(api.examine("paper/flow-grpo", ["machine.device=cpu"]))
    assert "mask2former_swin-s-p4-w7-224" in found[Need.WEIGHTS]
    assert "curl -O" in found[Need.WEIGHTS]


def test_phrases_in_the_metadata_need_no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blip_vqa, "find_spec", lambda name: None)
    setting = RewardSetting(name="blip_vqa", options={"model": "./nowhere"})
    findings = Findings()
    with_phrases = Prompt("a red owl", {"phrases": ["a red owl"]})
    find_rewards([setting], [with_phrases], findings)
    assert [problem.need for problem in findings.problems] == [Need.WEIGHTS]
    find_rewards([setting], [with_phrases, Prompt("a cat")], findings)
    assert Need.PACKAGE in [problem.need for problem in findings.problems]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(doctor_needs.existing_device("cuda:0")) == "cuda:0"
    found = api.examine(toy(machine={"device": "cuda:9", "dtype": "float32"}))
    assert "there are 1 GPUs here" in needs(found)[Need.DEVICE]
    found = judged("clip_text", model="toy:clip", device="cuda:9")
    assert "The reward 'clip_text'" in said(found)[Need.DEVICE]


def test_the_bytes_are_those_of_what_is_loaded(tmp_path: Path) -> None:
    path = clip(tmp_path)
    size = (path / "model.safetensors").stat().st_size
    beside = as_bin(path, tmp_path / "both")
    setting = RewardSetting(name="clip_text", options={"model": str(beside)})
    assert loaded(setting) == {str(beside): (beside / "pytorch_model.bin").stat().st_size}
    (beside / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    assert loaded(setting) == {str(beside): size}
    twice = [RewardSetting(name=one, kind="clip_text", options={"model": str(path)}) for one in ("a", "b")]
    assert loaded(*twice) == {str(path): 2 * size}
    words = {"model": "toy:preference", "processor": str(path)}
    assert str(path) not in loaded(RewardSetting(name="preference", options=words))


def test_a_model_of_the_hub_of_which_the_cache_has_the_words_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(tmp_path)
    (path / "model.safetensors").unlink()
    monkeypatch.setattr(doctor_needs, "cached_folder", lambda ref: path)
    monkeypatch.setattr(doctor_needs, "ask", lambda ref: Remote(7))
    found = judged("clip_text", model="owner/name")
    assert not found.problems
    assert "7 B of weights" in found.notes[0]
    words = judged("preference", model="toy:preference", processor="owner/name")
    assert not words.problems
    assert not words.notes

    def refuse(ref: str) -> Remote:
        raise CheckpointError(f"{ref!r} is not in the cache, and HF_HUB_OFFLINE is set.")

    monkeypatch.setattr(doctor_needs, "ask", refuse)
    assert "HF_HUB_OFFLINE" in said(judged("clip_text", model="owner/name"))[Need.WEIGHTS]
