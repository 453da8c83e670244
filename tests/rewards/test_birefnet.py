"""BiRefNet from its published names: the operator, the mask's way back to the picture, and where masks are used."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tiny_dino import dino
from tests.tiny_encoders import birefnet
from tests.tolerance import MODEL, agree
from torch import Tensor, nn

from pixrl import rewards
from pixrl.errors import CheckpointError, ConfigError
from pixrl.fusion.world import load_world
from pixrl.rewards.clip import ClipSimilarity, FusionScorer
from pixrl.rewards.segmentation import Foreground, Segmenter, load_back_end
from pixrl.rewards.zoo.birefnet import BiRefNetForeground, as_patches, backbone_config, deform_conv2d
from pixrl.types import RewardBatch

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "birefnet.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return birefnet(tmp_path_factory.mktemp("tiny") / "birefnet")


@pytest.fixture(scope="module")
def model(folder: Path) -> BiRefNetForeground:
    return BiRefNetForeground(folder, device="cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The formula, one number at a time."""
    size = weight.shape[-1]
    height, width = x.shape[-2:]
    out = torch.zeros(len(x), len(weight), height, width)

    def at(b: int, y: float, z: float) -> Tensor:
        total = torch.zeros(x.shape[1])
        top, left = int(np.floor(y)), int(np.floor(z))
        for row in (top, top + 1):
            for column in (left, left + 1):
                if 0 <= row < height and 0 <= column < width:
                    total += (1 - abs(y - row)) * (1 - abs(z - column)) * x[b, :, row, column]
        return total

    for b, row, column in np.ndindex(len(x), height, width):
        for tap in range(size * size):
            down, right = offset[b, 2 * tap : 2 * tap + 2, row, column].tolist()
            seen = at(b, row - padding + tap // size + down, column - padding + tap % size + right)
            out[b, :, row, column] += mask[b, tap, row, column] * (
                weight[:, :, tap // size, tap % size] @ seen
            )
    return out


@pytest.mark.parametrize(("kernel", "height", "width"), [(1, 4, 5), (3, 4, 5), (3, 1, 1), (3, 1, 6)])
def test_deformable_convolution_is_its_formula(kernel: int, height: int, width: int) -> None:
    taps = kernel * kernel
    x, weight = random(2, 3, height, width), random(4, 3, kernel, kernel, seed=1)
    offset, mask = (
        2 * random(2, 2 * taps, height, width, seed=2),
        random(2, taps, height, width, seed=3).abs(),
    )
    ours = deform_conv2d(x, offset, mask, weight, kernel // 2)
    assert agree(ours, slow_deform_conv2d(x, offset, mask, weight, kernel // 2), 16 * taps)


def test_without_offsets_it_is_a_convolution() -> None:
    x, weight = random(2, 3, 8, 9), random(4, 3, 7, 7, seed=1)
    plain = F.conv2d(x, weight, padding=3)
    unmoved = deform_conv2d(x, torch.zeros(2, 98, 8, 9), torch.ones(2, 49, 8, 9), weight, 3)
    assert agree(unmoved, plain, 3 * 7 * 7)
    moved = torch.zeros(2, 98, 8, 9)
    moved[:, 0::2] = 1  # every tap one row down
    shifted = F.conv2d(F.pad(x, (0, 0, 0, 1))[:, :, 1:], weight, padding=3)
    inside = deform_conv2d(x, moved, torch.ones(2, 49, 8, 9), weight, 3)[:, :, 3:-4]
    assert agree(inside, shifted[:, :, 3:-4], 3 * 7 * 7)


def test_its_gradient() -> None:
    x, weight = random(1, 2, 4, 5).double().requires_grad_(), random(3, 2, 3, 3, seed=1).double()
    offset, mask = 0.3 * random(1, 18, 4, 5, seed=2).double() + 0.21, random(1, 9, 4, 5, seed=3).double()
    assert torch.autograd.gradcheck(
        lambda *given: deform_conv2d(*given, weight, 1), (x, offset.requires_grad_(), mask.requires_grad_())
    )


def test_patches_are_channels_channel_first() -> None:
    picture = torch.arange(3 * 4 * 6.0).view(1, 3, 4, 6)
    cut = as_patches(picture, torch.zeros(1, 1, 2, 2))
    assert cut.shape == (1, 3 * 2 * 3, 2, 2)
    for number, (channel, row, column) in enumerate(np.ndindex(3, 2, 3)):
        part = picture[0, channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(cut[0, number], part)


@pytest.fixture
def of_the_notes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """A folder with random statistics in its normalizations, and the working notes' network with its weights.

    The notes' network was compared with the published code: the same logits, to the last bit.
    """
    monkeypatch.syspath_prepend(REFERENCE.parent)  # for its own import of deform_conv
    try:
        kind = runpy.run_path(str(REFERENCE))["BiRefNet"]
    finally:
        sys.modules.pop("deform_conv", None)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name in weights:
        if name.endswith("running_var"):
            weights[name] = 0.5 + torch.rand(weights[name].shape, generator=generator)
        elif name.endswith(("running_mean", ".bias")) or (".bn" in name and name.endswith(".weight")):
            weights[name] = weights[name] + 0.2 * torch.randn(weights[name].shape, generator=generator)
    shutil.copytree(folder, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, tmp_path / "folder" / "model.safetensors")
    network = kind(backbone_config(weights, folder)).eval()
    missing, unexpected = network.load_state_dict(kind.convert(weights), strict=False)
    assert not unexpected
    # the classifier's last normalization, which a backbone does not use, and a table that is computed
    assert all(".swin.layernorm." in name or name.endswith("relative_position_index") for name in missing)
    return tmp_path / "folder", network


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"the working notes are not at {REFERENCE}")
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64), (160, 128)])
@torch.inference_mode()
def test_logits_and_masks_are_those_of_the_working_notes(
    size: tuple[int, int], of_the_notes: tuple[Path, nn.Module]
) -> None:
    folder, network = of_the_notes
    pixels = F.interpolate(random(2, 3, 6, 6), size, mode="bilinear") + 0.1 * random(2, 3, *size, seed=1)
    ours, expected = BiRefNetForeground(folder, device="cpu").model(pixels), network(pixels)
    assert ours.shape == expected.shape == (2, 1, *size)
    assert expected.std() > 0.3, "a flat mask would prove nothing"
    assert agree(ours, expected, 4 * MODEL)
    assert agree(ours.sigmoid(), expected.sigmoid(), 4 * MODEL)


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"the working notes are not at {REFERENCE}")
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_a_pictures_mask_is_that_of_the_working_notes(
    size: tuple[int, int], of_the_notes: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the picture to the mask at its own size; a rounding may fall to the next of the 256 levels."""
    folder, network = of_the_notes
    picture = F.interpolate(torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)), size)
    foreground = BiRefNetForeground(folder, device="cpu")
    ours = foreground.foreground(picture)
    monkeypatch.setattr(foreground, "model", network)
    expected = foreground.foreground(picture)
    assert ours.shape == (2, *size) and expected.std() > 0.05
    assert (ours - expected).abs().max() < 1.01 / 255
    assert (ours - expected).abs().mean() < 0.01 / 255


def test_the_backbones_sizes_are_read_off_the_weights(folder: Path) -> None:
    config = backbone_config(load_file(folder / "model.safetensors"), folder)
    assert (config.embed_dim, config.window_size, config.patch_size) == (12, 4, 4)
    assert (list(config.depths), list(config.num_heads)) == ([1, 1, 2, 1], [1, 2, 2, 4])


def test_the_mask_goes_back_as_the_published_code_does_it(model: BiRefNetForeground) -> None:
    """sigmoid, 255 levels cut off, an 8-bit picture, PIL's default resize."""
    picture = F.interpolate(torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)), (48, 80))
    with torch.no_grad():
        probability = model.model(model.preprocess(picture))[0, 0].sigmoid()
    levels = Image.fromarray((probability * 255).numpy().astype("uint8"))
    expected = np.asarray(levels.resize((80, 48))).astype(int)
    ours = (model.foreground(picture)[0] * 255).round().int().numpy()
    assert ours.shape == (48, 80)
    assert np.abs(ours - expected).max() <= 1
    assert expected.std() > 20


