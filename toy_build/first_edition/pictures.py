"""The sets of pictures that the toy world's networks learn from, drawn once and kept on disk."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pixrl.toy.pictures import Bytes, draw, guided_scene, subject_view, to_tensor, training_scene
from pixrl.toy.scene import Scene
from toy_build.first_edition.processes import leads, wait_for_all

WHITE = 255
VIEWS = 6
"""Pictures of each training subject."""

Rows = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]
"""Which pictures of a set."""

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
