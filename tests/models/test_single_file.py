"""One safetensors file in the authors' layout gives the pictures of the folder that it was written from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import published, tiny

from pixrl import hub, models
from pixrl.errors import CheckpointError, InputError

CASES: dict[str, tuple[Callable[..., Path], Callable[[Path, Path], Path], tuple[str, ...]]] = {
    "sd3": (lambda p: tiny.sd3(p, card=tiny.SD3_CARD), published.sd3, ("transformer", "vae")),
    "sd3.5": (lambda p: tiny.sd3(p, card=tiny.SD3_CARD, dual=True), published.sd3, ("transformer", "vae")),
    "sdxl": (tiny.sdxl, published.sdxl, ("unet", "vae")),
    "flux": (tiny.flux, published.flux, ("transformer",)),
}


@pytest.mark.parametrize("family", CASES)
def test_the_same_pictures_as_the_folder(family: str, tmp_path: Path) -> None:
    make, write, inside = CASES[family]
    folder = make(tmp_path / "model")
    file = write(folder, tmp_path / "model.safetensors")
    whole = models.load(folder, device="cpu", dtype="float32")
    for part in inside:  # what the file holds is not in the folder
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
    alone = models.load(file, device="cpu", dtype="float32")
    named = models.load(f"{file}@{folder}", device="cpu", dtype="float32")
    prompts, seeds = ["a photo of an owl", "a snail"], [1, 2]
    expected = whole.sample(whole.encode(prompts), seeds)
    for other in (alone, named):
        assert torch.allclose(other.sample(other.encode(prompts), seeds), expected, atol=1e-5)
    assert alone.settings == whole.settings
    assert alone.fingerprint() == named.fingerprint() != whole.fingerprint()


def test_what_a_single_file_needs(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD)
    file = published.sd3(folder, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no folder .*other. Name a folder or a hub id.*@FOLDER"):
        models.load(file)
    with pytest.raises(CheckpointError, match="does not exist"):
        models.load(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match=r"does not exist"):
        models.load(f"{file}@{tmp_path}/nowhere")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(CheckpointError, match=r"holds no text_encoder, and neither does .*model"):
        models.load(f"{file}@{folder}")


def test_a_file_of_another_size_does_not_fit(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD)
    file = published.sd3(folder, tmp_path / "model.safetensors")
    weights = load_file(file)
    save_file({name: x for name, x in weights.items() if "joint_blocks.1.x_block.mlp" not in name}, file)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors could not be loaded|model\.safetensors do not fit"
    ):
        models.load(file)


def test_a_single_file_that_is_cut_short(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD)
    file = published.sd3(folder, tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut short: \d+ bytes of \d+"):
        models.load(file)


def test_references_with_a_config_part() -> None:
    assert hub.split_single_file("a/b.safetensors@owner/name@main") == (
        Path("a/b.safetensors"),
        "owner/name@main",
    )
    assert hub.split_single_file("a.safetensors") == (Path("a.safetensors"), None)
    assert hub.split_single_file("owner/name@main") is None
    with pytest.raises(InputError, match="not a checkpoint reference"):
        hub.read_card("b.safetensors@two words")