def test_each_picture_alone(folder: Path, model: BiRefNetForeground) -> None:
    images = torch.rand(5, 3, 40, 40)
    masks = model.foreground(images)
    level = 1.01 / 255  # a rounding may fall to the next of the 256 levels
    by_twos = BiRefNetForeground(folder, device="cpu", batch=2).foreground(images)
    assert torch.allclose(by_twos, masks, rtol=0, atol=level)
    assert torch.allclose(model.foreground(images[3:4])[0], masks[3], rtol=0, atol=level)


def test_a_foreground_takes_it_by_its_folder(folder: Path, model: BiRefNetForeground, images: Tensor) -> None:
    foreground = Foreground(folder, device="cpu")
    assert torch.equal(foreground.masks(images), model.foreground(images))
    assert foreground.provenance == model.provenance
    assert "size 64x64 bilinear" in foreground.provenance["preprocessing"]
    assert isinstance(load_back_end(folder), BiRefNetForeground)


def test_it_cuts_out_for_fusion_clip_and_dino(
    folder: Path, model: BiRefNetForeground, clip_folder: Path, tmp_path: Path, images: Tensor
) -> None:
    scorer = FusionScorer(ClipSimilarity(clip_folder, device="cpu"), Foreground(folder, device="cpu"))
    composed = Foreground.composite(images, model.foreground(images))
    assert agree(scorer.exemplar_features(images), scorer.clip.image_features(composed), MODEL)
    assert scorer.provenance["foreground"].startswith(str(folder))
    assert scorer.provenance["foreground_licence"]
    batch = RewardBatch(images[:2], ["x"] * 2, [{"reference": images[2]}] * 2)
    clip = rewards.load("clip_image", model=clip_folder, segmenter=folder, device="cpu").score(batch)
    features = scorer.exemplar_features(images)
    assert agree(clip.values_B, features[:2] @ features[2], MODEL)
    encoder = dino(tmp_path / "dino")
    whole = rewards.load("dino_seg", model=encoder, segmenter=folder, device="cpu").score(batch)
    assert whole.values_B.isfinite().all()
    assert whole.provenance["segmenter"].startswith(str(folder))
    with pytest.raises(ConfigError, match=r"knows no classes\. Take region: foreground"):
        rewards.load("dino_seg", model=encoder, segmenter=folder, region="class")


