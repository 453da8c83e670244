"""The scenes, drawings and spoilt pictures of the toy world, and which of them are held out of training."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
TASK_SHARES = {
    Task.SINGLE_OBJECT: 0.26, Task.TWO_OBJECT: 0.14, Task.COUNTING: 0.18,
    Task.COLORS: 0.16, Task.POSITION: 0.13, Task.COLOR_ATTR: 0.13,
}  # fmt: skip
GUIDED_SHARES = {
    Task.SINGLE_OBJECT: 0.38, Task.TWO_OBJECT: 0.11, Task.COUNTING: 0.10,
    Task.COLORS: 0.24, Task.POSITION: 0.07, Task.COLOR_ATTR: 0.10,
}  # fmt: skip
"""The generator's second round, which guides lone objects and leaves the other tasks as they are."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


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


def to_tensor(images: Bytes) -> Tensor:
    """Return uint8 pictures [B, H, W, 3] as floats [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)


def spoil(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture with one of five faults: noise, blur, swapped blocks, washed-out colours, or a grid."""
    faults = (_noisy, _blurred, _shuffled, _washed, _gridded)
    return torch.stack([faults[int(rng.integers(len(faults)))](image, rng) for image in images])


def _noisy(image: Tensor, rng: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(rng.standard_normal(image.shape)).float()
    return (image + float(rng.uniform(0.1, 0.3)) * noise).clamp(0, 1)


def _blurred(image: Tensor, rng: np.random.Generator) -> Tensor:
    side = int(rng.choice((8, 12, 16, 20)))
    small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, image.shape[1:], mode="bilinear", align_corners=False)[0]


def _shuffled(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Blocks of 16 pixels in random order."""
    n = image.shape[1] // 16
    blocks = (
        image.unfold(1, 16, 16)
        .unfold(2, 16, 16)
        .reshape(3, n * n, 16, 16)[:, torch.from_numpy(rng.permutation(n * n))]
    )
    return blocks.view(3, n, n, 16, 16).permute(0, 1, 3, 2, 4).reshape(image.shape)


def _washed(image: Tensor, rng: np.random.Generator) -> Tensor:
    return image.mean() + (image - image.mean()) * float(rng.uniform(0.15, 0.45))


def _gridded(image: Tensor, rng: np.random.Generator) -> Tensor:
    period = int(rng.integers(3, 7))
    lines = (torch.arange(image.shape[1]) % period == 0).float()
    grid = torch.maximum(lines[:, None], lines[None, :])
    return image + (float(rng.uniform(0, 1)) - image) * grid * float(rng.uniform(0.4, 0.9))
