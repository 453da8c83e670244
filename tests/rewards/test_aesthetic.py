"""The aesthetic heads: five linear layers on a unit vector, from their published files; AGPL only where accepted."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tests import tiny
from tests.tiny_encoders import laion_head, siglip, siglip_head
from tests.tolerance import MODEL, agree
from torch import Tensor
from transformers import SiglipImageProcessorPil, SiglipModel

from pixrl import rewards
from pixrl.errors import CheckpointError, ConfigError
from pixrl.rewards.aesthetic import AestheticReward, read_head
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.types import RewardBatch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    laion_head(folder / "sac+logos+ava1-l14-linearMSE.pth", 16)
    siglip_head(folder / "aesthetic_predictor_v2_5.pth", 32)
    siglip(folder / "siglip")
    return folder


def v25(place: Path, **options: object) -> AestheticReward:
    given = {"head": place, "version": "v2.5", "model": place / "siglip", "accept_licence": "AGPL-3.0"}
    reward = rewards.load("aesthetic", **{**given, "device": "cpu", **options})
    assert isinstance(reward, AestheticReward)
    return reward


def by_hand(file: Path, name: str, layers: tuple[int, ...], features_BE: Tensor) -> Tensor:
    weights = torch.load(file, weights_only=True)
    for layer in layers:
        weight, bias = (weights[f"{name}.{layer}.{end}"].float() for end in ("weight", "bias"))
        features_BE = features_BE @ weight.T + bias
    return features_BE[:, 0]


def test_laion_is_five_layers_on_the_unit_vector(place: Path, clip_folder: Path, images: Tensor) -> None:
    reward = rewards.load("aesthetic", head=place, model=clip_folder, device="cpu")
    scores = reward.score(RewardBatch(images, ["x"] * 5))
    features = ClipSimilarity(clip_folder, device="cpu").image_features(images)
    file = place / "sac+logos+ava1-l14-linearMSE.pth"
    expected = by_hand(file, "layers", (0, 2, 4, 6, 7), features)
    assert agree(scores.values_B, expected, MODEL)
    assert scores.values_B.std() > 0
    assert scores.provenance["head"].startswith(str(place))
    assert scores.provenance["head_licence"] == "Apache-2.0"
    assert scores.provenance["version"] == "laion-v2"


@torch.no_grad()
def test_v25_is_siglips_pooled_output(place: Path) -> None:
    images = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    scores = v25(place).score(RewardBatch(images, ["x"] * 3))
    model = SiglipModel.from_pretrained(place / "siglip").eval()
    arrays = (images * 255).byte().permute(0, 2, 3, 1).numpy()
    pixels = SiglipImageProcessorPil.from_pretrained(place / "siglip")(list(arrays), return_tensors="pt")
    pooled = F.normalize(model.vision_model(**pixels).pooler_output, dim=-1)
    file = place / "aesthetic_predictor_v2_5.pth"
    expected = by_hand(file, "scoring_head", (0, 2, 4, 6, 8), pooled)
    assert agree(scores.values_B, expected, MODEL)
    assert scores.provenance["head_licence"] == "AGPL-3.0"


def test_a_known_answer(tmp_path: Path, clip_folder: Path, images: Tensor) -> None:
    """Layers that pass the first number of the unit vector on, times two, plus five."""
    file = laion_head(tmp_path / "head.pth", 16)
    weights = {name: torch.zeros_like(tensor) for name, tensor in torch.load(file, weights_only=True).items()}
    for layer in (0, 2, 4, 6, 7):
        weights[f"layers.{layer}.weight"][0, 0] = 1
    weights["layers.7.weight"][0, 0], weights["layers.7.bias"][0] = 2, 5
    torch.save(weights, file)
    scores = rewards.load("aesthetic", head=file, model=clip_folder, device="cpu").score(
        RewardBatch(images, ["x"] * 5)
    )
    first = ClipSimilarity(clip_folder, device="cpu").image_features(images)[:, 0]
    assert agree(scores.values_B, 2 * first + 5, MODEL)


def test_the_prompt_plays_no_part(place: Path, images: Tensor) -> None:
    reward = v25(place)
    one, other = (reward.score(RewardBatch(images, [text] * 5)).values_B for text in ("an owl", "x"))
    assert torch.equal(one, other)


def test_the_agpl_head_must_be_accepted(place: Path, clip_folder: Path) -> None:
    for given in (None, "MIT", "agpl"):
        with pytest.raises(ConfigError, match=r"AGPL-3\.0 \(https://.*accept_licence: AGPL-3\.0"):
            v25(place, accept_licence=given)
    with pytest.raises(ConfigError, match="accept_licence has no effect"):
        rewards.load("aesthetic", head=place, model=clip_folder, accept_licence="AGPL-3.0")


def test_a_whole_model_in_safetensors_holds_the_head_too(place: Path, tmp_path: Path) -> None:
    """shunk031's layout: encoder and `layers` in one file."""
    weights = torch.load(place / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    file = tmp_path / "model.safetensors"
    save_file({**weights, "visual_projection.weight": torch.zeros(2, 2)}, file)
    published = read_head(place / "sac+logos+ava1-l14-linearMSE.pth", "layers").state_dict()
    assert all(torch.equal(w, published[name]) for name, w in read_head(file, "layers").state_dict().items())


def test_what_does_not_fit_is_refused(place: Path, tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no published aesthetic head.*another version"):
        rewards.load("aesthetic", head=place / "aesthetic_predictor_v2_5.pth", model=clip_folder)
    with pytest.raises(CheckpointError, match=r"takes 32 numbers.*gives 16"):
        rewards.load("aesthetic", head=laion_head(tmp_path / "wide.pth", 32), model=clip_folder)
    with pytest.raises(CheckpointError, match="needs a 'siglip' one"):
        v25(place, model=clip_folder)
    with pytest.raises(CheckpointError, match="'clip' one"):
        rewards.load("aesthetic", head=place, model=place / "siglip")
    with pytest.raises(CheckpointError, match="is missing; the folder holds"):
        rewards.load("aesthetic", head=tiny.clip(tmp_path / "clip"), model=clip_folder)
    with pytest.raises(ConfigError, match=r"needs the option 'head', for example head: sac\+logos"):
        rewards.load("aesthetic")