def test_fusion_of_a_big_model_takes_it(folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    renderer = tiny.sd3(tmp_path / "sd3", card=tiny.SD3_CARD)
    world = load_world(str(renderer), str(clip_folder), str(folder), "cpu")
    exemplars = world.exemplars("owl", 2)
    assert exemplars.features_ME.isfinite().all()
    assert world.segmenter == str(folder)


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (None, "not stated"),
        ("---\nlicense: mit\ntags: [x]\n---\n# BiRefNet", "mit"),
        ("---\nlicense: other\nlicense_name: bria-rmbg-2.0\n---\n", "non-commercial"),
        ("# no front matter\nlicense: mit is what we like", "not stated"),
    ],
)
def test_the_licence_is_shown(readme: str | None, licence: str, tmp_path: Path) -> None:
    foreground = Foreground(birefnet(tmp_path, readme=readme), device="cpu")
    assert licence in foreground.provenance["licence"]
    assert foreground.provenance["revision"] == "local"


@pytest.mark.parametrize("change", ["lacking", "strange", "backbone", "resolution"])
def test_what_is_refused(folder: Path, tmp_path: Path, change: str) -> None:
    weights = load_file(folder / "model.safetensors")
    side = 64
    match change:
        case "lacking":
            del weights["decoder.decoder_block2.dec_att.bn1.weight"]
            message = r"decoder_block2\.dec_att\.bn1\.weight"
        case "strange":
            weights["decoder.refiner.weight"] = torch.zeros(1)
            message = r"refiner\.weight"
        case "backbone":
            weights = {k: w for k, w in weights.items() if not k.startswith("bb.layers.3.")}
            message = "no BiRefNet with a Swin backbone"
        case "resolution":
            side, message = 80, "multiple of 32, got 80"
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pixrl.json").write_text(json.dumps({"resolution": side}))
    with pytest.raises(CheckpointError, match=message):
        load_back_end(tmp_path, device="cpu")


def test_other_folders_stay_semantic_segmentation(segmenter_folder: Path) -> None:
    assert isinstance(load_back_end(segmenter_folder, device="cpu"), Segmenter)
