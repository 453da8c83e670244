"""`turbo`: a StableDiffusion3Pipeline that draws in four steps without guidance, for fusion.

`sd3`'s teacher learns hybrids of training pairs from pictures nearly half of which show them; then guidance and steps
go into the weights in two rounds: eight steps of the guided teacher, four of that student. Its class is the one of
SD3.5 Large Turbo; a small UNet of SDXL's class would have taken three times the training (docs/log.md).
"""

import copy
from functools import cache

from toy_build.distil import Guided, distil, two_steps
from toy_build.generators import Latents
from toy_build.pictures import pictures
from toy_build.sd3 import Texts, captioned, new_teacher, save, teach, velocity_of
from toy_build.training import Build, Plan

TEACHER = Plan(steps=2_000, batch=64, lr=1e-3, warmup=100, weight_decay=0.02, ema=0.998, level=0.4, muon=2e-3)
EIGHT = Plan(steps=600, batch=48, lr=5e-4, warmup=50, weight_decay=0.0, ema=0.99, level=0.3, muon=1e-3)
FOUR = Plan(steps=700, batch=64, lr=5e-4, warmup=50, weight_decay=0.0, ema=0.99, level=0.3, muon=1e-3)
SCENES = 24_000
STEPS, GUIDANCE = 4, 2.5


def build_turbo(build: Build) -> None:
    """Train and save `turbo`."""
    texts = Texts(build)
    transformer = new_teacher(build, texts)
    known = cache(lambda: Latents(build, pictures(build.work, "fusion", SCENES, build.seed)))
    teach(build, "turbo_teacher", TEACHER, transformer, texts, known)
    guided = Guided(velocity_of(transformer.eval(), texts), texts.ids([""])[0], GUIDANCE)
    eight = copy.deepcopy(transformer)
    given = captioned(known(), texts, EIGHT.batch)
    distil(build, "turbo_eight", EIGHT, eight, (velocity_of(eight, texts), guided), given, steps=2 * STEPS)
    four = copy.deepcopy(eight)
    velocities = (velocity_of(four, texts), velocity_of(eight.eval(), texts))
    given = captioned(known(), texts, FOUR.batch)
    distil(build, "turbo", FOUR, four, velocities, given, steps=STEPS, walk=two_steps, on_grid=1.0)
    save(build, "turbo", four, texts, STEPS)
    build.provenance("turbo", {"turbo_teacher": TEACHER, "turbo_eight": EIGHT, "turbo": FOUR})
