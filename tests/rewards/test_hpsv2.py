"""HPSv2 from its published file: OpenCLIP's names, the whole picture on a black square, the plain cosine."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests import tiny
from tests.tiny_encoders import hpsv2, openclip_state
from tests.tolerance import MODEL, agree, rounding
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from pixrl import rewards
from pixrl.errors import CheckpointError, ConfigError
from pixrl.rewards.encoders import to_transformers
from pixrl.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, PadToSquare
from pixrl.rewards.zoo.hpsv2 import HPSv2Reward, clean_text
from pixrl.types import RewardBatch

PROMPTS = ["a red owl", "two cats", "A Red  owl", "a snail", "an owl on grass"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return hpsv2(tmp_path_factory.mktemp("tiny"))


def load(published: tuple[Path, Path], **options: object) -> HPSv2Reward:
    folder, words = published
    reward = rewards.load("hpsv2", **{"model": folder, "processor": words, "device": "cpu", **options})
    assert isinstance(reward, HPSv2Reward)
    return reward


def openclip_forward(state: dict[str, Tensor], pixels_BCHW: Tensor) -> Tensor:
    """OpenCLIP's picture tower with torch's own attention, straight from the published names; unit vectors."""
    width, heads = len(state["visual.class_embedding"]), 2
    patch = state["visual.conv1.weight"].shape[-1]
    x = F.conv2d(pixels_BCHW, state["visual.conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + state["visual.positional_embedding"]

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, (width,), state[f"visual.{name}.weight"], state[f"visual.{name}.bias"])

    x = norm(x, "ln_pre")
    for layer in range(2):
        at = f"transformer.resblocks.{layer}"
        y = norm(x, f"{at}.ln_1")
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict(
            {
                key.removeprefix(f"visual.{at}.attn."): w
                for key, w in state.items()
                if f"visual.{at}.attn." in key
            }
        )
        x = x + attention(y, y, y, need_weights=False)[0]
        y = norm(x, f"{at}.ln_2")
        for name, act in (("c_fc", F.gelu), ("c_proj", lambda z: z)):
            part = f"visual.{at}.mlp.{name}"
            y = act(F.linear(y, state[f"{part}.weight"], state[f"{part}.bias"]))
        x = x + y
    return F.normalize(norm(x[:, 0], "ln_post") @ state["visual.proj"], dim=-1)


@torch.no_grad()
def test_the_conversion_keeps_what_openclip_computes(tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(tiny.clip(tmp_path / "clip"))
    state = openclip_state(model)
    converted = to_transformers(state, tmp_path)
    ours = model.state_dict()
    assert converted.keys() == ours.keys() - {k for k in ours if k.endswith("position_ids")}
    assert all(torch.equal(converted[name], ours[name]) for name in converted)


@torch.no_grad()
def test_pictures_are_embedded_as_openclip_does(published: tuple[Path, Path], images: Tensor) -> None:
    reward = load(published)
    raw = torch.load(published[0] / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    state = {name: tensor.float() for name, tensor in raw.items()}
    expected = openclip_forward(state, reward.clip.preprocess(images))
    assert agree(reward.clip.image_features(images), expected, MODEL)


@torch.no_grad()
def test_the_score_is_the_plain_cosine(published: tuple[Path, Path], images: Tensor) -> None:
    reward = load(published)
    scores = reward.score(RewardBatch(images, PROMPTS)).values_B
    words = AutoTokenizer.from_pretrained(published[1])(PROMPTS, padding=True, return_tensors="pt")
    model = reward.clip.model
    output = model(pixel_values=reward.clip.preprocess(images), **words)
    assert agree(scores, (output.image_embeds * output.text_embeds).sum(1), MODEL, scale=1)
    assert scores.abs().max() <= 1 + rounding(torch.float32, 64)
    logits = output.logits_per_image.diagonal()
    assert agree(logits / model.logit_scale.exp(), scores, MODEL, scale=1)


def test_the_two_versions_are_two_models(published: tuple[Path, Path], images: Tensor) -> None:
    old, new = (load(published, version=version) for version in ("v2.0", "v2.1"))
    batch = RewardBatch(images, PROMPTS)
    assert not torch.allclose(old.score(batch).values_B, new.score(batch).values_B, atol=1e-3)
    by_path = load(published, model=published[0] / "HPS_v2_compressed.pt", version="v2.0")
    assert torch.equal(by_path.score(batch).values_B, old.score(batch).values_B)
    provenance = load(published).score(batch).provenance
    assert provenance["version"] == "v2.1"
    assert provenance["file"] == "HPS_v2.1_compressed.pt"
    assert provenance["model"].startswith(f"{published[0]} (")
    assert provenance["model"] != old.provenance["model"]
    assert provenance["processor"].startswith(f"{published[1]} (")
    assert {"licence", "revision", "text_cleaning"} <= provenance.keys()


def pil_float(image_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL's bicubic, with antialias, of float channels."""
    rows, columns = size
    bands = [
        np.asarray(Image.fromarray(band.numpy(), mode="F").resize((columns, rows), Image.Resampling.BICUBIC))
        for band in image_CHW
    ]
    return torch.from_numpy(np.stack(bands))


