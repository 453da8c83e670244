"""The preference score is PickScore's: transformers' own logits, at three scales."""

from pathlib import Path

import pytest
import torch
from tests import tiny
from torch import Tensor

from pixrl import rewards
from pixrl.errors import CheckpointError, ConfigError
from pixrl.rewards.clip import ClipSimilarity
from pixrl.types import RewardBatch, Scores

PROMPTS = ["a red owl", "two cats", "a red owl", "a snail", "an owl on grass"]


def score(folder: Path, images: Tensor, **options: object) -> Scores:
    reward = rewards.load("preference", model=folder, device="cpu", **options)
    return reward.score(RewardBatch(images, PROMPTS))


def test_raw_is_the_models_own_logit(clip_folder: Path, images: Tensor) -> None:
    clip = ClipSimilarity(clip_folder, device="cpu")
    words = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip.model(pixel_values=clip.preprocess(images), **words).logits_per_image
    assert torch.allclose(score(clip_folder, images).values_B, logits.diagonal(), atol=1e-4)


def test_the_three_scales_are_multiples(clip_folder: Path, images: Tensor) -> None:
    raw, div26, cosine = (
        score(clip_folder, images, scale=scale).values_B for scale in ("raw", "div26", "cosine")
    )
    assert torch.allclose(div26, raw / 26)
    assert torch.allclose(cosine * ClipSimilarity(clip_folder).logit_scale, raw, atol=1e-4)
    assert cosine.abs().max() <= 1


def test_an_unknown_scale(clip_folder: Path, images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"'div62'\. Did you mean 'div26'\? Use raw, div26, cosine"):
        score(clip_folder, images, scale="div62")


def test_the_processor_can_be_another_checkpoints(clip_folder: Path, images: Tensor, tmp_path: Path) -> None:
    """PickScore's own folder may hold weights alone."""
    bare = tmp_path / "pickscore"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        score(bare, images)
    scores = score(bare, images, processor=clip_folder)
    assert torch.equal(scores.values_B, score(clip_folder, images).values_B)
    assert scores.provenance["processor"] == str(clip_folder)
    assert scores.provenance["scale"].startswith("raw (cosine x 14.28")


def test_another_kind_of_model_is_refused(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(CheckpointError, match="needs a 'clip' one"):
        score(tiny.segmenter(tmp_path), images)
