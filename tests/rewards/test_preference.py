"""The preference score is PickScore's: transformers' own logits, at three scales."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tolerance import MODEL, agree, rounding
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from pixrl import rewards
from pixrl.errors import CheckpointError, ConfigError
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.preference import PreferenceReward
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
    assert agree(score(clip_folder, images).values_B, logits.diagonal(), MODEL)


def test_the_three_scales_are_multiples(clip_folder: Path, images: Tensor) -> None:
    raw, div26, cosine = (
        score(clip_folder, images, scale=scale).values_B for scale in ("raw", "div26", "cosine")
    )
    assert agree(div26, raw / 26, 8)
    assert agree(cosine * ClipSimilarity(clip_folder).logit_scale, raw, MODEL)
    assert cosine.abs().max() <= 1 + rounding(torch.float32, 64)


@pytest.mark.parametrize(
    ("scale", "expected"), [("raw", [24.0, -10.0]), ("div26", [24 / 26, -10 / 26]), ("cosine", [0.24, -0.1])]
)
def test_known_answers(scale: str, expected: list[float], tmp_path: Path) -> None:
    """Cosines of 0.24 and -0.1 at PickScore's own scale, exp(4.6052) = 100, written into a checkpoint."""
    folder = tiny.clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = torch.tensor(100.0).log()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    reward = rewards.load("preference", model=folder, scale=scale, device="cpu")
    assert isinstance(reward, PreferenceReward)
    axis, other = torch.eye(16)[0], torch.eye(16)[1]
    reward.clip.image_features = lambda images: axis.expand(len(images), -1)  # type: ignore[method-assign]
    for text, cosine in (("a", 0.24), ("b", -0.1)):
        reward.clip._texts[text] = cosine * axis + (1 - cosine**2) ** 0.5 * other
    scores = reward.score(RewardBatch(torch.rand(2, 3, 28, 28), ["a", "b"]))
    assert scores.values_B.tolist() == pytest.approx(expected, abs=rounding(torch.float32, 16, scale=100))


@torch.no_grad()
def test_the_call_of_pickscores_readme(tmp_path: Path) -> None:
    """Published layout: the model's folder holds weights alone, the processor's an old preprocessor_config.json."""
    whole = tiny.clip(tmp_path / "laion")
    bare = tmp_path / "PickScore_v1"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (whole / name).rename(bare / name)
    (whole / "config.json").write_text((bare / "config.json").read_text())
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28, "resample": 3}
    stats = json.loads((whole / "preprocessor_config.json").read_text())
    old |= {key: stats[key] for key in ("image_mean", "image_std")} | dict.fromkeys(
        ("do_resize", "do_center_crop", "do_normalize"), True
    )
    (whole / "preprocessor_config.json").write_text(json.dumps(old))
    images = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255

    model = AutoModel.from_pretrained(bare).eval()
    arrays = [Image.fromarray(a) for a in (images * 255).byte().permute(0, 2, 3, 1).numpy()]
    pixels = AutoImageProcessor.from_pretrained(whole, backend="pil")(arrays, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(whole)
    words = tokenizer(PROMPTS[:3], padding=True, truncation=True, max_length=32, return_tensors="pt")
    pictures = model.get_image_features(**pixels).pooler_output
    texts = model.get_text_features(**words).pooler_output
    pictures, texts = (e / e.norm(dim=-1, keepdim=True) for e in (pictures, texts))
    expected = model.logit_scale.exp() * (texts * pictures).sum(dim=1)

    for scale, factor in (("raw", 1), ("div26", 1 / 26)):
        reward = rewards.load("preference", model=bare, processor=whole, scale=scale, device="cpu")
        scores = reward.score(RewardBatch(images, PROMPTS[:3]))
        assert agree(scores.values_B, factor * expected, MODEL)
        assert scores.provenance["model"].startswith(str(bare))
        assert {"licence", "revision", "processor"} <= scores.provenance.keys()


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
    assert scores.provenance["processor"].startswith(f"{clip_folder} (")
    assert scores.provenance["scale"].startswith("raw (cosine x 14.28")


def test_another_kind_of_model_is_refused(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(CheckpointError, match="needs a 'clip' one"):
        score(tiny.segmenter(tmp_path), images)
