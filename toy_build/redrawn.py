"""Drawings as `turbo` makes them: noised to one of its levels, and drawn on from there.

What is where stays (at such levels of noise the layout is settled), and lines and textures become the generator's. So a
network that reads pictures learns to read generated ones too, with labels that are known.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from pixrl.equations import interpolate
from pixrl.models.latents import decode_latents
from pixrl.toy.language import caption
from pixrl.toy.pictures import to_tensor
from pixrl.toy.scene import SIDE, Scene, draw, part_classes
from toy_build.distil import Velocity
from toy_build.generators import load_vae
from toy_build.pictures import Bytes
from toy_build.sd3 import Texts, velocity_of
from toy_build.training import Build
from toy_build.vae import encode

STEPS = 4
"""Of `turbo`, from pure noise to a picture."""
STARTS = (0.25, 0.4, 0.35)
"""How many drawings are drawn on from the last step, the last two, the last three."""
SIZE = 60


def redrawn(build: Build, count: int, scene: Callable[[np.random.Generator], Scene]) -> tuple[Bytes, Bytes]:
    """Pictures [N, 128, 128, 3] of random scenes and the class of each pixel [N, 128, 128]; kept on disk."""
    folder = build.work / "redrawn"
    if not (folder / "classes.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts, vae = Texts(build), load_vae(build)
        turbo = SD3Transformer2DModel.from_pretrained(
            build.out / "turbo" / "transformer", torch_dtype=torch.float32
        )
        velocity = velocity_of(turbo.eval().to(build.device), texts)
        images = np.empty((count, SIDE, SIDE, 3), np.uint8)
        classes = np.empty((count, SIDE, SIDE), np.uint8)
        for start in range(0, count, SIZE):
            rows = range(start, min(start + SIZE, count))
            rng = np.random.default_rng((build.seed, 9, start))
            steps = int(rng.choice(len(STARTS), p=STARTS)) + 1
            scenes = [scene(np.random.default_rng((build.seed, 9, row))) for row in rows]
            drawings = [draw(one) for one in scenes]
            known = encode(build, vae, to_tensor(np.stack([d.picture for d in drawings])))
            noise = torch.Generator().manual_seed(build.seed * 7907 + start)
            ids = texts.ids([caption(one) for one in scenes])
            drawn = _draw_on(velocity, known.to(build.device), ids.to(build.device), steps, noise)
            found = decode_latents(vae, drawn).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            images[start : start + len(found)] = found
            classes[start : start + len(found)] = np.stack(
                [part_classes(s)[d.labels] for s, d in zip(scenes, drawings, strict=True)]
            )
        np.save(folder / "images.npy", images)
        np.save(folder / "classes.npy", classes)
    return np.load(folder / "images.npy"), np.load(folder / "classes.npy")


@torch.inference_mode()
def _draw_on(velocity: Velocity, known: Tensor, ids: Tensor, steps: int, noise: torch.Generator) -> Tensor:
    """Clean latents [B, C, H, W] after noise, and the last so many of the generator's steps."""
    start = torch.full((len(known),), steps / STEPS, device=known.device)
    x = interpolate(known, torch.randn(known.shape, generator=noise).to(known.device), start)
    for number in range(steps, 0, -1):
        x = x - velocity(x, torch.full_like(start, number / STEPS), ids) / STEPS
    return x
