"""Train the checkpoints that pixrl ships from nothing, seeded and resumable: `pixrl toy build` in a checkout."""

import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pixrl.errors import InputError, did_you_mean
from pixrl.toy import CHECKPOINTS
from toy_build.first_edition.processes import join, launcher, wait_for_all
from toy_build.first_edition.workshop import Workshop

STAGES = {
    "clip": "toy_build.first_edition.clip:build_clip",
    "vae": "toy_build.first_edition.vae:build_vae",
    "segmenter": "toy_build.first_edition.segmenter:build_segmenter",
    "identity": "toy_build.first_edition.identity:build_identity",
    "preference": "toy_build.first_edition.preference:build_preference",
    "sd3": "toy_build.first_edition.sd3:build_sd3",
    "flux": "toy_build.first_edition.flux:build_flux",
}
"""The stages of a build and the functions that train them, in the order in which they need each other."""


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
