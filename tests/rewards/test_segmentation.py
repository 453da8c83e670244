"""Foreground masks and objects from class maps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny
from tests.tolerance import MODEL, agree, rounding
from torch import Tensor

from pixrl.errors import CheckpointError, InputError, ShapeError
from pixrl.rewards.segmentation import Foreground, Segmenter


def painted(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, label_HW: np.ndarray, sure: float = 0.9
) -> None:
    """Makes the segmenter see a given class map."""
    others = (1 - sure) / (len(tiny.KINDS) - 1)
    map_CHW = torch.full((len(tiny.KINDS), *label_HW.shape), others)
    map_CHW.scatter_(0, torch.from_numpy(label_HW)[None], sure)
    logits_CHW = map_CHW.log()
    monkeypatch.setattr(segmenter, "logits", lambda images: logits_CHW.expand(len(images), -1, -1, -1))


def test_masks_are_one_minus_the_background(segmenter: Segmenter, images: Tensor) -> None:
    masks = Foreground(segmenter).masks(images)
    probabilities = segmenter.probabilities(images)
    assert masks.shape == (5, 32, 32)
    assert agree(masks, probabilities[:, 1:].sum(dim=1), MODEL)
    assert agree(probabilities.sum(dim=1), torch.ones(5, 32, 32), 16)


def test_masks_do_not_depend_on_the_batch(
    segmenter_folder: Path, segmenter: Segmenter, images: Tensor
) -> None:
    together = Foreground(segmenter).masks(images)
    assert agree(Foreground(segmenter).masks(images[3:4]), together[3:4], MODEL)
    small = Segmenter(segmenter_folder, batch=2, device="cpu")
    assert agree(Foreground(small).masks(images), together, MODEL)
    of_both = [(one.probabilities(images), one.objects(images)) for one in (small, segmenter)]
    assert agree(of_both[0][0], of_both[1][0], MODEL)
    labels, objects = zip(*((x.argmax(dim=1), found) for x, found in of_both), strict=True)
    alike = [
        row for row in range(len(images)) if torch.equal(labels[0][row], labels[1][row])
    ]  # no pixel is a tie
    assert alike
    for row in alike:
        one, other = ([(kind, x) for kind, xs in of[row].items() for x in xs] for of in objects)
        assert [(kind, x["box"]) for kind, x in one] == [(kind, x["box"]) for kind, x in other]
        scores = ([x["score"] for _, x in found] for found in (one, other))
        assert next(scores) == pytest.approx(next(scores), abs=rounding(torch.float32, MODEL))


def test_composite_is_soft(images: Tensor) -> None:
    masks = torch.full((5, 32, 32), 0.25)
    masks[0] = 1
    masks[1] = 0
    result = Foreground.composite(images, masks, (1.0, 0.5, 0.0))
    assert torch.equal(result[0], images[0])
    assert agree(result[1], torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1).expand(3, 32, 32), 8)
    background = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)
    assert agree(result[2], 0.25 * images[2] + 0.75 * background, 8)


def test_presence_needs_enough_foreground() -> None:
    foreground = Foreground(lambda images: images[:, 0], min_area=0.1)
    masks = torch.zeros(4, 10, 10)
    masks[1, 0, :] = 1
    masks[2, :2, :] = 0.6
    masks[3] = torch.nan
    assert foreground.is_present(masks).tolist() == [False, False, True, False]


def test_objects_are_connected_regions(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.zeros((40, 40), dtype=np.int64)
    labels[2:10, 3:9] = 1
    labels[20:30, 25:40] = 1
    labels[30:36, 2:8] = 2
    labels[0, 39] = 3  # a speck
    painted(segmenter, monkeypatch, labels)
    (found,) = segmenter.objects(torch.zeros(1, 3, 40, 40))
    assert found.keys() == {"owl", "snail"}
    assert sorted(d["box"] for d in found["owl"]) == [[3.0, 2.0, 9.0, 10.0], [25.0, 20.0, 40.0, 30.0]]
    assert found["snail"][0]["box"] == [2.0, 30.0, 8.0, 36.0]
    odds = (0.9 / (0.1 / 3)) ** 4  # four looks at 0.9 against 0.1 / 3 for each of the two other kinds
    expected = pytest.approx(odds / (odds + 2), abs=rounding(torch.float32, 64))
    assert all(d["score"] == expected and d["color"] is None for one in found.values() for d in one)


def test_the_score_is_of_the_kinds_and_not_lowered_by_the_background(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_CHW = torch.full((len(tiny.KINDS), 10, 10), 0.02)
    map_CHW[0], map_CHW[1] = 0.46, 0.5
    monkeypatch.setattr(segmenter, "logits", lambda images: map_CHW[None].log())
    ((unsure_of_background,),) = segmenter.instances(torch.zeros(1, 3, 10, 10))
    map_CHW[0], map_CHW[1], map_CHW[2] = 0.02, 0.5, 0.46
    ((unsure_of_kind,),) = segmenter.instances(torch.zeros(1, 3, 10, 10))
    assert unsure_of_background.score > 0.9 > unsure_of_kind.score > 0.5


def test_the_evidence_comes_from_the_card(tmp_path: Path) -> None:
    tiny.segmenter(tmp_path)
    (tmp_path / "pixrl.json").write_text(json.dumps({"score_evidence": 1.0}))
    assert Segmenter(tmp_path).evidence == 1.0
    assert Segmenter(tmp_path).provenance["score_evidence"] == "1"


def test_regions_that_touch_at_a_corner_are_one(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros((20, 20), dtype=np.int64)
    labels[2:6, 2:6] = labels[6:10, 6:10] = 1
    painted(segmenter, monkeypatch, labels)
    assert [d["box"] for d in segmenter.objects(torch.zeros(1, 3, 20, 20))[0]["owl"]] == [
        [2.0, 2.0, 10.0, 10.0]
    ]


def test_a_box_that_holds_a_hole_of_another_class_keeps_its_own_pixels(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros((20, 20), dtype=np.int64)
    labels[2:18, 2:18] = 1
    labels[8:12, 8:12] = 2
    painted(segmenter, monkeypatch, labels)
    (found,) = segmenter.instances(torch.zeros(1, 3, 20, 20))
    owl = next(instance for instance in found if instance.kind == "owl")
    assert owl.mask_HW.sum() == 16 * 16 - 4 * 4
    assert not owl.mask_HW[9, 9]


def test_a_picture_of_background_has_no_objects(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted(segmenter, monkeypatch, np.zeros((8, 8), dtype=np.int64))
    assert segmenter.objects(torch.zeros(2, 3, 8, 8)) == [{}, {}]


def test_the_least_area_comes_from_the_card(tmp_path: Path) -> None:
    tiny.segmenter(tmp_path)
    (tmp_path / "pixrl.json").write_text(json.dumps({"min_area": 0.02}))
    segmenter = Segmenter(tmp_path)
    assert segmenter.min_area == 0.02
    assert segmenter.provenance["min_area"] == "0.02"


def test_a_model_without_a_background_class(tmp_path: Path) -> None:
    tiny.segmenter(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"]["0"] = "wall"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"none of its classes is called 'background'.*wall, owl"):
        Segmenter(tmp_path)


def test_back_ends_that_are_refused(images: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"gave \[5, 3, 32\] for masks of \[5, 32, 32\]"):
        Foreground(lambda batch: batch[..., 0]).masks(images)
    with pytest.raises(InputError, match="checkpoint or a callable"):
        Foreground(7)  # type: ignore[arg-type]
