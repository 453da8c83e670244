"""GenEval's rule line by line on hand-made boxes, and the reward that makes its own detections."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl import rewards
from pixrl.errors import InputError
from pixrl.rewards.geneval import COLORS, GenEvalReward, Verdict, grade, judge, relative_position
from pixrl.rewards.segmentation import Instance, Segmenter
from pixrl.types import RewardBatch

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "geneval_evaluation_metadata.jsonl"
HERE = (0.0, 0.0, 10.0, 10.0)


def box(score: float = 0.8, at: tuple[float, ...] = HERE, color: str | None = None) -> dict[str, object]:
    return {"box": list(at), "score": score, "color": color}


def entry(kind: str = "owl", count: int = 1, **more: object) -> dict[str, object]:
    return {"class": kind, "count": count, **more}


def wants(*include: dict[str, object], tag: str = "single_object", **more: object) -> dict[str, object]:
    return {"tag": tag, "include": list(include), **more}


def shifted(dx: float, dy: float) -> tuple[float, ...]:
    return (dx, dy, dx + 10, dy + 10)


@pytest.mark.parametrize(
    ("score", "correct"), [(0.31, True), (0.3, False), (0.29, False), (float("nan"), False)]
)
def test_the_threshold_is_strict(score: float, correct: bool) -> None:
    assert judge({"owl": [box(score)]}, wants(entry())).correct is correct


@pytest.mark.parametrize(("score", "correct"), [(0.91, True), (0.9, False), (0.5, False)])
def test_counting_has_a_threshold_of_its_own(score: float, correct: bool) -> None:
    assert judge({"owl": [box(score)]}, wants(entry(), tag="counting")).correct is correct


def test_fewer_is_wrong_and_more_is_fine() -> None:
    two = wants(entry(count=2))
    assert judge({"owl": [box()]}, two) == Verdict(False, "expected owl>=2, found 1")
    assert judge({}, two).reason == "expected owl>=2, found 0"
    assert judge({"owl": [box()] * 2}, two) == Verdict(True, "")
    assert judge({"owl": [box()] * 5}, two).correct


def test_exclude_makes_counting_exact() -> None:
    exactly_two = wants(entry(count=2), tag="counting", exclude=[entry(count=3)])
    found = [judge({"owl": [box(0.95)] * n}, exactly_two).correct for n in range(5)]
    assert found == [False, False, True, False, False]
    assert judge({"owl": [box(0.95)] * 4}, exactly_two).reason == "expected owl<3, found 4"


def test_excluded_boxes_must_be_kept_ones() -> None:
    exactly_one = wants(entry(), tag="counting", exclude=[entry(count=2)])
    assert judge({"owl": [box(0.95), box(0.9)]}, exactly_one).correct


def test_sixteen_boxes_a_class_are_kept() -> None:
    crowd = {"owl": [box(0.95)] * 40}
    assert judge(crowd, wants(entry(count=16))).correct
    assert judge(crowd, wants(entry(count=17))).reason == "expected owl>=17, found 16"
    assert judge(crowd, wants(entry(), exclude=[entry(count=17)])).correct


def test_overlapping_boxes_are_not_suppressed() -> None:
    assert judge({"owl": [box(0.8), box(0.7)]}, wants(entry(count=2))).correct


def test_the_most_confident_boxes_are_taken_in_any_order() -> None:
    red = wants(entry(color="red"), tag="colors")
    sure, unsure = box(0.9, color="red"), box(0.5, color="blue")
    assert judge({"owl": [unsure, sure]}, red).correct
    assert not judge({"owl": [box(0.9, color="blue"), box(0.5, color="red")]}, red).correct


def test_all_taken_boxes_need_the_colour() -> None:
    two_red = wants(entry(count=2, color="red"), tag="colors")
    assert judge({"owl": [box(color="red"), box(color="red"), box(0.4, color="blue")]}, two_red).correct
    mixed = judge({"owl": [box(color="red"), box(color="blue")]}, two_red)
    assert mixed == Verdict(False, "expected red owl>=2, found colours ['red', 'blue']")
    assert not judge({"owl": [box(), box()]}, two_red).correct


def test_two_objects_of_two_colours() -> None:
    both = wants(entry(color="red"), entry("cat", color="blue"), tag="color_attr")
    assert judge({"owl": [box(color="red")], "cat": [box(color="blue")]}, both).correct
    swapped = judge({"owl": [box(color="blue")], "cat": [box(color="red")]}, both)
    assert swapped.reason.count("\n") == 1


@pytest.mark.parametrize(
    ("relation", "at"),
    [("left of", (-30, 0)), ("right of", (30, 0)), ("above", (0, -30)), ("below", (0, 30))],
)
def test_the_four_relations(relation: str, at: tuple[float, float]) -> None:
    asked = wants(entry("cat"), entry(position=[relation, 0]), tag="position")
    assert relative_position(shifted(*at), HERE) == {relation}
    assert judge({"owl": [box(at=shifted(*at))], "cat": [box()]}, asked).correct
    opposite = judge({"owl": [box(at=shifted(-at[0], -at[1]))], "cat": [box()]}, asked)
    assert not opposite.correct
    assert f"expected owl {relation}" in opposite.reason


def test_every_box_stands_so_to_every_target() -> None:
    asked = wants(entry("cat", count=2), entry(count=2, position=["left of", 0]), tag="position")
    cats = [box(at=shifted(0, 0)), box(at=shifted(40, 0))]
    assert judge({"cat": cats, "owl": [box(at=shifted(-40, 0)), box(at=shifted(-20, 0))]}, asked).correct
    assert not judge({"cat": cats, "owl": [box(at=shifted(-40, 0)), box(at=shifted(20, 0))]}, asked).correct


def test_a_failed_target_fails_the_position() -> None:
    asked = wants(entry("cat", color="red"), entry(position=["left of", 0]), tag="position")
    found = {"cat": [box(color="blue")], "owl": [box(at=shifted(-40, 0))]}
    assert judge(found, asked).reason.endswith("but there is no target")
    assert not judge({"owl": found["owl"]}, asked).correct


def test_diagonals_hold_two_relations() -> None:
    assert relative_position(shifted(-30, -30), HERE) == {"left of", "above"}
    assert relative_position(shifted(40, 40), HERE) == {"right of", "below"}


def test_the_shrunk_offset_is_divided_by_the_unshrunk_length() -> None:
    # both sides are 10, so each axis shrinks by 0.1 * 20 = 2: an offset of 4 keeps 2/4 = 0.5, which is not above 0.5
    assert relative_position(shifted(4, 0), HERE) == frozenset()
    assert relative_position(shifted(4.01, 0), HERE) == {"right of"}
    # a shrunk length would call (4, 0) right of with any offset above 2
    assert relative_position(shifted(3, 0), HERE) == frozenset()


def test_nearly_equal_places_have_no_relation() -> None:
    assert relative_position(HERE, HERE) == frozenset()
    assert relative_position(shifted(1.9, 1.9), HERE) == frozenset()
    assert relative_position(shifted(2.0009, 0), HERE) == frozenset()


def test_each_axis_shrinks_by_its_own_sizes() -> None:
    wide = (
        20.0,
        0.0,
        120.0,
        4.0,
    )  # centre (70, 2); x shrinks by 0.1 * (100 + 10) = 11, y by 0.1 * (4 + 10) = 1.4
    assert relative_position(wide, HERE) == {"right of"}
    tall = (0.0, 12.0, 4.0, 112.0)
    assert relative_position(tall, HERE) == {"below"}


def test_grades_are_means_of_clauses_and_one_means_correct() -> None:
    asked = wants(
        entry("cat", color="red"), entry(position=["left of", 0]), tag="position", exclude=[entry("pig", 1)]
    )
    right = {"cat": [box(color="red")], "owl": [box(at=shifted(-40, 0))]}
    assert grade(right, asked) == 1.0
    assert judge(right, asked).correct
    blue = {"cat": [box(color="blue")], "owl": right["owl"]}
    assert grade(blue, asked) == pytest.approx(3 / 5)  # the colour, and with it the position, fail
    assert grade({"owl": right["owl"]}, asked) == pytest.approx(2 / 5)
    assert grade({"pig": [box()]}, asked) == 0.0
    assert grade(right | {"pig": [box()]}, asked) == pytest.approx(4 / 5)


def test_counting_grades_fall_with_the_distance_from_the_number_asked() -> None:
    three = wants(entry(count=3), tag="counting", exclude=[entry(count=4)])
    grades = [grade({"owl": [box(0.95)] * n}, three) for n in range(9)]
    assert grades[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert grades[4:] == pytest.approx([5 / 6, 2 / 3, 1 / 2, 1 / 2, 1 / 2])
    one = wants(entry(), tag="counting", exclude=[entry(count=2)])
    assert [grade({"owl": [box(0.95)] * n}, one) for n in range(3)] == [0, 1, 0.5]


def test_an_exclusion_of_another_class_is_a_clause_of_its_own() -> None:
    no_pig = wants(entry(), exclude=[entry("pig", 1)])
    assert grade({"owl": [box()]}, no_pig) == 1
    assert grade({"owl": [box()], "pig": [box()]}, no_pig) == 0.5
    assert grade({}, no_pig) == 0.5


def test_partial_credit_for_colours_and_positions() -> None:
    two_red = wants(entry(count=2, color="red"), tag="colors")
    found = {"owl": [box(color="red"), box(color="blue")]}
    assert grade(found, two_red) == pytest.approx((1 + 1 / 2) / 2)
    assert grade({"owl": [box(color="red")]}, two_red) == pytest.approx((1 / 2 + 0) / 2)
    left = wants(entry("cat", count=2), entry(position=["left of", 0]), tag="position")
    between = {"cat": [box(), box(at=shifted(40, 0))], "owl": [box(at=shifted(20, 0))]}
    assert grade(between, left) == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert "found right of" in judge(between, left).reason


def test_grade_is_one_exactly_where_the_verdict_is_correct() -> None:
    generator = np.random.default_rng(0)
    asked = wants(
        entry("cat", 2, color="red"),
        entry("owl", 1, position=["left of", 0]),
        tag="position",
        exclude=[entry("owl", 2)],
    )

    def random_box() -> dict[str, object]:
        place = shifted(*generator.integers(-40, 40, 2))
        return box(generator.choice([0.2, 0.8]), place, generator.choice(["red", "blue"], p=[0.9, 0.1]))

    seen = set()
    for _ in range(500):
        found = {kind: [random_box() for _ in range(generator.integers(0, 4))] for kind in ("cat", "owl")}
        correct, graded = judge(found, asked).correct, grade(found, asked)
        assert (graded == 1.0) == correct
        assert 0 <= graded <= 1
        seen.add(correct)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "non-empty list 'include'"),
        ({"tag": "x", "include": []}, "non-empty list 'include'"),
        (wants({"class": "owl"}), "a 'count' of at least 1"),
        (wants({"count": 1}), "needs a 'class'"),
        (wants(entry(count=0)), "at least 1"),
        (wants(entry("cat"), entry(position=["leftof", 0])), "Did you mean 'left of'"),
        (wants(entry(position=["left of", 0])), "an earlier entry"),
        (wants(entry("cat"), entry(position=["left of", 3])), "an earlier entry"),
    ],
)
def test_malformed_entries(metadata: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge({}, metadata)


@pytest.mark.skipif(not DATA.is_file(), reason=f"the published list is not at {DATA}")
def test_the_published_list_can_be_satisfied() -> None:
    """A picture made to order is correct, and the empty one never is, for each of the 553 published entries."""
    entries = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert len(entries) == 553
    for metadata in entries:
        made: dict[str, list[dict[str, object]]] = {}
        for index, wanted in enumerate(metadata["include"]):
            relation = wanted.get("position", ["", 0])[0]
            step = {"left of": (-50, 0), "right of": (50, 0), "above": (0, -50), "below": (0, 50)}.get(
                relation, (0, 0)
            )
            boxes = [box(0.95, shifted(*step), wanted.get("color")) for _ in range(wanted["count"])]
            made.setdefault(wanted["class"], []).extend(boxes)
            assert index == 0 or "position" not in wanted or wanted["position"][1] == 0
        assert judge(made, metadata).correct, metadata
        assert not judge({}, metadata).correct


# --- the reward ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward(clip_folder: Path, segmenter_folder: Path) -> GenEvalReward:
    made = rewards.load("geneval", segmenter=segmenter_folder, clip=clip_folder, device="cpu")
    assert isinstance(made, GenEvalReward)
    return made


def logits_of(labels: np.ndarray) -> Tensor:
    """Class logits of a picture whose every pixel is surely of its label."""
    sure = torch.nn.functional.one_hot(torch.from_numpy(labels), len(tiny.KINDS)).permute(2, 0, 1)
    return torch.where(sure > 0, 0.0, -20.0)


def see(reward: GenEvalReward, monkeypatch: pytest.MonkeyPatch, maps: list[np.ndarray]) -> None:
    """Makes the reward's segmenter see given class maps, the i-th one where a picture's corner pixel is i / 255."""
    stacked = torch.stack([logits_of(labels) for labels in maps])

    def logits(images: Tensor) -> Tensor:
        return stacked[(images[:, 0, 0, 0] * 255).round().long()]

    monkeypatch.setattr(reward.detector, "logits", logits)


def scene(*blocks: tuple[int, int, int]) -> np.ndarray:
    """Blocks (class, top, left) of 8 x 8 on a 32 x 32 background."""
    labels = np.zeros((32, 32), dtype=np.int64)
    for label, top, left in blocks:
        labels[top : top + 8, left : left + 8] = label
    return labels


def numbered(count: int) -> Tensor:
    images = torch.full((count, 3, 32, 32), 0.5)
    images[:, 0, 0, 0] = torch.arange(count) / 255
    return images


def test_strict_scores_from_maps(reward: GenEvalReward, monkeypatch: pytest.MonkeyPatch) -> None:
    see(
        reward,
        monkeypatch,
        [scene((1, 4, 2), (1, 4, 20)), scene((1, 4, 2)), scene((1, 4, 2), (3, 4, 20)), scene()],
    )
    two = wants(entry(count=2), tag="counting", exclude=[entry(count=3)])
    left = wants(entry("cat"), entry(position=["left of", 0]), tag="position")
    scores = reward.score(RewardBatch(numbered(4), ["x"] * 4, [two, two, left, wants(entry())]))
    assert scores.values_B.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert scores.reasons == (None,) * 4


def test_graded_scores(clip_folder: Path, segmenter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded = GenEvalReward(segmenter_folder, clip=clip_folder, graded=True, device="cpu")
    see(graded, monkeypatch, [scene((1, 4, 2))])
    both = wants(entry(), entry("cat"), tag="two_object")
    assert graded.score(RewardBatch(numbered(1), ["x"], [both])).values_B.tolist() == [0.5]
    assert graded.provenance["scoring"] == "graded"


class OneOwl:
    """A detector of its own: an owl in every picture's upper left corner."""

    provenance: Mapping[str, str] = {"model": "one owl", "preprocessing": "none"}
    looks = 0

    def instances(self, images_BCHW: Tensor) -> list[list[Instance]]:
        self.looks += 1
        mask = torch.zeros(images_BCHW.shape[-2:], dtype=torch.bool)
        mask[:8, :8] = True
        return [[Instance("owl", (0.0, 0.0, 8.0, 8.0), 0.95, mask)] for _ in images_BCHW]


