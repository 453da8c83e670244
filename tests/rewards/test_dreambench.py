"""DreamBench's figures: the encoders' published transforms, all references or one."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.tiny_encoders import dino_v1
from tests.tolerance import MODEL, agree
from torch import Tensor
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, CLIPModel, ViTModel
from transformers.image_utils import PILImageResampling

from pixrl import rewards
from pixrl.errors import ConfigError
from pixrl.rewards.clip import ClipIReward, ClipTReward
from pixrl.rewards.dino import DinoReward
from pixrl.rewards.encoders import ClipSimilarity, DinoEncoder, Transform
from pixrl.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pixrl.types import RewardBatch


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dino_v1(tmp_path_factory.mktemp("tiny") / "dino-vits16")


def pil(images_BCHW: Tensor) -> list[Image.Image]:
    return [Image.fromarray(a) for a in (images_BCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()]


@torch.no_grad()
def official_dino(folder: Path, images_BCHW: Tensor) -> Tensor:
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    states = model(**processor(pil(images_BCHW), return_tensors="pt")).last_hidden_state
    return F.normalize(states[:, 0], dim=-1)


def test_dino_is_the_class_token_after_dreambenchs_transform(dino_folder: Path) -> None:
    images = torch.rand(3, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    features = official_dino(dino_folder, images)
    metadata = [{"reference": images[1:]}, {"reference": images[1]}]
    scores = rewards.load("dino", model=dino_folder, device="cpu").score(
        RewardBatch(images[:2], ["x"] * 2, metadata)
    )
    expected = torch.stack([(features[1:] @ features[0]).mean(), features[1] @ features[1]])
    assert torch.allclose(scores.values_B, expected, atol=2e-3)
    assert scores.provenance["preprocessing"].startswith(
        "8-bit; shortest edge 256 bicubic antialias; centre crop 224"
    )
    assert scores.provenance["mask"] == "none"


def test_the_folders_own_preprocessing_is_another_one(dino_folder: Path, images: Tensor) -> None:
    ours = DinoEncoder(dino_folder, device="cpu", transform=Transform.DREAMBENCH)
    crawled = DinoEncoder(dino_folder, device="cpu")
    assert "size 224x224 bilinear" in crawled.provenance["preprocessing"]
    cosine = (ours.image_features(images) * crawled.image_features(images)).sum(1)
    assert cosine.max() < 0.999
    assert ours.model.pooler is None
    by_option = DinoReward(dino_folder, transform="checkpoint", device="cpu")
    assert by_option.encoder.preprocess == crawled.preprocess


def test_all_references_or_the_first(dino_folder: Path, clip_folder: Path, images: Tensor) -> None:
    metadata = [{"reference": list(images[1:4])}]
    for make, folder in ((DinoReward, dino_folder), (ClipIReward, clip_folder)):
        every, first = (
            make(folder, references=which, device="cpu").score(RewardBatch(images[:1], ["x"], metadata))
            for which in ("all", "first")
        )
        each = [
            make(folder, device="cpu").score(RewardBatch(images[:1], ["x"], [{"reference": image}])).values_B
            for image in images[1:4]
        ]
        assert agree(every.values_B, sum(each) / 3, MODEL)
        assert agree(first.values_B, each[0], MODEL)
        assert (every.provenance["references"], first.provenance["references"]) == ("all", "first")
    with pytest.raises(ConfigError, match=r"clip_i: unknown references 'one'\. Use all, first"):
        ClipIReward(clip_folder, references="one")


@torch.no_grad()
def test_clip_i_and_clip_t_are_transformers_cosines(clip_folder: Path) -> None:
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    prompts = ["a backpack in the jungle", "a cat"]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    clip = ClipSimilarity(clip_folder, device="cpu")
    words = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(pil(images), return_tensors="pt")
    output = model(**pixels, **words)
    batch = RewardBatch(images, prompts, [{"reference": images[1]}, {"reference": images[1]}])
    texts = ClipTReward(clip_folder, device="cpu").score(batch).values_B
    pictures = ClipIReward(clip_folder, device="cpu").score(batch).values_B
    assert agree(texts, (output.image_embeds * output.text_embeds).sum(1), MODEL, scale=1)
    assert agree(pictures, output.image_embeds @ output.image_embeds[1], MODEL)


def test_clip_t_can_count_below_0_as_0(clip_folder: Path, images: Tensor) -> None:
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    batch = RewardBatch(images, prompts)
    plain, clamped = (ClipTReward(clip_folder, clamp=clamp, device="cpu") for clamp in (False, True))
    sign = torch.tensor([1.0, -1, 1, -1, 1])
    for reward in (plain, clamped):
        texts = reward.clip.image_features(images) * sign[:, None]
        reward.clip._texts.update(zip(prompts, texts, strict=True))  # cosines of exactly 1 and -1
    assert agree(plain.score(batch).values_B, sign, MODEL)
    assert agree(clamped.score(batch).values_B, sign.clamp_min(0), MODEL)
    assert plain.provenance["below_0"] == "kept"
    assert clamped.provenance["below_0"] == "counts as 0"


def test_names_and_published_defaults(clip_folder: Path, dino_folder: Path) -> None:
    assert ClipIReward(clip_folder).name == "clip_i"
    assert ClipTReward(clip_folder).name == "clip_t"
    assert DinoReward(dino_folder).name == "dino"
    defaults = {
        make: inspect.signature(make).parameters["model"].default
        for make in (ClipIReward, ClipTReward, DinoReward)
    }
    assert defaults[ClipIReward] == defaults[ClipTReward] == "openai/clip-vit-base-patch32"
    assert defaults[DinoReward] == "facebook/dino-vits16"
