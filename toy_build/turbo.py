"""`turbo`: a StableDiffusion3Pipeline that draws in four steps without guidance, for fusion.

The teacher of `sd3` learns hybrids of training pairs from pictures nearly half of which show them; then each of the
student's four steps learns to lead where a midpoint step of the guided teacher leads. Its class is that of SD3.5 Large
Turbo: a UNet of SDXL's class, which cannot start from that teacher, was never trained (docs/log.md).
"""

import copy
from functools import cache

from diffusers import SD3Transformer2DModel

from toy_build.distil import Guided, distil
from toy_build.generators import Latents, calibrate
from toy_build.pictures import pictures
from toy_build.sd3 import Texts, captioned, new_teacher, save, teach, velocity_of
from toy_build.training import Build, Plan

TEACHER = Plan(steps=5_000, batch=64, lr=1e-3, warmup=100, weight_decay=0.02, ema=0.998, level=0.4, muon=2e-3)
STUDENT = Plan(steps=1_200, batch=48, lr=5e-4, warmup=50, weight_decay=0.0, ema=0.99, level=0.3, muon=1e-3)
SCENES = 24_000
STEPS, GUIDANCE = 4, 3.0
MIXING = "regions"
"""What `pixrl fuse` mixes where nothing is said: it alone makes true fusions of every pair (docs/fuse.md, Mixing)."""


def _taught(build: Build, texts: Texts) -> SD3Transformer2DModel:
    """The teacher, which is trained where it is not yet."""
    transformer = new_teacher(build, texts)
    known = cache(lambda: Latents(build, pictures(build.work, "fusion", SCENES, build.seed)))
    teach(build, "turbo_teacher", TEACHER, transformer, texts, known)
    return transformer.eval()


def build_turbo(build: Build) -> None:
    """Train and save `turbo`."""
    texts = Texts(build)
    transformer = _taught(build, texts)
    known = Latents(build, pictures(build.work, "fusion", SCENES, build.seed))
    guided = Guided(velocity_of(transformer, texts), texts.without, GUIDANCE)
    student = copy.deepcopy(transformer)
    given = captioned(known, texts, STUDENT.batch)
    velocities = (velocity_of(student, texts), guided)
    distil(build, "turbo", STUDENT, student, velocities, given, steps=STEPS, on_grid=1.0)
    save(build, "turbo", student, texts, {"steps": STEPS, "mixing": MIXING})
    calibrate(build, "turbo")
    build.provenance("turbo", {"turbo_teacher": TEACHER, "turbo": STUDENT})
