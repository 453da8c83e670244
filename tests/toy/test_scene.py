"""Scenes: objects stay apart and in their boxes, masks are the picture's ink, and a seed fixes everything."""

from dataclasses import replace

import numpy as np
import pytest

from pixrl.toy.scene import (
    SUBJECTS,
    Masks,
    Scene,
    SceneObject,
    Task,
    masks,
    random_scene,
    random_subject,
    render,
    render_with_masks,
    resembles_held_out,
    subject_scene,
)
from pixrl.toy.sheet import contact_sheet
from pixrl.toy.vocabulary import ACCESSORIES, BACKGROUNDS, COLOURS, KINDS, NATURAL

TASKS = tuple(Task)
SIZE = 64


def scenes(task: Task, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, task) for _ in range(count)]


def grow(mask: Masks, steps: int) -> Masks:
    padded = np.pad(mask, steps)
    height, width = mask.shape
    shifted = [
        padded[y : y + height, x : x + width] for y in range(2 * steps + 1) for x in range(2 * steps + 1)
    ]
    return np.asarray(np.any(shifted, axis=0), dtype=np.bool_)


@pytest.mark.parametrize("task", TASKS)
def test_objects_keep_three_empty_pixels_between_them(task: Task) -> None:
    for scene in scenes(task, 60):
        found = masks(scene, SIZE)
        for k, mask in enumerate(found):
            others = np.delete(found, k, axis=0).any(axis=0) if len(found) > 1 else np.zeros_like(mask)
            assert not (grow(mask, 3) & others).any()


@pytest.mark.parametrize("task", TASKS)
def test_every_object_has_a_mask_in_its_box_and_all_ink_belongs_to_one(task: Task) -> None:
    for scene in scenes(task, 60, seed=1):
        found = masks(scene, SIZE)
        for mask, thing in zip(found, scene.objects, strict=True):
            rows, columns = np.nonzero(mask)
            reach = thing.size / 2 * SIZE + 1
            assert mask.mean() > 0.1 * thing.size**2
            assert np.abs(columns + 0.5 - thing.centre[0] * SIZE).max() <= reach
            assert np.abs(rows + 0.5 - thing.centre[1] * SIZE).max() <= reach
            assert rows.min() > 0 and rows.max() < SIZE - 1 and columns.min() > 0 and columns.max() < SIZE - 1
        assert found.sum(axis=0).max() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_dressed_kind_stays_in_its_box(kind: str) -> None:
    for accessory in ACCESSORIES:
        for own in (None, *(name for name in ACCESSORIES if name != accessory)):
            thing = SceneObject(kind, NATURAL[kind], accessory=accessory, own=own, size=0.7)
            scene = Scene((thing,), "plain", Task.SINGLE_OBJECT, False)
            picture, found = render_with_masks(scene, SIZE)
            empty = np.asarray(render(replace(scene, objects=()), SIZE))
            painted = (np.asarray(picture) != empty).any(axis=2)
            box = slice(round(0.15 * SIZE) - 1, round(0.85 * SIZE) + 1)
            assert painted[box, box].sum() == painted.sum()
            assert painted[found[0]].mean() > 0.97
            assert (painted & ~grow(found[0], 1)).sum() <= 4


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_outside_the_masks_the_picture_is_its_background(background: str) -> None:
    for scene in scenes(Task.TWO_OBJECT, 20):
        scene = replace(scene, background=background)
        picture, found = render_with_masks(scene, SIZE)
        empty = np.asarray(render(replace(scene, objects=()), SIZE))
        free = ~grow(found.sum(axis=0) > 0, 2)
        changed = (np.asarray(picture) != empty).any(axis=2) & free
        assert changed.sum() <= 2, "only a whisker's tip may cover less than half of its pixel"


def test_render_and_masks_are_render_with_masks() -> None:
    for scene in scenes(Task.COUNTING, 10):
        picture, found = render_with_masks(scene, SIZE)
        assert picture.mode == "RGB" and picture.size == (SIZE, SIZE)
        assert picture.tobytes() == render(scene, SIZE).tobytes()
        assert (found == masks(scene, SIZE)).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_fixes_scene_and_picture(task: Task) -> None:
    first, second = scenes(task, 20, seed=7), scenes(task, 20, seed=7)
    assert first == second
    assert [render(a).tobytes() for a in first[:3]] == [render(b).tobytes() for b in second[:3]]


def test_a_named_colour_is_nearest_to_the_objects_typical_pixel() -> None:
    names = tuple(COLOURS)
    palette = np.array([COLOURS[name].primary for name in names])
    for kind in KINDS:
        for k, name in enumerate(names):
            thing = SceneObject(kind, COLOURS[name], name, size=0.7)
            picture, found = render_with_masks(Scene((thing,), "plain", Task.COLORS, False), SIZE)
            pixels = np.asarray(picture)[found[0]].astype(int)
            distance = np.linalg.norm(pixels[:, None] - palette, axis=2)
            counts = np.bincount(distance.argmin(axis=1)[distance.min(axis=1) < 30], minlength=len(names))
            assert counts.argmax() == k, (kind, name)
            assert counts[k] > 0.12 * len(pixels), (kind, name)


def test_positions_hold_by_genevals_rule() -> None:
    for scene in scenes(Task.POSITION, 200):
        boxes = []
        for mask in masks(scene, SIZE):
            rows, columns = np.nonzero(mask)
            boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        a, b = np.array(boxes, dtype=float)
        offset = (a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2
        sides = (a[2:] - a[:2]) + (b[2:] - b[:2])
        shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sides, 0) / np.linalg.norm(offset)
        holds = {
            "left of": shrunk[0] < -0.5,
            "right of": shrunk[0] > 0.5,
            "above": shrunk[1] < -0.5,
            "below": shrunk[1] > 0.5,
        }
        assert [name for name, held in holds.items() if held] == [scene.relation]


def test_unnamed_colours_are_natural_half_of_the_time() -> None:
    drawn = [scene.objects[0] for scene in scenes(Task.SINGLE_OBJECT, 1000)]
    natural = np.mean([thing.palette == NATURAL[thing.kind] for thing in drawn])
    assert 0.45 < natural < 0.55


def test_a_subject_looks_the_same_in_every_scene() -> None:
    rng = np.random.default_rng(3)
    for subject in SUBJECTS[:10]:
        for _ in range(10):
            scene = subject_scene(subject, rng)
            (thing,) = scene.objects
            assert (thing.kind, thing.palette, thing.pattern, thing.own) == (
                subject.kind, subject.palette, subject.pattern, subject.accessory,
            )  # fmt: skip
            assert thing.accessory is None or thing.accessory != subject.accessory


def test_held_out_subjects_are_recognized_and_leave_most_others_free() -> None:
    assert len(set(SUBJECTS)) == 30 and {subject.kind for subject in SUBJECTS} == set(KINDS)
    assert all(resembles_held_out(subject) for subject in SUBJECTS)
    rng = np.random.default_rng(5)
    assert np.mean([resembles_held_out(random_subject(rng)) for _ in range(1000)]) < 0.2


def test_the_contact_sheet_shows_every_kind() -> None:
    sheet = contact_sheet()
    assert sheet.height > len(KINDS) * SIZE
