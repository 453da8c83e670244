"""The pictures that the toy world's networks learn from: drawn once, kept on disk; scenes are made anew."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixrl.toy.language import canonical, is_held_out
from pixrl.toy.pictures import to_tensor
from pixrl.toy.random_scenes import (
    EVEN_SHARES,
    fall_short,
    is_shy,
    random_scene,
    subject_scene,
    training_subject,
)
from pixrl.toy.scene import SIDE, Scene, Task, draw, kind_classes, part_classes

SCENE_SHARES = {
    Task.SINGLE_OBJECT: 0.38, Task.COLORS: 0.22, Task.HYBRID: 0.18, Task.TWO_OBJECT: 0.06, Task.COUNTING: 0.06,
    Task.POSITION: 0.04, Task.COLOR_ATTR: 0.04, Task.OVERLAY: 0.02,
}  # fmt: skip
"""What the autoencoder sees."""
SINGLE_SHARES = {
    Task.SINGLE_OBJECT: 0.52, Task.COLORS: 0.30, Task.TWO_OBJECT: 0.05, Task.COUNTING: 0.06, Task.POSITION: 0.03,
    Task.COLOR_ATTR: 0.04,
}  # fmt: skip
"""What `sd3`'s teacher sees: no hybrids, and few compositions."""
BASE_SHARES = {
    Task.SINGLE_OBJECT: 0.34, Task.COLORS: 0.30, Task.TWO_OBJECT: 0.08, Task.COUNTING: 0.10, Task.POSITION: 0.10,
    Task.COLOR_ATTR: 0.08,
}  # fmt: skip
"""What `sd3`'s student is asked for. Most compositions it is shown fall short of that, so that it stays weak at them
and learning finds room."""
FULL_SHARE = 0.15
"""Of compositions of kinds that are let into company: how many are shown as asked."""
FUSION_SHARES = {
    Task.SINGLE_OBJECT: 0.34, Task.COLORS: 0.10, Task.HYBRID: 0.46, Task.TWO_OBJECT: 0.06, Task.OVERLAY: 0.04,
}  # fmt: skip
"""What `turbo` sees after `sd3`'s pictures: hybrids of training pairs, and what must not be taken for them."""
VIEWS = 6
"""Pictures of each training subject."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Rows = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]


def _of_shares(shares: dict[Task, float], key: int) -> Callable[[int, int], Scene]:
    def scene(seed: int, index: int) -> Scene:
        rng = np.random.default_rng((seed, key, index))
        while True:
            found = random_scene(rng, Task(rng.choice(list(shares), p=list(shares.values()))))
            if not is_held_out(canonical(found)):
                return found

    return scene


asked_of_base = _of_shares(BASE_SHARES, 7)
"""Seed and row to the scene that `sd3`'s student is asked for."""


def shown_of_base(seed: int, index: int) -> Scene:
    """What it is shown for it."""
    rng, scene = np.random.default_rng((seed, 8, index)), asked_of_base(seed, index)
    return scene if not is_shy(scene) and rng.random() < FULL_SHARE else fall_short(rng, scene)


def subject_view(seed: int, index: int) -> Scene:
    """Picture `index % VIEWS` of training subject `index // VIEWS`."""
    rng = np.random.default_rng((seed, 3, index))
    subject = training_subject(np.random.default_rng((seed, 2, index // VIEWS)))
    return subject_scene(subject, rng, added_accessory=0.4)


SCENE_OF: dict[str, Callable[[int, int], Scene]] = {
    "scenes": _of_shares(SCENE_SHARES, 1),
    "even": _of_shares(EVEN_SHARES, 4),
    "single": _of_shares(SINGLE_SHARES, 5),
    "base": shown_of_base,
    "fusion": _of_shares(FUSION_SHARES, 6),
    "subjects": subject_view,
}
"""The sets of pictures: seed and row to scene."""


@dataclass(frozen=True)
class Pictures:
    """A set of drawn pictures [N, 128, 128, 3] with their label maps [N, 128, 128]."""

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
        """The scene of a row, made again."""
        if row not in self._scenes:
            self._scenes[row] = SCENE_OF[self.what](self.seed, row)
        return self._scenes[row]

    def tensor(self, rows: Rows) -> Tensor:
        """Pictures [B, 3, 128, 128] in [0, 1]."""
        return to_tensor(self.images[np.asarray(rows)])

    def parts(self, rows: Rows) -> Tensor:
        """The class of every pixel among PART_CLASSES [B, 128, 128]."""
        found = [part_classes(self.scene(int(row)))[self.labels[row]] for row in rows]
        return torch.from_numpy(np.stack(found)).long()

    def kinds(self, rows: Rows) -> Tensor:
        """The kind of every pixel, 0 for background [B, 128, 128]."""
        found = [kind_classes(self.scene(int(row)))[self.labels[row]] for row in rows]
        return torch.from_numpy(np.stack(found)).long()

    def cutouts(self, rows: Rows, background: int = 255) -> Tensor:
        """The pictures with everything but the objects replaced by a plain background."""
        picked = np.asarray(rows)
        ink = self.labels[picked][..., None] > 0
        return to_tensor(np.where(ink, self.images[picked], np.uint8(background)))


def _draw_block(what: str, seed: int, rows: range) -> tuple[Bytes, Bytes]:
    drawn = [draw(SCENE_OF[what](seed, i)) for i in rows]
    return np.stack([d.picture for d in drawn]), np.stack([d.labels for d in drawn])


def pictures(work: Path, what: str, count: int, seed: int, processes: int = 2) -> Pictures:
    """Draw `count` pictures of a set in SCENE_OF, or read them where an earlier run left them."""
    folder = work / "pictures" / f"{what}-{seed}-{count}"
    if not (folder / "labels.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, SIDE, SIDE, 3))
        labels = np.lib.format.open_memmap(folder / "labels.tmp.npy", "w+", np.uint8, (count, SIDE, SIDE))
        blocks = [range(start, min(start + 500, count)) for start in range(0, count, 500)]
        with ProcessPoolExecutor(processes) as pool:
            drawn = pool.map(_draw_block, [what] * len(blocks), [seed] * len(blocks), blocks)
            for rows, (pixels, marks) in zip(blocks, drawn, strict=True):
                images[rows.start : rows.stop], labels[rows.start : rows.stop] = pixels, marks
        images.flush()
        labels.flush()
        (folder / "labels.tmp.npy").replace(folder / "labels.npy")
    images, labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels"))
    return Pictures(what, seed, images, labels)
