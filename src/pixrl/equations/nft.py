"""DiffusionNFT: learning from good and bad samples on the forward process, without likelihoods.

Equation numbers are those of E2PO, which restates DiffusionNFT in its section 3.2.

| paper             | here                                  |
|-------------------|---------------------------------------|
| r                 | `r`, the optimality probability       |
| Z_c               | `clip`, the normalizing factor        |
| v_theta, v_old    | `v`, `v_old`                          |
| v+, v-            | `positive`, `negative`                |
| beta              | `beta`                                |
| sg[.]             | `.detach()`                           |

Departure: the released trainer scales the loss by 5 / beta and adds 1e-4 |v - v_ref|^2. Both stay in the
trainer, so that the weight of that penalty means the same there.
"""

from torch import Tensor

from pixrl.equations._tensors import (
    per_sample,
    require_above,
    require_batch,
    require_choice,
    require_same_shape,
    require_unit_time,
    sample_mean,
    widen,
)
from pixrl.errors import InputError

LEAST_WEIGHT = 1e-5
"""The least self-normalizing weight of `nft_loss`."""


def optimality(advantage: Tensor, clip: float = 5.0) -> Tensor:
    """Return the probability that a sample is optimal: r = 1/2 + 1/2 clamp(A / clip, -1, 1).

    Args:
        advantage: any shape.
        clip: the advantage that counts as certain, above 0.

    Returns:
        The shape of `advantage`, in [0, 1]; an advantage of 0 gives 1/2.

    Raises:
        InputError: `clip` is not positive.

    Source: E2PO Eq. 3.
    """
    require_above(0, clip=clip)
    (advantage,) = widen(advantage)
    return 0.5 + 0.5 * (advantage / clip).clamp(-1, 1)


def implicit_velocities(v: Tensor, v_old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the velocities of the implicit good and bad policies, on either side of the old one.

    v+ = (1 - beta) v_old + beta v;  v- = (1 + beta) v_old - beta v

    Args:
        v: the trained policy's velocity, `[B, ...]`.
        v_old: the sampling policy's velocity, the shape of `v`, no gradient.
        beta: how far the two lie from `v_old`.

    Returns:
        `(v+, v-)`, each the shape of `v`. Their mean is `v_old`.

    Raises:
        ShapeError: the shapes differ.

    Source: E2PO Eqs. 5 and 6.
    """
    require_same_shape(v=v, v_old=v_old)
    v, v_old = widen(v, v_old)
    return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v


def nft_loss(x_t: Tensor, t: Tensor, x0: Tensor, v: Tensor, v_old: Tensor, r: Tensor, beta: float) -> Tensor:
    """Regress both implicit policies on the sample, weighted by its optimality: r L+ + (1 - r) L-.

    L = mean((x0' - x0)^2 / w);  x0' = x_t - t v';  w = stop-gradient of mean|x0' - x0|, at least 1e-5

    Args:
        x_t: the sample at time t with fresh noise, `[B, ...]`.
        t: time, `[B]`, in [0, 1].
        x0: the sample, the shape of `x_t`.
        v: the trained policy's velocity at `x_t`, the shape of `x_t`.
        v_old: the sampling policy's velocity at `x_t`, the shape of `x_t`, no gradient.
        r: optimality, `[B]`, in [0, 1].
        beta: see `implicit_velocities`.

    Returns:
        `[B]`, to minimize.

    Raises:
        ShapeError: a shape differs from the ones above.
        InputError: a time or an optimality is outside [0, 1].

    Source: E2PO Eqs. 4 and 7.
    """
    require_same_shape(x_t=x_t, x0=x0, v=v, v_old=v_old)
    require_batch(len(x_t), t=t, r=r)
    require_unit_time(t=t)
    if not bool(((r >= 0) & (r <= 1)).all()):
        raise InputError(f"r must be in [0, 1]; give the optimality, not the advantage; got {r.tolist()}")
    x_t, x0, v, v_old = widen(x_t, x0, v, v_old)
    positive, negative = implicit_velocities(v, v_old, beta)
    time, r = per_sample(t, x_t), r.to(x_t.dtype)
    good = _self_normalized(x_t - time * positive, x0)
    bad = _self_normalized(x_t - time * negative, x0)
    return r * good + (1 - r) * bad


def old_policy_decay(step: int, kind: int) -> float:
    """Return d, how much of the old policy stays at an epoch's end: old <- d old + (1 - d) current.

    kind 0: 0;  kind 1: min(0.001 step, 0.5);  kind 2: 0 up to step 75, then min(0.0075 (step - 75), 0.999)

    Args:
        step: epochs so far, at least 0.
        kind: 0, 1 or 2.

    Returns:
        d, in [0, 1).

    Raises:
        InputError: `kind` is none of the three or `step` is negative.

    Source: DiffusionNFT's released trainer.
    """
    require_choice("kind", kind, (0, 1, 2))
    if step < 0:
        raise InputError(f"step must be at least 0, got {step}")
    if kind == 0:
        return 0.0
    if kind == 1:
        return min(0.001 * step, 0.5)
    return min(0.0075 * max(step - 75, 0), 0.999)


def _self_normalized(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the squared error over its own mean magnitude, which carries no gradient; `[B]`."""
    error = predicted - target
    weight = sample_mean(error.detach().abs()).clamp_min(LEAST_WEIGHT)
    return sample_mean(error**2) / weight
