"""Every entry of the tables keeps its interface's promises, on a tiny checkpoint of the real classes."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests import encoder_rewards, language_rewards, tiny, tiny_language
from tests.rewards.services import TOKEN, service_for
from tests.tiny_dino import dino
from tests.tolerance import STORES, epsilon

from pixrl import models, rewards
from pixrl.conformance import check_policy, check_renderer, check_reward
from pixrl.models.base import FlowPolicy
from pixrl.types import RewardBatch


def make_sd3(folder: Path) -> Path:
    return tiny.sd3(folder, card=tiny.SD3_CARD)


RENDERERS: dict[str, Callable[[Path], Path]] = {
    "sd3": make_sd3,
    "sdxl": tiny.sdxl,
    "flux": tiny.flux,
    "flux2-klein": tiny_language.flux2_klein,
    "z-image": tiny_language.z_image,
    "qwen-image": tiny_language.qwen_image,
    "qwen-image-edit": tiny_language.qwen_edit,
}


def test_every_renderer_of_the_table_is_checked() -> None:
    assert RENDERERS.keys() == models.RENDERERS.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", RENDERERS)
def test_renderer(kind: str, dtype: str, tmp_path: Path) -> None:
    renderer = models.load(RENDERERS[kind](tmp_path), device="cpu", dtype=dtype)
    check = check_policy if isinstance(renderer, FlowPolicy) else check_renderer
    if dtype == "float32":
        check(renderer)
    else:
        check(renderer, tolerance=DRIFT)


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
COMPARING = ("votes",)
"""They say nothing of a picture alone."""
PROMPTS = ["an owl", "a cat", "two owls", "an owl and a cat"]


BRIGHTNESS = """
from PIL import ImageStat

def brightness(images, prompts, metadata):
    return [None if "two" in text else ImageStat.Stat(image).mean[0] for image, text in zip(images, prompts)]
"""


def options_of(name: str, folder: Path) -> dict[str, object]:
    """A reward's options, the checkpoints that they name written into a folder."""
    for table in (language_rewards.OPTIONS, encoder_rewards.OPTIONS):
        if name in table:
            return table[name](folder)
    if name == "python":
        (folder / "mine.py").write_text(BRIGHTNESS)
        return {"function": f"{folder / 'mine.py'}:brightness"}
    if name == "geneval":
        return {"segmenter": tiny.segmenter(folder / "segmenter"), "clip": tiny.clip(folder / "clip")}
    if name == "dino_seg":
        return {"segmenter": tiny.segmenter(folder / "segmenter"), "model": dino(folder / "dino")}
    return {"model": tiny.clip(folder / "clip")}


def batch_of(name: str) -> RewardBatch:
    """Four pictures, wider than high, that a reward can be asked about; some fail."""
    coarse = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, (32, 44), mode="bilinear")
    if name in language_rewards.OPTIONS:
        prompts = list(language_rewards.PROMPTS.get(name, PROMPTS))
        return RewardBatch(images, prompts, language_rewards.METADATA.get(name, ()))
    if name == "geneval":
        met, missed = (
            {"tag": "colors", "include": [{"class": "owl", "count": 2, "color": color}]}
            for color in ("blue", "red")
        )
        return RewardBatch(images, PROMPTS, [met, {}, missed, met])
    if name == "python":
        return RewardBatch(images, PROMPTS)
    several: object = [images[3], images[0, :, :20]]
    metadata = [{"reference": images[0]}, {}, {"reference": images[1:3]}, {"reference": several}]
    return RewardBatch(images, PROMPTS, metadata)


def test_every_reward_of_the_table_is_checked() -> None:
    assert {*REWARDS, *SERVED, *COMPARING} == rewards.REWARDS.keys()


@pytest.mark.parametrize("name", REWARDS)
def test_reward(name: str, tmp_path: Path) -> None:
    check_reward(rewards.load(name, **options_of(name, tmp_path)), batch_of(name))


@pytest.mark.parametrize("name", SERVED)
def test_reward_of_a_service(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXRL_REWARD_TOKEN", TOKEN)
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6), (32, 44), mode="bilinear")
    with service_for(name, tmp_path) as options:
        reward = rewards.load(name, **options)
        check_reward(reward, RewardBatch(images, PROMPTS))


DRIFT = 2 * epsilon(torch.bfloat16) * math.sqrt(STORES)
"""What a pass in bfloat16 changes of numbers about as large as 1, by the rule of `agree_in_norm`."""
LOGIT = 5
"""The size of the logit of VQAScore's answer here: exp(-5) is off by as much of itself as the logit is off."""
COUNTED = {"geneval", "ocr"}
"""Rewards of what was found, not of how sure a model is of it."""


@pytest.mark.parametrize("name", [name for name in REWARDS if rewards.takes(name, "dtype")])
def test_reward_in_bfloat16(name: str, tmp_path: Path) -> None:
    """float32's scores within the tolerance, nan in the same places, and every promise kept."""
    options, batch = options_of(name, tmp_path), batch_of(name)
    exact = rewards.load(name, **options, device="cpu", dtype="float32").score(batch).values_B
    reward = rewards.load(name, **options, device="cpu", dtype="bfloat16")
    found = reward.score(batch).values_B
    assert exact.nan_to_num().unique().numel() > 1
    assert found.dtype is exact.dtype is torch.float32
    assert torch.equal(found.isnan(), exact.isnan())
    most = exact.nan_to_num().abs().max().item()
    size = LOGIT * most if name == "vqascore" else max(1.0, most)  # a small cosine is a sum of larger numbers
    tolerance = 0.0 if name in COUNTED else DRIFT * size
    assert torch.allclose(found, exact, rtol=0, atol=tolerance, equal_nan=True)
    check_reward(reward, batch, tolerance=tolerance)
