"""FLUX goes through the same code as SD3."""

import math
from pathlib import Path

import pytest

from pixrl import models
from pixrl.models.flux import FluxPolicy
from tests import tiny
from tests.align.parts import CLIPPED, NFT, ODE, SDE, aligner, groups, perturbed, same, scored, weights_of


@pytest.mark.parametrize("method", ["e2po-grpo", "e2po"])
def test_flux_is_aligned_by_the_same_code(tmp_path: Path, method: str) -> None:
    policy = models.load(tiny.flux(tmp_path / "flux"), device="cpu", dtype="float32")
    assert isinstance(policy, FluxPolicy)
    policy.attach_lora(rank=2, alpha=4)
    parts = (CLIPPED, SDE) if method == "e2po-grpo" else (NFT, ODE)
    found = aligner(policy, *parts, exploration=perturbed(), noises=2)
    before = weights_of(policy)
    rollouts = found.collect(groups(), 0)
    brightness_B = rollouts.images_BCHW.mean(dim=(1, 2, 3))
    metrics = found.update(rollouts, scored(brightness_B), {"r": 1.0})
    assert all(math.isfinite(value) for value in metrics.values())
    assert not same(before, weights_of(policy))
