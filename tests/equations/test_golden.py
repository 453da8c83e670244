"""Golden numbers: what the equations gave when they were first found right, from seeded inputs, to 1e-6."""

import pytest
import torch
from torch import Tensor

from pixrl import equations

from .helpers import draw, values

X, V, W, NOISE = (draw(2, 5, seed=seed) for seed in range(4))
SIGMA, SIGMA_NEXT, T = values(1.0, 0.75), values(0.9, 0.6), values(0.4, 0.9)
REWARDS = draw(2, 5, seed=4)

RESULTS = {
    "flow_sde_step": lambda: equations.flow_sde_step(X, V, SIGMA, SIGMA_NEXT, sigma_max=0.9, noise=NOISE),
    "dance_step": lambda: equations.dance_step(X, V, SIGMA, SIGMA_NEXT, noise=NOISE),
    "cps_step": lambda: equations.cps_step(X, V, SIGMA, SIGMA_NEXT, noise=NOISE),
    "clipped_surrogate": lambda: [equations.clipped_surrogate(X[0], X[1], V[0], 0.2)],
    "gaussian_kl": lambda: [equations.gaussian_kl(X, V, T)],
    "group_advantages": lambda: [
        equations.group_advantages(REWARDS, scale, clip=1.2) for scale in ("group", "global")
    ],
    "leave_one_out": lambda: [equations.leave_one_out(REWARDS)],
    "shape_advantage": lambda: [
        equations.shape_advantage(X, V, 0.3, 0.7),
        equations.synergy(X, V, "harmonic"),
    ],
    "nft_loss": lambda: [equations.nft_loss(X, T, V, W, NOISE, T, 0.5)],
    "perturbation_objective": lambda: [equations.perturbation_objective(draw(3, 5), V[0])],
    "fuse": lambda: [equations.fuse(torch.stack((X, V)), W[0].sigmoid())],
}


def fingerprint(parts: list[Tensor]) -> list[float]:
    """Two weighted sums of each tensor: sensitive to values and to their order."""
    sums = []
    for part in parts:
        flat = part.flatten()
        ramp = torch.arange(1, len(flat) + 1, dtype=flat.dtype)
        sums += [flat.sum().item(), (flat * ramp).sum().item()]
    return sums


GOLDEN: dict[str, list[float]] = {
    "flow_sde_step": [
        -1.63365526,
        -11.34626977,
        -1.7591689,
        -10.3605798,
        1.16957428,
        1.63914855,
        -1.43387562,
        -2.19923576,
    ],
    "dance_step": [
        -2.39191679,
        -14.74459241,
        -2.38384008,
        -14.56368661,
        0.21105783,
        0.32724733,
        1.96131879,
        2.59256266,
    ],
    "cps_step": [
        -0.5221967,
        -4.19367703,
        -0.67737048,
        -2.99158968,
        1.42658477,
        1.99721868,
        -0.54796965,
        -0.94024801,
    ],
    "clipped_surrogate": [-1.3136768, -2.2433378],
    "gaussian_kl": [4.75517665, 5.44131571],
    "group_advantages": [0.9204044, 13.52924105, 0.64149284, 10.59447701],
    "leave_one_out": [0.0, 13.36155875],
    "shape_advantage": [-2.47268719, -26.40184438, 3.81231485, 3.86178937],
    "nft_loss": [2.67800753, 3.83931687],
    "perturbation_objective": [-4.32619228, -4.32619228],
    "fuse": [-2.38388799, -22.13059576],
}


@pytest.mark.parametrize("name", RESULTS)
def test_golden(name: str) -> None:
    assert fingerprint(list(RESULTS[name]())) == pytest.approx(GOLDEN[name], abs=1e-6)
