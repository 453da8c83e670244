"""This module makes the toy world's scenes, drawings and spoilt pictures, and holds some scenes out of training."""

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
    """Return the index-th training scene, whose prompt is never held out."""
    return _unheld_scene(np.random.default_rng((seed, 1, index)), TASK_SHARES)


def guided_scene(seed: int, index: int) -> Scene:
    """Return the index-th scene of the generator's second round, whose prompt is never held out either."""
    return _unheld_scene(np.random.default_rng((seed, 6, index)), GUIDED_SHARES)


def _unheld_scene(rng: np.random.Generator, shares: dict[Task, float]) -> Scene:
    while True:
        task = rng.choice(list(shares), p=list(shares.values()))
        scene = random_scene(rng, Task(task))
        if not is_held_out(canonical(scene)):
            return scene


def training_subject(seed: int, index: int) -> ToySubject:
    """Return the index-th training subject, which never resembles one of the thirty that are held out."""
    rng = np.random.default_rng((seed, 2, index))
    while True:
        subject = random_subject(rng)
        if not resembles_held_out(subject):
            return subject


def subject_view(seed: int, index: int, view: int) -> Scene:
    """Return one of a training subject's scenes, whose prompt is never held out."""
    rng = np.random.default_rng((seed, 3, index, view))
    while True:
        scene = subject_scene(training_subject(seed, index), rng, added_accessory=0.4)
        if not is_held_out(canonical(scene)):
            return scene


def held_out_scene(rng: np.random.Generator, task: Task | None = None) -> Scene:
    """Return a scene whose prompt training never saw, of the given task or of a task drawn by its share in training."""
    while True:
        scene = random_scene(rng, task or Task(rng.choice(list(TASK_SHARES), p=list(TASK_SHARES.values()))))
        if is_held_out(canonical(scene)):
            return scene


def draw(scene: Scene) -> tuple[Bytes, Bytes]:
    """Return a scene's picture [64, 64, 3] and its label map [64, 64]: 0 for background, k + 1 for KINDS[k]."""
    image, masks = render_with_masks(scene, SIDE)
    labels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for thing, mask in zip(scene.objects, masks, strict=True):
        labels[mask] = KINDS.index(thing.kind) + 1
    return np.asarray(image), labels


def to_tensor(images: Bytes) -> Tensor:
    """Return uint8 pictures [B, H, W, 3] as floats [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)


def spoil(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each picture [B, 3, H, W] with one of five faults: noise, blur, swapped blocks, pale colours, a grid."""
    spoilt = []
    for image in images:
        match int(rng.integers(5)):
            case 0:  # noise
                noise = torch.from_numpy(rng.standard_normal(image.shape)).float()
                image = (image + float(rng.uniform(0.1, 0.3)) * noise).clamp(0, 1)
            case 1:  # blur
                side = int(rng.choice((8, 12, 16, 20)))
                small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)
                image = F.interpolate(small, image.shape[1:], mode="bilinear")[0]
            case 2:  # blocks of 16 pixels in random order
                n = image.shape[1] // 16
                blocks = image.unfold(1, 16, 16).unfold(2, 16, 16).reshape(3, n * n, 16, 16)
                blocks = blocks[:, torch.from_numpy(rng.permutation(n * n))]
                image = blocks.view(3, n, n, 16, 16).permute(0, 1, 3, 2, 4).reshape(image.shape)
            case 3:  # pale colours
                image = image.mean() + (image - image.mean()) * float(rng.uniform(0.15, 0.45))
            case _:  # a grid
                lines = (torch.arange(image.shape[1]) % int(rng.integers(3, 7)) == 0).float()
                grid = torch.maximum(lines[:, None], lines[None, :])
                image = image + (float(rng.uniform(0, 1)) - image) * grid * float(rng.uniform(0.4, 0.9))
        spoilt.append(image)
    return torch.stack(spoilt)
