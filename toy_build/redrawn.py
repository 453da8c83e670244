"""Drawings as a generator makes them: noised part of the way, and drawn on by `turbo`'s teacher.

What is where stays (at such levels of noise the layout is settled), and lines and textures become the generator's. So a
network that reads pictures learns to read generated ones too, with labels that are known.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pixrl.equations import interpolate
from pixrl.models.latents import decode_latents
from toy_build.generators import load_vae
from toy_build.pictures import Bytes, to_tensor
from toy_build.sd3 import Texts
from toy_build.training import Build
from toy_build.turbo import load_teacher
from toy_build.vae import encode
from toy_build.world.language import caption
from toy_build.world.scene import SIDE, Scene, draw, part_classes

NOISE = (0.15, 0.5)
"""The levels that drawings are noised to."""
STEPS, SIZE = 3, 64


def redrawn(build: Build, count: int, scene: Callable[[np.random.Generator], Scene]) -> tuple[Bytes, Bytes]:
    """Pictures [N, 128, 128, 3] of random scenes and the class of each pixel [N, 128, 128]; kept on disk."""
    folder = build.work / "redrawn"
    if not (folder / "classes.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts, vae = Texts(build), load_vae(build)
        velocity = load_teacher(build, texts)
        images = np.empty((count, SIDE, SIDE, 3), np.uint8)
        classes = np.empty((count, SIDE, SIDE), np.uint8)
        for start in range(0, count, SIZE):
            rows = range(start, min(start + SIZE, count))
            scenes = [scene(np.random.default_rng((build.seed, 9, row))) for row in rows]
            drawings = [draw(one) for one in scenes]
            known = encode(build, vae, to_tensor(np.stack([d.picture for d in drawings])))
            noise = torch.Generator().manual_seed(build.seed * 7907 + start)
            ids = texts.ids([caption(one) for one in scenes])
            drawn = _draw_on(velocity, known.to(build.device), ids.to(build.device), noise)
            found = decode_latents(vae, drawn).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            images[start : start + len(found)] = found
            classes[start : start + len(found)] = np.stack(
                [part_classes(s)[d.labels] for s, d in zip(scenes, drawings, strict=True)]
            )
        np.save(folder / "images.npy", images)
        np.save(folder / "classes.npy", classes)
    return np.load(folder / "images.npy"), np.load(folder / "classes.npy")


@torch.inference_mode()
def _draw_on(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor], known: Tensor, ids: Tensor, noise: torch.Generator
) -> Tensor:
    """Clean latents [B, C, H, W] after noise and a few even steps back."""
    low, high = NOISE
    start = low + (high - low) * torch.rand(len(known), generator=noise).to(known.device)
    x = interpolate(known, torch.randn(known.shape, generator=noise).to(known.device), start)
    for number in range(STEPS):
        level = start * (1 - number / STEPS)
        x = x - (start / STEPS)[:, None, None, None] * velocity(x, level, ids)
    return x
