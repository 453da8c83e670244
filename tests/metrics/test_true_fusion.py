"""What maps of parts say of pictures that should mix two or three concepts; and the figures that rest on it."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from tests import tiny

from pixrl.errors import CheckpointError, InputError
from pixrl.metrics.fusion import figures
from pixrl.metrics.true_fusion import Fusion, FusionTruth, FusionVerdict, PartClasses, judge, require_truth

LABELS = ("snail shell", "worn", "owl head", "background", "owl body", "snail body", "mixed", "cup body")
"""In no order, and not every kind in every slot."""
PARTS = PartClasses.of(LABELS, "parts")
PAIR = ("owl", "snail")
SIDE = 20


def blank():
    return np.full((SIDE, SIDE), LABELS.index("background"))


def painted(*boxes):
    """A map with boxes of classes: (class, rows, columns)."""
    classes = blank()
    for label, rows, columns in boxes:
        classes[slice(*rows), slice(*columns)] = LABELS.index(label)
    return classes


def test_shares_are_of_the_visible_area_of_parts():
    classes = painted(("owl head", (2, 6), (5, 15)), ("snail body", (6, 14), (5, 15)))
    found = judge(classes, PAIR, PARTS)
    assert found.verdict is FusionVerdict.FUSION and found.is_true
    assert found.shares == pytest.approx((1 / 3, 2 / 3))
    assert found.balance == pytest.approx(0.5)
    assert judge(classes, PAIR[::-1], PARTS).shares == pytest.approx((2 / 3, 1 / 3))


def test_what_is_worn_belongs_to_the_figure_and_to_no_kind():
    bare = painted(("owl head", (4, 8), (5, 15)), ("snail body", (8, 16), (5, 15)))
    dressed = painted(
        ("worn", (1, 4), (5, 15)), ("owl head", (4, 8), (5, 15)), ("snail body", (8, 16), (5, 15))
    )
    assert judge(dressed, PAIR, PARTS).shares == pytest.approx(judge(bare, PAIR, PARTS).shares)


@pytest.mark.parametrize(
    ("classes", "verdict"),
    [
        (blank(), FusionVerdict.NOTHING),
        (painted(("owl head", (2, 4), (2, 5))), FusionVerdict.NOTHING),  # 6 of 400 pixels
        (painted(("worn", (2, 16), (2, 16))), FusionVerdict.NOTHING),  # ink, and nothing of anyone
        (
            painted(("owl head", (2, 8), (2, 8)), ("snail body", (12, 18), (12, 18))),
            FusionVerdict.SIDE_BY_SIDE,
        ),
        (painted(("owl head", (2, 8), (2, 18)), ("owl body", (8, 18), (2, 18))), FusionVerdict.IMBALANCE),
        (painted(("cup body", (2, 18), (2, 18))), FusionVerdict.THIRD_KIND),
        (
            painted(
                ("owl head", (2, 6), (2, 18)),
                ("snail body", (6, 12), (2, 18)),
                ("cup body", (12, 13), (2, 18)),
            ),
            FusionVerdict.FUSION,
        ),  # a sixth of the slot's area is a speck of the segmentation: the slot is the snail's
        (
            painted(
                ("owl head", (2, 6), (2, 18)),
                ("snail body", (6, 12), (2, 18)),
                ("cup body", (12, 18), (2, 18)),
            ),
            FusionVerdict.THIRD_KIND,
        ),  # half of one slot is a third kind's
        (
            painted(
                ("owl head", (2, 6), (2, 18)),
                ("snail body", (6, 12), (2, 18)),
                ("owl body", (12, 17), (2, 18)),
            ),
            FusionVerdict.FUSION,
        ),  # between the parents a slot is the larger one's
        (
            painted(
                ("owl head", (2, 6), (2, 18)), ("snail body", (6, 14), (2, 18)), ("mixed", (14, 18), (2, 18))
            ),
            FusionVerdict.OVERLAY,
        ),
        (
            painted(
                ("owl head", (2, 6), (2, 18)), ("snail body", (6, 16), (2, 18)), ("mixed", (16, 18), (2, 18))
            ),
            FusionVerdict.FUSION,
        ),  # an eighth of the figure is pasted
    ],
)
def test_each_failure_has_its_name(classes, verdict):
    found = judge(classes, PAIR, PARTS)
    assert found.verdict is verdict
    assert (found.balance > 0) is (verdict is FusionVerdict.FUSION) is found.is_true


def test_a_piece_apart_is_an_object_from_a_twelfth_of_what_is_drawn_and_touching_corners_join():
    whole = (("owl head", (2, 8), (2, 14)), ("snail body", (8, 14), (2, 14)))
    assert judge(painted(*whole, ("owl head", (17, 19), (2, 7))), PAIR, PARTS).is_true  # 10 of 154
    assert (
        judge(painted(*whole, ("owl head", (16, 20), (2, 6))), PAIR, PARTS).verdict
        is FusionVerdict.SIDE_BY_SIDE
    )
    touching = painted(*whole, ("owl body", (14, 18), (14, 18)))
    assert judge(touching, PAIR, PARTS).verdict is not FusionVerdict.SIDE_BY_SIDE


def test_three_parents_need_a_part_each():
    two = painted(("owl head", (2, 8), (2, 18)), ("snail body", (8, 18), (2, 18)))
    assert judge(two, ("owl", "snail", "cup"), PARTS).verdict is FusionVerdict.IMBALANCE
    three = painted(
        ("owl head", (2, 6), (2, 18)), ("snail shell", (6, 12), (2, 18)), ("cup body", (12, 18), (2, 18))
    )
    assert judge(three, ("owl", "snail", "cup"), PARTS).balance == pytest.approx(4 / 6)
    third = judge(three, PAIR, PARTS)
    assert third.verdict is FusionVerdict.THIRD_KIND
    assert third.shares == pytest.approx((4 / 16, 6 / 16)), "shares are of everyone's parts"


@pytest.mark.parametrize("parents", [(), ("owl",), ("owl", "owl"), ("owl", "dragon")])
def test_parents_that_make_no_fusion_are_refused(parents):
    with pytest.raises(InputError, match="two or more different parents of snail, owl, cup; given"):
        judge(blank(), parents, PARTS)


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (("background", "owl"), "'owl' is no part"),
        (("owl head", "owl body"), "lacks"),
        (("background", "worn"), "lacks"),
        ((), "lacks"),
    ],
)
def test_other_segmentations_are_refused(labels, why):
    with pytest.raises(CheckpointError, match=f"does not tell the parts of kinds: .*{why}"):
        PartClasses.of(labels, "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny.segmenter(tmp_path_factory.mktemp("parts"), labels=LABELS)
    (path / "pixrl.json").write_text('{"synonyms": {"mug": "cup", "toad": "frog"}}')
    return path


def test_a_checkpoint_judges_pictures_by_their_most_probable_classes(folder):
    truth = FusionTruth(folder, device="cpu")
    images_BCHW = torch.rand(5, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    maps_BHW = truth.segmenter.probabilities(images_BCHW).argmax(dim=1)
    assert len(maps_BHW.unique()) > 1
    assert truth.judge(images_BCHW, PAIR) == tuple(judge(one.numpy(), PAIR, truth.parts) for one in maps_BHW)
    assert truth.judge(images_BCHW, ("owl", "mug")) == truth.judge(images_BCHW, ("owl", "cup"))
    for concepts in (("mug", "cup"), ("owl", "toad"), ("owl", "snial")):
        with pytest.raises(InputError, match="different parents"):
            truth.judge(images_BCHW, concepts)
        with pytest.raises(InputError, match="different parents"):
            require_truth(folder, "parts", concepts)
    require_truth(folder, "parts", ("owl", "mug"))


def test_a_segmentation_of_kinds_is_refused_by_its_files(tmp_path):
    place = tiny.segmenter(tmp_path)
    for check in (lambda: FusionTruth(place, device="cpu"), lambda: require_truth(place, str(place), PAIR)):
        with pytest.raises(CheckpointError, match="does not tell the parts of kinds"):
            check()


def fusion(balance):
    verdict = FusionVerdict.FUSION if balance else FusionVerdict.OVERLAY
    return Fusion(verdict, (0.5, 0.5), balance)


def test_figures_by_the_truth():
    similarities_BN = torch.tensor([[0.9, 0.9], [0.8, 0.8], [0.7, 0.1], [0.6, 0.6], [math.nan, math.nan]])
    truths = [fusion(balance) for balance in (0.0, 0.9, 0.0, 0.4, 0.8)]
    found = figures(similarities_BN, 5.0, 0.65, 0.05, (1, 0), truths)
    assert found.true_fusions == pytest.approx(3 / 5)
    assert found.selected_true == 1
    assert found.false_passes == pytest.approx(1 / 2)  # candidates are pictures 0 and 1
    # ranks of rewards (4, 3, 1, 2) and of balance (1.5, 4, 1.5, 3) of the four that were scored
    assert found.agreement == pytest.approx(np.corrcoef([4, 3, 1, 2], [1.5, 4, 1.5, 3])[0, 1])
    unchosen = figures(similarities_BN, 5.0, 0.95, 0.05, (), truths)
    assert unchosen.selected_true == 0  # picture 0 has the best reward
    assert math.isnan(unchosen.false_passes)


def test_without_truth_nothing_is_claimed_and_where_all_are_equal_no_agreement_is():
    similarities_BN = torch.tensor([[0.9, 0.9], [0.8, 0.8]])
    untold = figures(similarities_BN, 5.0, 0.65, 0.05, (0,))
    names = ("true_fusions", "selected_true", "false_passes", "agreement")
    assert all(math.isnan(asdict(untold)[name]) and untold.to_json()[name] is None for name in names)
    same = figures(similarities_BN, 5.0, 0.65, 0.05, (0,), [fusion(0.5), fusion(0.5)])
    assert math.isnan(same.agreement) and same.false_passes == 0
