"""The pictures that the toy world's networks learn from, drawn once and kept on disk."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixrl.toy.build.processes import leads, wait_for_all
from pixrl.toy.language import canonical, is_held_out
from pixrl.toy.scene import (
    Scene,
    Task,
    ToySubject,
    random_scene,
    random_subject,
    render_with_masks,
    resembles_held_out,
    subject_scene,
)
from pixrl.toy.vocabulary import KINDS

SIDE = 64
WHITE = 255
TASK_SHARES = {
    Task.SINGLE_OBJECT: 0.26, Task.TWO_OBJECT: 0.14, Task.COUNTING: 0.18,
    Task.COLORS: 0.16, Task.POSITION: 0.13, Task.COLOR_ATTR: 0.13,
}  # fmt: skip
GUIDED_SHARES = {
    Task.SINGLE_OBJECT: 0.38, Task.TWO_OBJECT: 0.11, Task.COUNTING: 0.10,
    Task.COLORS: 0.24, Task.POSITION: 0.07, Task.COLOR_ATTR: 0.10,
}  # fmt: skip
"""The generator's second round, which guides lone objects and leaves the other tasks as they are."""
VIEWS = 6
"""Pictures of each training subject."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Rows = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]
"""Which pictures of a set."""


def training_scene(seed: int, index: int) -> Scene:
    """The index-th training scene: never one whose prompt is held out."""
    return _unheld_scene(np.random.default_rng((seed, 1, index)), TASK_SHARES)


def guided_scene(seed: int, index: int) -> Scene:
    """The index-th scene of the generator's second round; its prompt is never held out either."""
    return _unheld_scene(np.random.default_rng((seed, 6, index)), GUIDED_SHARES)


def _unheld_scene(rng: np.random.Generator, shares: dict[Task, float]) -> Scene:
    while True:
        task = rng.choice(list(shares), p=list(shares.values()))
        scene = random_scene(rng, Task(task))
        if not is_held_out(canonical(scene)):
            return scene


def training_subject(seed: int, index: int) -> ToySubject:
    """The index-th training subject: never one that resembles the thirty held out."""
    rng = np.random.default_rng((seed, 2, index))
    while True:
        subject = random_subject(rng)
        if not resembles_held_out(subject):
            return subject


def subject_view(seed: int, index: int, view: int) -> Scene:
    """One of a training subject's scenes; its prompt is never held out."""
    rng = np.random.default_rng((seed, 3, index, view))
    while True:
        scene = subject_scene(training_subject(seed, index), rng, added_accessory=0.4)
        if not is_held_out(canonical(scene)):
            return scene


def held_out_scene(rng: np.random.Generator, task: Task | None = None) -> Scene:
    """A scene whose prompt training never saw."""
    while True:
        scene = random_scene(rng, task or Task(rng.choice(list(TASK_SHARES), p=list(TASK_SHARES.values()))))
        if is_held_out(canonical(scene)):
            return scene


def draw(scene: Scene) -> tuple[Bytes, Bytes]:
    """The picture [64, 64, 3] and its label map [64, 64]: 0 background, k + 1 the kind KINDS[k]."""
    image, masks = render_with_masks(scene, SIDE)
    labels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for thing, mask in zip(scene.objects, masks, strict=True):
        labels[mask] = KINDS.index(thing.kind) + 1
    return np.asarray(image), labels


SCENE_OF: dict[str, Callable[[int, int], Scene]] = {
    "scenes": training_scene,
    "guided": guided_scene,
    "subjects": lambda seed, row: subject_view(seed, row // VIEWS, row % VIEWS),
}
"""The sets of pictures: seed and row to scene."""


def _draw_block(what: str, seed: int, rows: range) -> tuple[Bytes, Bytes]:
    pairs = [draw(SCENE_OF[what](seed, i)) for i in rows]
    return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])


@dataclass(frozen=True)
class DrawnPictures:
    """A set of drawn pictures with their label maps; scenes and captions are made again from the seed."""

    what: str
    seed: int
    images: Bytes
    labels: Bytes

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def _scenes(self) -> dict[int, Scene]:
        return {}

    def scene(self, row: int) -> Scene:
        if row not in self._scenes:
            self._scenes[row] = SCENE_OF[self.what](self.seed, row)
        return self._scenes[row]

    def tensor(self, rows: Rows) -> Tensor:
        """Pictures [B, 3, 64, 64] in [0, 1]."""
        return to_tensor(self.images[np.asarray(rows)])

    def cutouts(self, rows: Rows, background: int = WHITE) -> Tensor:
        """The same with everything but the objects replaced by a plain background."""
        picked = np.asarray(rows)
        ink = self.labels[picked][..., None] > 0
        return to_tensor(np.where(ink, self.images[picked], np.uint8(background)))


def to_tensor(images: Bytes) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)


def without_background(scene: Scene) -> Scene:
    """The scene as a cut-out shows it."""
    return replace(scene, mentions_background=False)


def pictures(work: Path, what: str, count: int, seed: int) -> DrawnPictures:
    """Draw `count` pictures of a set in SCENE_OF, or read them where an earlier run left them."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{what}-{seed}-{count}.npz.d"
    if leads() and not (path / "labels.npy").exists():
        path.mkdir(exist_ok=True)
        blocks = [range(start, min(start + 1000, count)) for start in range(0, count, 1000)]
        with ProcessPoolExecutor(2) as pool:
            drawn = list(pool.map(_draw_block, [what] * len(blocks), [seed] * len(blocks), blocks))
        np.save(path / "images.npy", np.concatenate([b[0] for b in drawn]))
        np.save(path / "labels.tmp.npy", np.concatenate([b[1] for b in drawn]))
        (path / "labels.tmp.npy").replace(path / "labels.npy")
    wait_for_all()
    return DrawnPictures(
        what, seed, np.load(path / "images.npy", mmap_mode="r"), np.load(path / "labels.npy", mmap_mode="r")
    )