def test_strict_and_graded_rewards_of_one_batch_look_once(clip_folder: Path) -> None:
    both = wants(entry(), entry("cat"), tag="two_object")
    owls, others = OneOwl(), OneOwl()
    strict, graded, apart = (
        GenEvalReward(detector, clip=clip_folder, graded=graded, device="cpu")
        for detector, graded in ((owls, False), (owls, True), (others, True))
    )
    batch = RewardBatch(numbered(1), ["x"], [both])
    assert strict.score(batch).values_B.tolist() == [0.0]
    assert graded.score(batch).values_B.tolist() == [0.5]
    assert owls.looks == 1
    assert apart.score(batch).values_B.tolist() == [0.5]
    assert others.looks == 1  # another detector sees for itself
    graded.score(RewardBatch(numbered(1), ["x"], [both]))
    assert owls.looks == 2  # and so does another batch
    two = replace(batch, images_BCHW=numbered(2), prompts=["x"] * 2, metadata=[both] * 2)
    assert graded.score(two).values_B.tolist() == [0.5, 0.5]  # one made from it, too


def test_any_detector_fits_the_slot(clip_folder: Path) -> None:
    reward = GenEvalReward(OneOwl(), clip=clip_folder, device="cpu")
    scores = reward.score(RewardBatch(numbered(2), ["x"] * 2, [wants(entry()), wants(entry("cat"))]))
    assert scores.values_B.tolist() == [1.0, 0.0]
    assert scores.provenance["model"] == "one owl"


