"""One stochastic sampling step and its log-density.

Three samplers turn the flow's ODE into a policy with a density, from one noise level to the next lower one:
Flow-GRPO's SDE (Customized-GRPO Eq. 13), DanceGRPO's SDE, and coefficient-preserving sampling (CPS).

| paper        | here                                   |
|--------------|----------------------------------------|
| z_t, u_theta | `x`, `velocity`                        |
| t            | `sigma`, `[B]`, 1 is noise             |
| dt           | `sigma_next - sigma`, always negative  |
| epsilon_t    | `s` in the code: `eta` sqrt(sigma / (1 - sigma)) for Flow-GRPO, `eta` itself for DanceGRPO |

Conventions that differ between published codes and are pinned here:

1. `log_prob` is the mean, not the sum, over all non-batch dimensions. Published clip ranges rest on it.
2. `std` includes sqrt(-dt): it is the deviation of the noise really added.
3. `sigma_max` is the schedule's second value and stands in for sigma where sigma = 1.
4. `next_x` is rounded through the dtype of `x` before it is scored, so that the score of a stored sample is
   the score it was drawn with. The drawn sample is a constant to `log_prob`, as a policy gradient needs.
5. The Gaussian log-probs keep their normalizer; CPS drops it, as published.

With `eta = 0` a step is the Euler step of the ODE; it has no density then and the Gaussian `log_prob` is nan.
The last step of a schedule is too sharp to train on: leave it out.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pixrl.equations._tensors import per_sample, require_batch, require_same_shape, sample_mean, widen
from pixrl.errors import InputError


class SDEStep(NamedTuple):
    """The outcome of one step from `sigma` to `sigma_next`."""

    next_x: Tensor
    """The sample, `[B, ...]`, in the dtype of `x`."""
    mean: Tensor
    """The Gaussian's mean, `[B, ...]`."""
    std: Tensor
    """The standard deviation of the noise really added, `[B, 1, ..., 1]`: it broadcasts against `mean`."""
    log_prob: Tensor
    """The mean over all non-batch dimensions of the log-density of `next_x`, `[B]`."""


def flow_sde_step(
    x: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float = 0.7,
    *,
    sigma_max: float | Tensor,
    noise: Tensor | None = None,
    next_x: Tensor | None = None,
) -> SDEStep:
    """Take Flow-GRPO's step, whose noise grows with the noise level.

    s = eta sqrt(sigma / (1 - sigma'));  sigma' = sigma, or `sigma_max` where sigma = 1
    mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt;  std = s sqrt(-dt)

    Args:
        x: current state, `[B, ...]`; its dtype is the one samples are stored in.
        velocity: the model's output at `x`, the shape of `x`.
        sigma: current noise level, `[B]`, in (0, 1].
        sigma_next: next noise level, `[B]`, in [0, sigma).
        eta: noise scale, at least 0.
        sigma_max: the schedule's second value, in (0, 1). Stands in where sigma = 1, where s has its pole.
        noise: standard normal, the shape of `x`; give it to sample.
        next_x: a stored sample, the shape of `x`; give it to re-score. Exactly one of the two.

    Raises:
        ShapeError: a shape differs from the ones above.
        InputError: a noise level or `eta` is out of range, or not exactly one of `noise`, `next_x` is given.

    Source: Flow-GRPO; Customized-GRPO Eq. 13 with epsilon_t = s.
    """
    wide, velocity, level, dt = _prepare(x, velocity, sigma, sigma_next, eta)
    bounded = torch.where(level == 1, float(sigma_max), level)
    if not bool(((bounded > 0) & (bounded < 1)).all()):
        raise InputError(
            f"sigma_max must be the schedule's second value, in (0, 1), got {float(sigma_max):g}"
        )
    s = eta * (level / (1 - bounded)).sqrt()
    half = s**2 / (2 * level)
    mean = wide * (1 + half * dt) + velocity * (1 + half * (1 - level)) * dt
    return _finish(x, mean, s * (-dt).sqrt(), noise, next_x, _gaussian_log_prob)


