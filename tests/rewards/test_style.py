"""CSD's style features from both published files, equal to the model that they were made of."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests import tiny
from tests.tiny_encoders import openclip_state
from tests.tolerance import MODEL, agree
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from pixrl.errors import CheckpointError
from pixrl.rewards.zoo.style import StyleEncoder


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config=small, vision_config=small | {"image_size": 28, "patch_size": 7}, projection_dim=16
    )
    return CLIPModel(config).eval()


def csd_state(clip: CLIPModel) -> dict[str, Tensor]:
    """As CSD keeps it: the tower without its projection, and two projections beside it."""
    state = {f"backbone.{name.removeprefix('visual.')}": x for name, x in openclip_state(clip).items()
             if name.startswith("visual.") and name != "visual.proj"}  # fmt: skip
    style = openclip_state(clip)["visual.proj"]
    return state | {"last_layer_style": style, "last_layer_content": torch.rand_like(style)}


@pytest.fixture(scope="module")
def hub_folder(clip: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("csd")
    save_file(csd_state(clip), folder / "model.safetensors")
    return folder


def test_features_are_the_projected_tower(clip: CLIPModel, hub_folder: Path, images: Tensor) -> None:
    """The same tower and projection as CLIPModel's own picture features."""
    encoder = StyleEncoder(hub_folder, device="cpu")
    pixels = encoder.preprocess(images)
    with torch.inference_mode():
        expected = clip.get_image_features(pixel_values=pixels).pooler_output
    found = encoder.image_features(images)
    assert agree(found, torch.nn.functional.normalize(expected, dim=-1), MODEL)
    assert found.shape == (5, 16)
    assert encoder.provenance["licence"] == "MIT"
    assert "shortest edge 28 bicubic" in encoder.provenance["preprocessing"]


def test_the_training_checkpoint_is_the_same(
    clip: CLIPModel, hub_folder: Path, images: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.pth"
    torch.save(
        {"model_state_dict": {f"module.{name}": x for name, x in csd_state(clip).items()}, "epoch": 9}, file
    )
    of_file = StyleEncoder(file, device="cpu", batch=2).image_features(images)
    assert agree(of_file, StyleEncoder(hub_folder, device="cpu").image_features(images), MODEL)


def test_other_weights_are_refused(clip: CLIPModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not CSD's: it has no last_layer_style"):
        StyleEncoder(tiny.clip(tmp_path / "clip"))
    with pytest.raises(CheckpointError, match="There is no file"):
        StyleEncoder(tmp_path / "missing.pth")
    state = csd_state(clip)
    del state["backbone.ln_post.bias"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*post_layernorm\.bias"):
        StyleEncoder(tmp_path / "cut.safetensors")
