"""The truth about fusion on the true maps of drawings; `parts`, the network that is to see such maps, has its gates."""

from collections.abc import Callable

import numpy as np
import pytest

from pixrl.metrics.true_fusion import Fusion, FusionVerdict, PartClasses, judge
from pixrl.toy.random_scenes import held_out_hybrid, hybrid_scene, random_scene
from pixrl.toy.scene import Scene, Task, draw, part_classes
from pixrl.toy.vocabulary import KINDS
from toy_build.segmenters import part_names

Random = np.random.Generator
DRAWN = 120
PARTS = PartClasses.of(part_names(), "parts")


def judged(scene: Scene, parents: tuple[str, ...]) -> Fusion:
    return judge(part_classes(scene)[draw(scene).labels], parents, PARTS)


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
        assert found.verdict is FusionVerdict.FUSION, thing
        assert sum(found.shares) == pytest.approx(1)
        assert found.balance == pytest.approx(min(found.shares) / max(found.shares))


def test_what_fusion_must_not_be_confused_with_never_passes_and_is_told_apart() -> None:
    rng = np.random.default_rng(2)
    for _ in range(DRAWN):
        alone = random_scene(rng, Task.SINGLE_OBJECT)
        kind = (alone.objects[0].kind,)
        assert judged(alone, kind + strangers(rng, kind, 1)).verdict is FusionVerdict.IMBALANCE
        assert judged(alone, strangers(rng, kind, 2)).verdict is FusionVerdict.THIRD_KIND
        pair = random_scene(rng, Task.TWO_OBJECT)
        first, second = (thing.kind for thing in pair.objects)
        assert judged(pair, (first, second)).verdict is FusionVerdict.SIDE_BY_SIDE
        hybrid = held_out_hybrid(rng)
        parents = hybrid.objects[0].parents
        assert judged(hybrid, (parents[0], *strangers(rng, parents, 1))).verdict is FusionVerdict.THIRD_KIND
        stuck = random_scene(rng, Task.OVERLAY)
        assert judged(stuck, (stuck.objects[0].kind, stuck.pasted[0].kind)).verdict in (
            FusionVerdict.OVERLAY, FusionVerdict.IMBALANCE
        )  # fmt: skip


def test_three_parents_need_three_slots() -> None:
    rng = np.random.default_rng(3)
    scene = hybrid_scene(rng, ("owl", "snail", "cup"))
    assert judged(scene, ("owl", "snail", "cup")).is_true
    assert judged(scene, ("owl", "snail")).verdict is FusionVerdict.THIRD_KIND
    assert (
        judged(hybrid_scene(rng, ("owl", "snail")), ("owl", "snail", "cup")).verdict
        is FusionVerdict.IMBALANCE
    )
