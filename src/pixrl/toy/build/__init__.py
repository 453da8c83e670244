"""`pixrl toy build`: every toy checkpoint from nothing, seeded and resumable."""

import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pixrl.errors import InputError, did_you_mean
from pixrl.toy import CHECKPOINTS
from pixrl.toy.build.processes import join, launcher, wait_for_all
from pixrl.toy.build.workshop import Workshop

STAGES = {
    "clip": "pixrl.toy.build.clip:build_clip",
    "vae": "pixrl.toy.build.vae:build_vae",
    "segmenter": "pixrl.toy.build.segmenter:build_segmenter",
    "identity": "pixrl.toy.build.identity:build_identity",
    "preference": "pixrl.toy.build.preference:build_preference",
    "sd3": "pixrl.toy.build.sd3:build_sd3",
    "flux": "pixrl.toy.build.flux:build_flux",
}
"""In the order in which they need each other."""


def build(
    stages: Sequence[str] = (), *, resume: bool = False, out: Path | None = None, work: Path | None = None,
    seed: int = 7, device: str = "cpu",
) -> Path:  # fmt: skip
    """Train the named stages (all of them without a name) and return the folder that holds the checkpoints.

    A killed build goes on with `resume=True`; unfinished states lie under `work` (default ./build/toy). Started by
    `torchrun --nproc-per-node N -m pixrl toy build`, N processes train together and the first one writes.

    Raises:
        InputError: a stage that does not exist.
    """
    for name in stages:
        if name not in STAGES:
            raise InputError(
                f"There is no stage {name!r}.{did_you_mean(name, STAGES)} Stages: {', '.join(STAGES)}."
            )
    join()
    command = shlex.join(["pixrl", *sys.argv[1:]]) if sys.argv[1:2] == ["toy"] else "pixrl toy build"
    command = f"{launcher()}{command}"
    shop = Workshop(
        out or CHECKPOINTS, work or Path("build/toy"), seed, torch.device(device), resume, command
    )
    for name, target in STAGES.items():
        if not stages or name in stages:
            module, function = target.split(":")
            getattr(importlib.import_module(module), function)(shop)
            wait_for_all()
    return shop.out
