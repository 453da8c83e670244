"""Rewards that say they are differentiable: the same value as `score`, and a gradient that is the true slope."""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tests.tiny_dino import dino
from tests.tiny_encoders import dino_v1, hpsv2, laion_head, siglip, siglip_head
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl import rewards
from pixrl.rewards.base import DifferentiableReward
from pixrl.rewards.clip import ClipImageReward
from pixrl.rewards.dino import DinoSegReward
from pixrl.rewards.references import FeatureCache, ReferenceReward
from pixrl.rewards.segmentation import Foreground
from pixrl.types import RewardBatch

PROMPTS = ["a red owl", "two cats", "a red owl", "a snail", "an owl on grass"]


def left_half(images: Tensor) -> Tensor:
    masks = torch.zeros(len(images), *images.shape[-2:])
    masks[..., : images.shape[-1] // 2] = 1
    return masks


def make_hpsv2(folder: Path, clip: Path) -> dict[str, object]:
    published, words = hpsv2(folder)
    return {"model": published, "processor": words}


def make_v25(folder: Path, clip: Path) -> dict[str, object]:
    head = siglip_head(folder / "aesthetic_predictor_v2_5.pth", 32)
    return {
        "version": "v2.5",
        "accept_licence": "AGPL-3.0",
        "head": head,
        "model": siglip(folder / "siglip"),
    }


MAKE: dict[str, tuple[str, Callable[[Path, Path], dict[str, object]]]] = {
    "clip_text": ("clip_text", lambda folder, clip: {"model": clip}),
    "clip_t": ("clip_t", lambda folder, clip: {"model": clip}),
    "clip_i": ("clip_i", lambda folder, clip: {"model": clip}),
    "clip_image": ("clip_image", lambda folder, clip: {"model": clip, "segmenter": left_half}),
    "preference": ("preference", lambda folder, clip: {"model": clip, "scale": "div26"}),
    "hpsv2": ("hpsv2", make_hpsv2),
    "aesthetic": (
        "aesthetic",
        lambda folder, clip: {
            "model": clip,
            "head": laion_head(folder / "sac+logos+ava1-l14-linearMSE.pth", 16),
        },
    ),
    "aesthetic v2.5": ("aesthetic", make_v25),
    "dino": ("dino", lambda folder, clip: {"model": dino_v1(folder / "dino")}),
    "dino_seg": ("dino_seg", lambda folder, clip: {"model": dino(folder / "dino"), "segmenter": left_half}),
}
ELSEWHERE = {"image_reward", "hpsv3", "vqascore"}
"""Tested in files of their own."""


@pytest.fixture(params=MAKE)
def reward(request: pytest.FixtureRequest, tmp_path: Path, clip_folder: Path) -> DifferentiableReward:
    name, options = MAKE[request.param]
    made = rewards.load(name, device="cpu", **options(tmp_path, clip_folder))
    assert isinstance(made, DifferentiableReward)
    return made


@pytest.fixture
def soft(images: Tensor) -> Tensor:
    """Pictures away from black and white, where nothing is clamped."""
    return 0.2 + 0.6 * images


@pytest.fixture
def metadata(images: Tensor) -> list[dict[str, object]]:
    return [{"reference": images[k].roll(9, dims=2)} for k in range(5)]


def test_every_reward_of_that_type_is_here() -> None:
    of_that_type = set()
    for name, place in rewards.REWARDS.items():
        module, _, made = place.partition(":")
        kind = vars(import_module(module))[made]
        kind = kind if inspect.isclass(kind) else inspect.get_annotations(kind)["return"]
        if issubclass(kind, DifferentiableReward):
            of_that_type.add(name)
    assert of_that_type - ELSEWHERE == {name for name, _ in MAKE.values()}


def test_value_and_slope(
    reward: DifferentiableReward, soft: Tensor, metadata: list[dict[str, object]]
) -> None:
    pictures = soft.clone().requires_grad_()
    scores = reward.differentiable_scores(pictures, PROMPTS, metadata)
    assert (scores.shape, scores.dtype) == ((5,), torch.float32)
    exact = reward.score(RewardBatch(soft, PROMPTS, metadata)).values_B
    spread = max(exact.std().item(), 0.05)
    assert (scores - exact).abs().max() < 0.1 * spread

    (slope,) = torch.autograd.grad(scores.sum(), pictures)
    length = slope.norm()
    assert slope.isfinite().all()
    assert (slope.flatten(1).norm(dim=1) > 0).all()
    step = 0.05 * slope / length
    with torch.no_grad():
        above = reward.differentiable_scores(soft + step, PROMPTS, metadata).double().sum()
        below = reward.differentiable_scores(soft - step, PROMPTS, metadata).double().sum()
    assert (above - below).item() / 0.1 == pytest.approx(length.item(), rel=0.03)


def test_each_picture_alone(
    reward: DifferentiableReward, soft: Tensor, metadata: list[dict[str, object]]
) -> None:
    together = reward.differentiable_scores(soft, PROMPTS, metadata)
    for row in range(5):
        alone = reward.differentiable_scores(soft[[row]], PROMPTS[row : row + 1], metadata[row : row + 1])
        assert agree(alone, together[[row]], 4 * MODEL)


def test_it_goes_on_after_score_and_leaves_no_gradient_in_the_model(
    reward: DifferentiableReward, soft: Tensor, metadata: list[dict[str, object]]
) -> None:
    """Embeddings of prompts and references that `score` kept come from inference mode, which autograd refuses."""
    before = reward.score(RewardBatch(soft, PROMPTS, metadata)).values_B
    pictures = soft.clone().requires_grad_()
    reward.differentiable_scores(pictures, PROMPTS, metadata).sum().backward()
    assert pictures.grad is not None
    after = reward.score(RewardBatch(soft, PROMPTS, metadata)).values_B
    assert torch.equal(before, after)
    assert not after.requires_grad


def test_a_step_along_the_gradient_is_a_better_picture(
    reward: DifferentiableReward, soft: Tensor, metadata: list[dict[str, object]]
) -> None:
    """By `score`, rounding and all: what is optimized is what is reported.

    To a random CLIP all pictures are all but alike, so one step is enough there.
    """
    before = reward.score(RewardBatch(soft, PROMPTS, metadata)).values_B
    pictures = soft.clone()
    for _ in range(1 if isinstance(reward, ClipImageReward) else 4):
        pictures.requires_grad_()
        (slope,) = torch.autograd.grad(
            reward.differentiable_scores(pictures, PROMPTS, metadata).sum(), pictures
        )
        unit = slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        pictures = (pictures + 0.25 * unit).detach().clamp(0, 1)
    assert (reward.score(RewardBatch(pictures, PROMPTS, metadata)).values_B > before).all()


def test_a_broken_picture_is_nan_and_harms_no_other(
    reward: DifferentiableReward, soft: Tensor, metadata: list[dict[str, object]]
) -> None:
    broken = soft.clone()
    broken[1, 0, 0, 0] = torch.nan
    broken.requires_grad_()
    scores = reward.differentiable_scores(broken, PROMPTS, metadata)
    assert scores.isnan().tolist() == [False, True, False, False, False]
    (slope,) = torch.autograd.grad(scores[scores.isfinite()].sum(), broken)
    assert slope[[0, 2, 3, 4]].isfinite().all()
    assert (slope[0] != 0).any()


@pytest.fixture(params=["dino_seg", "clip_image"])
def cutting(request: pytest.FixtureRequest, tmp_path: Path, clip_folder: Path) -> ReferenceReward:
    """A reward that looks at the left half alone."""
    if request.param == "dino_seg":
        return DinoSegReward(dino(tmp_path / "dino"), segmenter=left_half, device="cpu")
    return ClipImageReward(clip_folder, segmenter=left_half, device="cpu")


def test_only_the_subject_gets_a_gradient(
    cutting: ReferenceReward, soft: Tensor, metadata: list[dict[str, object]]
) -> None:
    pictures = soft.clone().requires_grad_()
    scores = cutting.differentiable_scores(pictures, PROMPTS, [{}, *metadata[1:]])
    assert scores.isnan().tolist() == [True, False, False, False, False]
    (slope,) = torch.autograd.grad(scores[scores.isfinite()].sum(), pictures)
    assert (slope[..., 16:] == 0).all()
    assert (slope[1:, :, :, :16] != 0).any()
    assert (slope[0] == 0).all()


def test_masks_and_references_get_no_gradient(cutting: ReferenceReward, soft: Tensor) -> None:
    """Masks that hang on the picture give the slope of the same masks held still."""

    def by_brightness(images: Tensor) -> Tensor:
        return images.mean(dim=1)

    held = by_brightness(soft)
    reference = soft[4].clone().requires_grad_()
    slopes = []
    for masks in (by_brightness, lambda images: held if len(images) == 5 else held[4:]):
        cutting._foreground = Foreground(masks, min_area=0.0)  # type: ignore[attr-defined]
        cutting._cache = FeatureCache()
        pictures = soft.clone().requires_grad_()
        scores = cutting.differentiable_scores(pictures, PROMPTS, [{"reference": reference}] * 5)
        slope, none = torch.autograd.grad(scores.sum(), [pictures, reference], allow_unused=True)
        assert none is None
        slopes.append(slope)
    assert torch.equal(*slopes)
    assert (slopes[0].flatten(1).norm(dim=1) > 0).all()
