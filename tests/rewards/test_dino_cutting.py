"""What the identity reward cuts out: the class that is asked for, on the given colour, for each subject apart."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.tiny_dino import dino
from tests.tolerance import MODEL, agree, rounding
from torch import Tensor

from pixrl.rewards.dino import DinoSegReward
from pixrl.rewards.encoders import DinoEncoder
from pixrl.rewards.segmentation import WHITE, Colour, Foreground, Segmenter
from pixrl.types import RewardBatch, Scores


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dino(tmp_path_factory.mktemp("tiny") / "dino")


@pytest.fixture(scope="module")
def segmenter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.segmenter(tmp_path_factory.mktemp("tiny") / "segmenter")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def halves(images_BCHW: Tensor, kinds: Sequence[object]) -> Tensor:
    """Owls are on the left, everything else on the right; in black pictures there is nothing."""
    masks = torch.zeros(len(images_BCHW), *images_BCHW.shape[-2:])
    for row, kind in enumerate(kinds):
        side = slice(0, 16) if kind == "owl" else slice(16, 32)
        masks[row, :, side] = float(images_BCHW[row].amax() > 0)
    return masks


@pytest.fixture
def by_class(dino_folder: Path, segmenter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> DinoSegReward:
    monkeypatch.setattr(Segmenter, "class_masks", lambda self, images, kinds: halves(images, kinds))
    return DinoSegReward(dino_folder, segmenter=segmenter_folder, region="class", device="cpu")


def score(made: DinoSegReward, image: Tensor, metadata: dict[str, object]) -> Scores:
    return made.score(RewardBatch(image[None], ["x"], [metadata]))


def expected(folder: Path, image: Tensor, reference: Tensor, kind: str, background: Colour = WHITE) -> Tensor:
    pictures = torch.stack([image, reference])
    cut = Foreground.composite(pictures, halves(pictures, [kind] * 2), background)
    ours, theirs = DinoEncoder(folder, device="cpu").image_features(cut)
    return (ours * theirs).sum()


def test_each_class_is_cut_out_by_itself(by_class: DinoSegReward, dino_folder: Path, images: Tensor) -> None:
    """The same reference for two classes: neither region nor cached features may be mixed up."""
    found = {}
    for kind in ("owl", "snail"):
        scores = score(by_class, images[0], {"reference": images[1], "class": kind})
        found[kind] = scores.values_B[0]
        assert agree(found[kind], expected(dino_folder, images[0], images[1], kind), MODEL)
    assert abs(found["owl"] - found["snail"]) > 1e-3


def test_the_background_is_the_one_that_is_given(dino_folder: Path, images: Tensor) -> None:
    values = []
    for background in ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0)):
        made = DinoSegReward(
            dino_folder,
            segmenter=lambda pictures: halves(pictures, ["owl"] * len(pictures)),
            background=background,
            device="cpu",
        )
        values.append(score(made, images[0], {"reference": images[1]}).values_B[0])
        known = expected(dino_folder, images[0], images[1], "owl", background=background)
        assert agree(values[-1], known, MODEL)
    assert abs(values[0] - values[1]) > 2 * rounding(torch.float32, MODEL)


def test_the_preflight_looks_at_the_rewards_own_subject(
    dino_folder: Path, segmenter_folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segmenter, "class_masks", lambda self, images, kinds: halves(images, kinds))
    metadata: dict[str, object] = {
        "class": "owl",
        "reference": images[0],
        "subjects": [
            {"class": "owl", "reference": images[1]},
            {"class": "snail", "reference": [torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)]},
        ],
    }
    first, second = (
        DinoSegReward(dino_folder, segmenter=segmenter_folder, region="class", subject=number, device="cpu")
        for number in (0, 1)
    )
    assert first.reference_problem(metadata) is None and first.unused_references(metadata) == []
    assert second.reference_problem(metadata) == "no snail found in the reference"
    assert second.unused_references(metadata) == [1, 2]


def test_each_picture_of_a_batch_has_its_own_class_and_references(
    by_class: DinoSegReward, dino_folder: Path, images: Tensor
) -> None:
    """Three pictures of two classes; the mean over two references, of which the order must not matter."""
    kinds = ("owl", "snail", "snail")
    references = ([images[1], images[2]], [images[3]], [images[0]])
    metadata = [{"reference": one, "class": kind} for one, kind in zip(references, kinds, strict=True)]
    found = by_class.score(RewardBatch(images[:3], ["x"] * 3, metadata)).values_B
    for row, (kind, own) in enumerate(zip(kinds, references, strict=True)):
        each = [expected(dino_folder, images[row], reference, kind) for reference in own]
        assert agree(found[row], torch.stack(each).mean(), MODEL)


def test_of_several_subjects_each_reward_judges_its_own(
    dino_folder: Path, segmenter_folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segmenter, "class_masks", lambda self, images, kinds: halves(images, kinds))
    subjects = [{"class": "owl", "reference": images[1]}, {"class": "snail", "reference": images[2]}]
    metadata = {"class": "cat", "reference": images[3], "subjects": subjects}
    for number, (kind, reference) in enumerate((("owl", images[1]), ("snail", images[2]))):
        made = DinoSegReward(
            dino_folder, segmenter=segmenter_folder, region="class", subject=number, device="cpu"
        )
        found = score(made, images[0], metadata).values_B[0]
        assert agree(found, expected(dino_folder, images[0], reference, kind), MODEL)


def test_no_gradient_passes_through_the_masks(dino_folder: Path, images: Tensor) -> None:
    seen = []

    def masks(pictures: Tensor) -> Tensor:
        seen.append(pictures.requires_grad)
        return halves(pictures, ["owl"] * len(pictures))

    made = DinoSegReward(dino_folder, segmenter=masks, device="cpu")
    leaf = images[:1].clone().requires_grad_()
    made.differentiable_scores(leaf, ["x"], [{"reference": images[1]}]).sum().backward()
    assert seen and not any(seen)
    assert leaf.grad is not None and leaf.grad[..., :16].any() and not leaf.grad[..., 16:].any()


@pytest.mark.parametrize("cut", ["both", "reference"])
def test_a_mask_of_ones_own_cuts_out_its_reference(cut: str, dino_folder: Path, images: Tensor) -> None:
    """The segmenter takes the left half of everything; the user's mask the right half of the reference."""
    made = DinoSegReward(
        dino_folder,
        segmenter=lambda pictures: halves(pictures, ["owl"] * len(pictures)),
        mask=cut,
        device="cpu",
    )
    right = halves(images[1:2], ["snail"])
    own = right.expand(3, -1, -1)
    masks = torch.cat([halves(images[:1], ["owl"]) if cut == "both" else torch.ones(1, 32, 32), right])
    ours, theirs = DinoEncoder(dino_folder, device="cpu").image_features(
        Foreground.composite(images[:2], masks)
    )
    given = {"reference": [images[1]], "mask": [own]}
    assert agree(score(made, images[0], given).values_B[0], (ours * theirs).sum(), MODEL)
    without = score(made, images[0], {"reference": [images[1]]}).values_B[0]  # which finds no cached features
    assert not agree(score(made, images[0], given).values_B[0], without, MODEL)
    some = score(made, images[0], {"reference": [images[1], images[2]], "mask": [own, None]}).values_B[0]
    other = score(made, images[0], {"reference": [images[2]]}).values_B[0]
    assert agree(some, ((ours * theirs).sum() + other) / 2, MODEL)


def test_whole_pictures_take_no_notice_of_masks(dino_folder: Path, images: Tensor) -> None:
    made = DinoSegReward(dino_folder, mask="none", device="cpu")
    own = halves(images[1:2], ["snail"]).expand(3, -1, -1)
    values = [
        score(made, images[0], {"reference": [images[1]], **more}).values_B for more in ({}, {"mask": [own]})
    ]
    assert values[0].equal(values[1])