def test_without_metadata_it_fails_with_a_reason(reward: GenEvalReward) -> None:
    scores = reward.score(RewardBatch(numbered(2), ["x", "y"], [{}, wants(entry())]))
    assert scores.values_B[0].isnan()
    assert scores.reasons == ("no GenEval metadata", None)
    assert reward.score(RewardBatch(numbered(1), ["x"])).reasons == ("no GenEval metadata",)


def test_colours_are_named_for_the_classes_that_ask(
    reward: GenEvalReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(reward, monkeypatch, [scene((1, 4, 2), (3, 4, 20))])
    crops: list[tuple[int, ...]] = []
    original = reward.colors.name

    def spy(cut: list[Tensor], kinds: list[str]) -> list[str]:
        crops.extend(tuple(one.shape) for one in cut)
        assert set(kinds) <= {"owl"}
        return original(cut, kinds)

    monkeypatch.setattr(reward.colors, "name", spy)
    (found,) = reward.detect(numbered(1), [wants(entry(color="red"), entry("cat"))])
    assert crops == [(3, 8, 8)]
    assert found["owl"][0]["color"] in COLORS
    assert found["cat"][0]["color"] is None


def test_the_crop_is_the_object_on_geneval_grey(reward: GenEvalReward) -> None:
    image = torch.rand(3, 32, 32)
    labels = scene((1, 4, 2))
    labels[4, 2] = 0
    assert isinstance(reward.detector, Segmenter)
    instance = reward.detector._instances(logits_of(labels))[0]
    crop = reward.colors.crop(image, instance)
    assert crop.shape == (3, 8, 8)
    assert agree(crop[:, 0, 0], torch.full((3,), 0.6), 8)
    assert agree(crop[:, 1:, 1:], image[:, 5:12, 3:10], 8)


def test_colour_classifiers_average_the_templates(reward: GenEvalReward) -> None:
    rows = reward.colors.classifier("owl")
    texts = [f"a photo of a red{form}" for form in (" owl", "-colored owl", " object")]
    mean = reward.colors.clip.text_features(texts).mean(dim=0)
    assert agree(rows[0], mean / mean.norm(), MODEL)
    assert rows.shape[0] == len(COLORS) == 10


def test_the_card_names_colours_and_templates(tmp_path: Path, segmenter_folder: Path) -> None:
    folder = tiny.clip(tmp_path)
    card = {"colors": ["red", "blue"], "color_templates": ["a {color} {kind}"], "color_zoom": False}
    (folder / "pixrl.json").write_text(json.dumps(card))
    reward = GenEvalReward(segmenter_folder, clip=folder, device="cpu")
    assert reward.colors.colors == ("red", "blue")
    assert reward.colors.classifier("owl").shape[0] == 2
    assert isinstance(reward.detector, Segmenter)
    instance = reward.detector._instances(logits_of(scene((1, 4, 2))))[0]
    assert reward.colors.crop(torch.rand(3, 32, 32), instance).shape == (3, 32, 32)
    assert reward.provenance["color_crop"] == "in place"


def test_colours_do_not_depend_on_the_batch(reward: GenEvalReward) -> None:
    crops = [torch.rand(3, 5 + n, 9, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    together = reward.colors.name(crops, ["owl", "cat"] * 3)
    alone = [
        reward.colors.name([crop], [kind])[0] for crop, kind in zip(crops, ["owl", "cat"] * 3, strict=True)
    ]
    assert together == alone
    assert reward.colors.name([], []) == []
