"""What trains the toy world's checkpoints: `pixrl toy build` in a checkout. No wheel carries it.

Each module is a stage or what stages share: `training` is the loop, `pictures` the sets of drawings, `generators` and
`distil` what the three generators have in common. docs/toy.md says what each stage makes.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from pixrl.errors import InputError, did_you_mean
from pixrl.toy import CHECKPOINTS

STAGES = {
    "vae": "toy_build.vae:build_vae",
    "clip": "toy_build.clip:build_clip",
    "segmenter": "toy_build.segmenters:build_segmenter",
    "identity": "toy_build.identity:build_identity",
    "preference": "toy_build.preference:build_preference",
    "texts": "toy_build.texts:build_texts",
    "sd3": "toy_build.sd3:build_sd3",
    "turbo": "toy_build.turbo:build_turbo",
    "parts": "toy_build.segmenters:build_parts",
    "judge": "toy_build.judge:build_judge",
    "flux": "toy_build.flux:build_flux",
}
"""The stages and the functions that train them, in the order in which they need each other."""


def build(
    stages: Sequence[str] = (), *, out: Path | None = None, work: Path | None = None, device: str = "cpu"
) -> Path:
    """Train the named stages (all of them without a name) and return the folder that holds the checkpoints.

    A killed build goes on where it stopped: pictures and unfinished states lie under `work` (default ./build/world).

    Raises:
        InputError: a stage that does not exist.
    """
    for name in stages:
        if name not in STAGES:
            raise InputError(
                f"There is no stage {name!r}.{did_you_mean(name, STAGES)} Stages: {', '.join(STAGES)}."
            )
    import torch

    from toy_build.training import ROOT, Build

    torch.set_num_threads(1)
    workers = 0 if device == "cpu" else max((os.cpu_count() or 2) - 2, 1)
    found = Build(
        out or CHECKPOINTS, work or ROOT / "build" / "world", device=torch.device(device), workers=workers
    )
    for name in stages or STAGES:
        module, function = STAGES[name].split(":")
        getattr(importlib.import_module(module), function)(found)
    return found.out
