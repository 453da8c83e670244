"""Every entry of the tables keeps its interface's promises, on a tiny checkpoint of the real classes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests import encoder_rewards, language_rewards, tiny
from tests.rewards.services import TOKEN, service_for
from tests.tiny_dino import dino

from pixrl import models, rewards
from pixrl.conformance import check_policy, check_renderer, check_reward
from pixrl.models.base import FlowPolicy
from pixrl.rewards.base import Reward
from pixrl.types import RewardBatch


def make_sd3(folder: Path) -> Path:
    return tiny.sd3(folder, card=tiny.SD3_CARD)


RENDERERS: dict[str, Callable[[Path], Path]] = {"sd3": make_sd3, "sdxl": tiny.sdxl, "flux": tiny.flux}


def test_every_renderer_of_the_table_is_checked() -> None:
    assert RENDERERS.keys() == models.RENDERERS.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", RENDERERS)
def test_renderer(kind: str, dtype: str, tmp_path: Path) -> None:
    renderer = models.load(RENDERERS[kind](tmp_path), device="cpu", dtype=dtype)
    check = check_policy if isinstance(renderer, FlowPolicy) else check_renderer
    check(renderer)


REWARDS = (
    "clip_image",
    "clip_text",
    "dino_seg",
    "geneval",
    "preference",
    "python",
    *encoder_rewards.OPTIONS,
    *language_rewards.OPTIONS,
)
SERVED = ("judge", "remote")


BRIGHTNESS = """
from PIL import ImageStat

def brightness(images, prompts, metadata):
    return [None if "two" in text else ImageStat.Stat(image).mean[0] for image, text in zip(images, prompts)]
"""


def make_reward(name: str, folder: Path) -> tuple[Reward, RewardBatch]:
    clip = tiny.clip(folder / "clip")
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6), (32, 32), mode="bilinear")
    prompts = ["an owl", "a cat", "two owls", "an owl and a cat"]
    if name == "geneval":
        options: dict[str, object] = {"segmenter": tiny.segmenter(folder / "segmenter"), "clip": clip}
        metadata = [{"tag": "colors", "include": [{"class": "owl", "count": 1, "color": "red"}]}, {}] * 2
        return rewards.load(name, **options), RewardBatch(images, prompts, metadata)
    if name in language_rewards.OPTIONS:
        made = language_rewards.OPTIONS[name](folder)
        prompts = list(language_rewards.PROMPTS.get(name, prompts))
        return rewards.load(name, **made), RewardBatch(
            images, prompts, language_rewards.METADATA.get(name, ())
        )
    if name == "python":
        (folder / "mine.py").write_text(BRIGHTNESS)
        return rewards.load(name, function=f"{folder / 'mine.py'}:brightness"), RewardBatch(images, prompts)
    several: object = [images[3], images[0, :, :20]]
    metadata = [{"reference": images[0]}, {}, {"reference": images[1:3]}, {"reference": several}]
    if name == "dino_seg":
        cut = {"segmenter": tiny.segmenter(folder / "segmenter"), "model": dino(folder / "dino")}
        return rewards.load(name, **cut), RewardBatch(images, prompts, metadata)
    if name in encoder_rewards.OPTIONS:
        made = encoder_rewards.OPTIONS[name](folder)
        return rewards.load(name, **made), RewardBatch(images, prompts, metadata)
    return rewards.load(name, model=clip), RewardBatch(images, prompts, metadata)


def test_every_reward_of_the_table_is_checked() -> None:
    assert {*REWARDS, *SERVED} == rewards.REWARDS.keys()


@pytest.mark.parametrize("name", REWARDS)
def test_reward(name: str, tmp_path: Path) -> None:
    check_reward(*make_reward(name, tmp_path))


@pytest.mark.parametrize("name", SERVED)
def test_reward_of_a_service(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXRL_REWARD_TOKEN", TOKEN)
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6), (32, 32), mode="bilinear")
    with service_for(name, tmp_path) as options:
        reward = rewards.load(name, **options)
        check_reward(reward, RewardBatch(images, ["an owl", "a cat", "two owls", "an owl and a cat"]))
