"""The second edition's drawings: parts, hybrids, labels, and what keeps pairs apart."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from pixrl.toy.drawing.backgrounds import backdrop
from pixrl.toy.drawing.figure import LABELS_EACH, Mark
from pixrl.toy.language import caption, parse
from pixrl.toy.pairs import HELD_OUT_PAIRS, TRAINING_PAIRS, is_held_out_pair, may_be_trained
from pixrl.toy.random_scenes import (
    fall_short,
    held_out_hybrid,
    held_out_subjects,
    hybrid_scene,
    is_shy,
    random_hybrid,
    random_scene,
    random_subject,
    resembles_held_out,
    subject_scene,
)
from pixrl.toy.scene import (
    FIRST_PART,
    MIXED_CLASS,
    PART_CLASSES,
    PASTED,
    SIDE,
    SUPERSAMPLE,
    WORN_CLASS,
    Scene,
    SceneObject,
    Task,
    draw,
    kind_classes,
    part_class,
    part_classes,
    render,
)
from pixrl.toy.vocabulary import COLOURS, KINDS, MARKS, MOODS, NAMES, NATURAL, PART_WORDS, SLOTS
from toy_build.pictures import asked_of_base, shown_of_base

NEIGHBOURS = np.ones((3, 3))


def lone(kind: str, **rest: object) -> Scene:
    return Scene((SceneObject((kind,) * 4, NATURAL[kind], **rest),), "plain", Task.SINGLE_OBJECT, False)  # type: ignore[arg-type]


def test_the_split_of_pairs_is_the_committed_one() -> None:
    assert (len(TRAINING_PAIRS), len(HELD_OUT_PAIRS)) == (303, 193)
    digest = hashlib.sha256(" ".join(f"{a}+{b}" for a, b in HELD_OUT_PAIRS).encode()).hexdigest()
    assert digest.startswith("73df6cf21345da95ee771427")


def test_a_pair_is_held_out_in_either_order_and_spoils_every_hybrid_that_contains_it() -> None:
    a, b = HELD_OUT_PAIRS[0]
    assert is_held_out_pair(b, a)
    third = next(kind for kind in KINDS if kind not in (a, b))
    assert not may_be_trained((third, b, a))


def test_training_hybrids_are_of_training_pairs_and_the_others_of_held_out_ones() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert may_be_trained(hybrid_scene(rng).objects[0].parents)
        assert is_held_out_pair(*held_out_hybrid(rng).objects[0].parents)


def test_a_hybrid_has_a_slot_of_every_parent_and_of_nobody_else() -> None:
    rng = np.random.default_rng(1)
    seen = Counter[int]()
    for _ in range(200):
        thing = random_hybrid(rng, ["owl", "snail", "cup"])
        assert set(thing.slots) == {"owl", "snail", "cup"}
        pair = random_hybrid(rng, ["owl", "snail"])
        assert set(pair.slots) == {"owl", "snail"}
        seen[pair.slots.count("owl")] += 1
    assert set(seen) == {1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_kind_is_seen(kind: str) -> None:
    drawing = draw(lone(kind))
    ink = (drawing.labels > 0).sum()
    shares = [(drawing.labels == 1 + slot).sum() / ink for slot in range(len(SLOTS))]
    assert min(shares) > 0.02
    assert set(np.unique(drawing.labels)) == set(range(len(SLOTS) + 1))


def test_no_two_kinds_share_a_part() -> None:
    """Of the same size and colour, no slot of one kind is drawn as that of another."""
    coat = COLOURS["green"]
    for slot in range(len(SLOTS)):
        shown = set()
        for kind in KINDS:
            slots = ["owl"] * 4
            slots[slot] = kind
            thing = SceneObject((slots[0], slots[1], slots[2], slots[3]), coat)
            shown.add(render(Scene((thing,), "plain", Task.HYBRID, False), 32).tobytes())
        assert len(shown) == len(KINDS)


def test_figures_stay_in_their_boxes_and_in_one_piece() -> None:
    rng = np.random.default_rng(2)
    apart = 0
    for number in range(240):
        scene = random_scene(rng, (Task.HYBRID, Task.SINGLE_OBJECT, Task.SUBJECT)[number % 3])
        labels, thing = draw(scene).labels, scene.objects[0]
        ys, xs = np.nonzero(labels)
        for values, centre in ((xs, thing.centre[0]), (ys, thing.centre[1])):
            assert values.min() >= (centre - thing.size / 2) * SIDE - 1
            assert values.max() <= (centre + thing.size / 2) * SIDE + 1
        pieces, _ = ndimage.label(labels > 0, NEIGHBOURS)
        apart += (np.bincount(pieces.ravel())[1:] >= 20).sum() > 1
    assert apart <= 3, "a balloon's string is thinner than a pixel on the smallest figures, nothing else"


def test_what_is_drawn_is_labelled_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    for number in range(60):
        scene = random_scene(rng, list(Task)[number % len(Task)])
        drawing = draw(scene)
        empty = np.asarray(
            backdrop(scene.background, SIDE * SUPERSAMPLE, scene.backdrop).reduce(SUPERSAMPLE)
        ).astype(int)
        changed = np.abs(drawing.picture.astype(int) - empty).max(-1)
        far = ndimage.binary_dilation(drawing.foreground, NEIGHBOURS)
        assert (changed[~far] > 60).mean() < 0.01
        inside = ndimage.binary_erosion(drawing.foreground, NEIGHBOURS)
        assert (changed[inside] > 0).mean() > 0.9


def test_labels_tell_objects_parts_and_kinds() -> None:
    owl = SceneObject(("owl", "snail", "owl", "owl"), None, centre=(0.25, 0.5), size=0.44)
    cup = SceneObject(("cup",) * 4, NATURAL["cup"], accessory="hat", centre=(0.75, 0.5), size=0.44)
    scene = Scene((owl, cup), "grass", Task.TWO_OBJECT, True)
    drawing = draw(scene)
    parts, kinds = part_classes(scene)[drawing.labels], kind_classes(scene)[drawing.labels]
    wanted = {part_class("owl", 0), part_class("snail", 1), part_class("owl", 2), part_class("owl", 3)}
    assert set(np.unique(parts[:, : SIDE // 2])) == {0} | wanted
    assert set(np.unique(parts[:, SIDE // 2 :])) == {0, WORN_CLASS} | {
        part_class("cup", slot) for slot in range(4)
    }
    assert set(np.unique(kinds)) == {0, KINDS.index("owl") + 1, KINDS.index("cup") + 1}
    first, second = drawing.objects(2)
    assert (first.any(), second.any()) == (True, True)
    assert not (first & second).any()
    assert first[:, SIDE // 2 :].sum() == second[:, : SIDE // 2].sum() == 0
    assert len({part_class(kind, slot) for kind in KINDS for slot in range(4)}) == PART_CLASSES - FIRST_PART


def test_what_is_pasted_is_labelled_as_such_and_lies_on_top() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        scene = random_scene(rng, Task.OVERLAY)
        drawing = draw(scene)
        assert (drawing.labels == PASTED).sum() > 40
        assert set(np.unique(drawing.labels)) <= {*range(1 + LABELS_EACH), PASTED}
        assert set(np.unique(part_classes(scene)[drawing.labels[drawing.labels == PASTED]])) == {MIXED_CLASS}
        assert set(np.unique(kind_classes(scene)[drawing.labels])) == {
            0, KINDS.index(scene.objects[0].kind) + 1, KINDS.index(scene.pasted[0].kind) + 1
        }  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_every_mark_is_seen_on_every_kind(mark: str) -> None:
    for kind in KINDS:
        plain = draw(lone(kind)).picture.astype(int)
        marked = draw(lone(kind, mark=Mark(mark, (30, 60, 220)))).picture.astype(int)
        assert (np.abs(plain - marked).max(-1) > 40).sum() >= 30, kind


def test_moods_and_sizes_are_seen() -> None:
    for kind in ("owl", "snail", "crab", "elephant"):
        faces = {draw(lone(kind, mood=mood)).picture.tobytes() for mood in (None, *MOODS)}
        assert len(faces) == 4
    rng = np.random.default_rng(5)
    sizes: dict[str | None, list[float]] = {"tiny": [], None: [], "huge": []}
    for _ in range(300):
        thing = random_scene(rng, Task.SINGLE_OBJECT).objects[0]
        sizes[thing.size_word].append(thing.size)
    assert max(sizes["tiny"]) < min(sizes[None])
    assert max(sizes[None]) < min(sizes["huge"])


def test_held_out_subjects_are_one_of_each_kind_with_marks_and_training_avoids_them() -> None:
    assert [subject.kind for subject in held_out_subjects()] == list(KINDS)
    assert all(subject.mark is not None for subject in held_out_subjects())
    assert all(resembles_held_out(subject) for subject in held_out_subjects())
    rng = np.random.default_rng(6)
    assert sum(resembles_held_out(random_subject(rng)) for _ in range(200)) < 40


def test_a_subject_looks_alike_in_two_scenes_and_the_scene_never_says_its_mark() -> None:
    rng = np.random.default_rng(7)
    subject = held_out_subjects()[0]
    first, second = (subject_scene(subject, rng).objects[0] for _ in range(2))
    assert (first.mark, first.palette, first.own) == (second.mark, second.palette, second.own)


def test_pictures_depend_on_nothing_but_the_scene() -> None:
    scene = random_scene(np.random.default_rng(8), Task.SUBJECT)
    first = draw(scene)
    draw(random_scene(np.random.default_rng(9), Task.COUNTING))
    again = draw(scene)
    assert (first.picture == again.picture).all()
    assert (first.labels == again.labels).all()


def test_names_and_parts_cover_the_world() -> None:
    assert set(NAMES) == set(PART_WORDS) == set(NATURAL) == set(KINDS)
    assert len(KINDS) == 32
    assert sum(len(names) > 1 for names in NAMES.values()) >= 16


def wanted(scene: Scene) -> object:
    return parse(caption(scene)).metadata["include"]


@pytest.mark.parametrize("task", [Task.TWO_OBJECT, Task.COUNTING, Task.POSITION, Task.COLOR_ATTR])
def test_what_falls_short_shows_something_else_of_the_same_kinds(task: Task) -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        asked = random_scene(rng, task)
        shown = fall_short(rng, asked)
        assert wanted(shown) != wanted(asked) or len(asked.objects) == 1
        assert {thing.kind for thing in shown.objects} <= {thing.kind for thing in asked.objects}
        assert shown.background == asked.background
        draw(shown)


def test_one_object_never_falls_short() -> None:
    rng = np.random.default_rng(4)
    scene = random_scene(rng, Task.COLORS)
    assert fall_short(rng, scene) is scene
    assert not is_shy(scene)


def test_the_base_is_mostly_shown_less_than_it_is_asked_for() -> None:
    asked = [asked_of_base(3, row) for row in range(800)]
    shown = [shown_of_base(3, row) for row in range(800)]
    many = [(a, b) for a, b in zip(asked, shown, strict=True) if len(a.objects) > 1]
    assert all(a == b for a, b in zip(asked, shown, strict=True) if len(a.objects) == 1)
    assert all(a != b for a, b in many if is_shy(a))
    assert 0.04 < sum(a == b for a, b in many) / len(many) < 0.4