@pytest.mark.parametrize(
    ("size", "placed"),
    [
        ((40, 20), (28, 14)),
        ((20, 45), (12, 28)),
        ((57, 40), (28, 20)),
        ((28, 21), (28, 21)),
        ((9, 14), (18, 28)),
    ],
)
def test_the_whole_picture_on_a_black_square(size: tuple[int, int], placed: tuple[int, int]) -> None:
    picture = (torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2)) * 255).round() / 255
    ours = PadToSquare(28)(picture)[0]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_MEAN, OPENAI_STD))
    expected = torch.zeros(3, 28, 28)
    top, left = ((28 - side) // 2 for side in placed)
    expected[:, top : top + placed[0], left : left + placed[1]] = pil_float(picture[0], placed)
    assert ours.shape == (3, 28, 28)
    assert agree(ours * std + mean, expected, 64)


def test_bicubic_overshoot_is_kept_and_antialias_can_be_left_out() -> None:
    edges = (torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    with_it, without = PadToSquare(28), PadToSquare(28, antialias=False)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (OPENAI_MEAN, OPENAI_STD))
    assert (without(edges) * std + mean).max() > 1.05
    plain = F.interpolate(edges, (28, 28), mode="bicubic")
    assert agree(without(edges) * std + mean, plain, 64)
    assert (with_it(edges) - without(edges)).abs().max() > 0.1
    assert "without antialias" in without.describe()


def test_text_is_cleaned_as_openclip_does() -> None:
    assert clean_text("  a &amp;amp; b\n\tc ") == "a & b c"


@pytest.mark.parametrize("broken", ["cut", "code", "other", "lacking"])
def test_files_that_are_refused(published: tuple[Path, Path], tmp_path: Path, broken: str) -> None:
    good = published[0] / "HPS_v2.1_compressed.pt"
    file = tmp_path / good.name
    state = torch.load(good, weights_only=True)["state_dict"]
    match broken:
        case "cut":
            file.write_bytes(good.read_bytes()[:5000])
            message = "cannot be read as weights"
        case "code":
            torch.save({"state_dict": state, "trainer": Path("x")}, file)
            message = "never run"
        case "other":
            torch.save({"state_dict": state | {"visual.transfomer.extra": torch.zeros(1)}}, file)
            message = "visual.transfomer.extra"
        case "lacking":
            torch.save({"state_dict": {k: w for k, w in state.items() if k != "ln_final.bias"}}, file)
            message = r"text_model\.final_layer_norm\.bias"
    with pytest.raises(CheckpointError, match=message):
        load(published, model=tmp_path)


def test_what_is_missing_is_said(published: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"HPS_v2\.1_compressed\.pt is missing"):
        load(published, model=tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(published, model=tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ConfigError, match=r"unknown version 'v2'.*Use v2\.0, v2\.1"):
        load(published, version="v2")
    with pytest.raises(CheckpointError, match="Give processor"):
        rewards.load("clip_text", model=published[0] / "HPS_v2_compressed.pt")
