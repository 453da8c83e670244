"""`judge` reads backgrounds and accessories off pictures of subjects; `pixrl toy verify flux` asks it.

It learns from drawings of training subjects, some of them decoded from roughened latents and most blurred or noisy, so
that it also reads pictures that are less crisp than drawings.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pixrl.toy.judge import WEIGHTS, SceneJudge, backgrounds
from pixrl.toy.pictures import drawn
from pixrl.toy.random_scenes import subject_scene, training_subject
from pixrl.toy.scene import Scene
from pixrl.toy.verify import load_vae, reconstruct
from pixrl.toy.vocabulary import ACCESSORIES
from toy_build.training import Build, Draw, Lesson, Plan, half

PLAN = Plan(steps=1_200, batch=48, lr=4e-3, warmup=120, weight_decay=0.02, ema=0.98, level=0.2)
DRAWINGS, DECODED = 6_000, 1_200
ROUGHNESS = 0.5
"""The strongest noise on the latents of decoded lessons, in their standard deviations."""
BLURRED_SHARE = 0.6
"""Of lessons: how many are blurred at all."""
NOISE = 0.06
"""The strongest noise on lessons, of pixels from 0 to 1."""
ADDED_SHARE = 0.8
"""Of lessons: how many wear an accessory besides their subject's own, since accessories are what is hard to read."""


def subject_scenes(seed: int, count: int) -> list[Scene]:
    """Scenes of training subjects, each from its own random numbers."""
    scenes = []
    for index in range(count):
        rng = np.random.default_rng((seed, 7, index))
        scenes.append(subject_scene(training_subject(rng), rng, added_accessory=ADDED_SHARE))
    return scenes


def worsened(crisp: Tensor, noise: torch.Generator) -> Tensor:
    """Most of the pictures up to as blurred as at half the resolution, half of them slightly noisy."""
    small = F.interpolate(crisp, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, size=crisp.shape[-2:], mode="bilinear")
    blur, strength, noisy = torch.rand(3, len(crisp), 1, 1, 1, generator=noise)
    blur = (blur - (1 - BLURRED_SHARE)).clamp(min=0) / BLURRED_SHARE
    grain = torch.randn(crisp.shape, generator=noise) * NOISE * strength * (noisy < 0.5)
    worse: Tensor = torch.lerp(crisp, blurred, blur) + grain
    return worse


def build_judge(build: Build) -> None:
    """Train and save `judge`."""
    torch.manual_seed(build.seed)
    judge = SceneJudge().to(build.device)

    @cache
    def drawings() -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, their backgrounds, and what is worn in them, whether or not a caption mentions it."""
        scenes = subject_scenes(build.seed, DRAWINGS)
        images, noise = drawn(scenes), torch.Generator().manual_seed(build.seed)
        images[:DECODED] = reconstruct(load_vae(build.out), images[:DECODED], ROUGHNESS, noise)
        worn = torch.tensor([[name in scene.objects[0].worn for name in ACCESSORIES] for scene in scenes])
        return images, backgrounds(scenes), worn.float()

    def lesson(draw: Draw) -> Lesson:
        rows = draw.rows(DRAWINGS, PLAN.batch)
        images, before, worn = (part[rows] for part in drawings())
        return worsened(images, draw.noise), before, worn

    def loss(shown: Tensor, before: Tensor, worn: Tensor) -> Tensor:
        background, accessories = judge(shown)
        return F.cross_entropy(background, before) + 4 * F.binary_cross_entropy_with_logits(accessories, worn)

    build.fit("judge", judge, PLAN, lesson, loss)
    folder = build.out / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: half(tensor).contiguous() for name, tensor in judge.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    build.provenance("judge", {"judge": PLAN})
