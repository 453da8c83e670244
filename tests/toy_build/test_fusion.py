"""The truth about fusion, on the label maps of true drawings (the segmentation that it will read has its own gates)."""

from collections.abc import Callable

import numpy as np
import pytest

from pixrl.errors import InputError
from toy_build.world.fusion import Fusion, Verdict, judge
from toy_build.world.random_scenes import held_out_hybrid, hybrid_scene, random_scene
from toy_build.world.scene import MIXED_CLASS, SIDE, Scene, Task, draw, part_class, part_classes
from toy_build.world.vocabulary import KINDS

Random = np.random.Generator
DRAWN = 120


def judged(scene: Scene, parents: tuple[str, ...]) -> Fusion:
    return judge(part_classes(scene)[draw(scene).labels], parents)


def strangers(rng: Random, known: tuple[str, ...], count: int) -> tuple[str, ...]:
    others = [kind for kind in KINDS if kind not in known]
    return tuple(str(kind) for kind in rng.choice(others, count, replace=False))


@pytest.mark.parametrize("make", [hybrid_scene, held_out_hybrid])
def test_every_true_hybrid_is_a_fusion_of_its_parents(make: Callable[[Random], Scene]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(DRAWN):
        scene = make(rng)
        thing = scene.objects[0]
        found = judged(scene, thing.parents)
        assert found.verdict is Verdict.FUSION, thing
        assert sum(found.shares) == pytest.approx(1)
        assert found.balance == pytest.approx(min(found.shares) / max(found.shares))


def test_what_fusion_must_not_be_confused_with_never_passes_and_is_told_apart() -> None:
    rng = np.random.default_rng(2)
    for _ in range(DRAWN):
        alone = random_scene(rng, Task.SINGLE_OBJECT)
        kind = (alone.objects[0].kind,)
        assert judged(alone, kind + strangers(rng, kind, 1)).verdict is Verdict.IMBALANCE
        assert judged(alone, strangers(rng, kind, 2)).verdict is Verdict.THIRD_KIND
        pair = random_scene(rng, Task.TWO_OBJECT)
        first, second = (thing.kind for thing in pair.objects)
        assert judged(pair, (first, second)).verdict is Verdict.SIDE_BY_SIDE
        hybrid = held_out_hybrid(rng)
        parents = hybrid.objects[0].parents
        assert judged(hybrid, (parents[0], *strangers(rng, parents, 1))).verdict is Verdict.THIRD_KIND
        stuck = random_scene(rng, Task.OVERLAY)
        assert judged(stuck, (stuck.objects[0].kind, stuck.pasted[0].kind)).verdict in (
            Verdict.OVERLAY, Verdict.IMBALANCE
        )  # fmt: skip


def test_three_parents_need_three_slots() -> None:
    rng = np.random.default_rng(3)
    scene = hybrid_scene(rng, ("owl", "snail", "cup"))
    assert judged(scene, ("owl", "snail", "cup")).is_true
    assert judged(scene, ("owl", "snail")).verdict is Verdict.THIRD_KIND
    assert judged(hybrid_scene(rng, ("owl", "snail")), ("owl", "snail", "cup")).verdict is Verdict.IMBALANCE


def blank() -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.zeros((SIDE, SIDE), dtype=np.int64)


def test_shares_are_of_the_visible_area_of_slots() -> None:
    classes = blank()
    classes[20:50, 40:80] = part_class("owl", 0)
    classes[50:110, 40:80] = part_class("snail", 1)
    found = judge(classes, ("owl", "snail"))
    assert found.shares == pytest.approx((1 / 3, 2 / 3))
    assert found.balance == pytest.approx(0.5)
    assert judge(classes, ("snail", "owl")).shares == pytest.approx((2 / 3, 1 / 3))


def test_a_slot_of_two_kinds_is_an_overlay_and_specks_are_nothing() -> None:
    classes = blank()
    classes[20:60, 40:80] = part_class("owl", 0)
    classes[60:100, 40:80] = part_class("owl", 1)
    classes[20:22, 40:80] = part_class("snail", 0)
    assert judge(classes, ("owl", "snail")).verdict is Verdict.IMBALANCE
    classes[20:45, 40:80] = part_class("snail", 0)
    assert judge(classes, ("owl", "snail")).verdict is Verdict.OVERLAY
    classes[20:60, 40:80] = MIXED_CLASS
    assert judge(classes, ("owl", "snail")).verdict is Verdict.OVERLAY
    assert judge(blank(), ("owl", "snail")).verdict is Verdict.NOTHING
    assert judge(np.where(classes == MIXED_CLASS, 0, 0), ("owl", "snail")).balance == 0


@pytest.mark.parametrize("parents", [(), ("owl",), ("owl", "owl"), ("owl", "dragon")])
def test_parents_that_make_no_fusion_are_refused(parents: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="two or more different parents of owl, snail"):
        judge(blank(), parents)