def dance_step(
    x: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float = 0.3,
    *,
    sigma_max: float | Tensor | None = None,
    noise: Tensor | None = None,
    next_x: Tensor | None = None,
) -> SDEStep:
    """Take DanceGRPO's step, with the same noise at every level.

    x0 = x - sigma v;  score = -(x - (1 - sigma) x0) / sigma^2
    mean = x + dt v - eta^2 score dt / 2;  std = eta sqrt(-dt)

    Args and errors as in `flow_sde_step`; `sigma_max` is taken so that the three steps are called alike and
    has no part in this formula, which has no pole at sigma = 1.

    Source: DanceGRPO; Customized-GRPO Eq. 13 with epsilon_t = eta.
    """
    wide, velocity, level, dt = _prepare(x, velocity, sigma, sigma_next, eta)
    x0 = wide - level * velocity
    score = -(wide - (1 - level) * x0) / level**2
    mean = wide + dt * velocity - 0.5 * eta**2 * score * dt
    return _finish(x, mean, eta * (-dt).sqrt(), noise, next_x, _gaussian_log_prob)


def cps_step(
    x: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float = 0.8,
    *,
    sigma_max: float | Tensor | None = None,
    noise: Tensor | None = None,
    next_x: Tensor | None = None,
) -> SDEStep:
    """Take a coefficient-preserving step: data keeps its weight 1 - sigma_next, all noise together sigma_next.

    std = sigma_next sin(eta pi / 2);  x0 = x - sigma v;  x1 = x + (1 - sigma) v
    mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1;  log_prob = -mean((next_x - mean)^2)

    Args and errors as in `flow_sde_step`, with `eta` in [0, 1]: the share of the next noise that is drawn
    anew, as an angle. `sigma_max` is taken so that the three steps are called alike and has no part in this
    formula. `log_prob` drops the variance and the normalizer as published: the clip ranges rest on it.

    Source: Flow-GRPO's CPS variant.
    """
    if eta > 1:
        raise InputError(f"eta of the coefficient-preserving step must be in [0, 1], got {eta!r}")
    wide, velocity, level, _ = _prepare(x, velocity, sigma, sigma_next, eta)
    next_level = per_sample(sigma_next, wide)
    x0 = wide - level * velocity
    x1 = wide + (1 - level) * velocity
    # sqrt(sigma_next^2 - std^2) = sigma_next cos(eta pi / 2), without the cancellation
    kept = next_level * math.cos(eta * math.pi / 2)
    mean = (1 - next_level) * x0 + kept * x1
    std = next_level * math.sin(eta * math.pi / 2)
    # the variance and all constants are dropped, as published
    return _finish(x, mean, std, noise, next_x, lambda action, mean, _: -((action - mean) ** 2))


def _prepare(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check and widen state and velocity; return them, and the noise level and dt as `[B, 1, ..., 1]`."""
    require_same_shape(x=x, velocity=velocity)
    require_batch(len(x), sigma=sigma, sigma_next=sigma_next)
    if not bool(((sigma <= 1) & (sigma_next < sigma) & (sigma_next >= 0)).all()):
        raise InputError(
            f"a step needs 0 <= sigma_next < sigma <= 1, got sigma {sigma.tolist()} "
            f"and sigma_next {sigma_next.tolist()}"
        )
    if not eta >= 0:
        raise InputError(f"eta must be at least 0, got {eta!r}")
    x, velocity = widen(x, velocity)
    level, next_level = per_sample(sigma, x), per_sample(sigma_next, x)
    return x, velocity, level, next_level - level


def _finish(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    noise: Tensor | None,
    next_x: Tensor | None,
    log_density: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> SDEStep:
    """Draw the next state from `noise`, or take `next_x` as drawn; round it as stored; score it."""
    if noise is not None and next_x is None:
        require_same_shape(x=x, noise=noise)
        stored = (mean + std * noise).to(x.dtype)
        action = stored.detach()
    elif next_x is not None and noise is None:
        require_same_shape(x=x, next_x=next_x)
        stored = action = next_x.to(x.dtype)
    else:
        given = "both" if noise is not None else "neither"
        raise InputError(f"give exactly one of noise (to sample) and next_x (to re-score), got {given}")
    log_prob = sample_mean(log_density(action, mean, std))
    return SDEStep(stored, mean, std, log_prob)


def _gaussian_log_prob(action: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(action; mean, std^2) of every element, normalizer included."""
    return -((action - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
