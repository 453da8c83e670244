"""Customized-GRPO: synergy-aware reward shaping (SARS) and time-aware dynamic weighting (TDW).

| paper                    | here                         |
|--------------------------|------------------------------|
| A_id, A_prompt           | `a_id`, `a_prompt`, each normalized in its group first |
| S                        | `synergy`                    |
| w_id, w_prompt           | `w_id` = 1 - `w_prompt`, `prompt_weight` |
| T_trans, T_id            | `start`, `end`               |
| lambda, t_c              | `steepness`, `center`        |

Departures from the paper's text:

1. `step` counts upward and step 0 is the noisiest. Eq. 12 writes t counting down; its own text, appendix A.1
   and Table 5 need the upward reading.
2. lambda and t_c are not given. 0.8 and the midpoint of the transition keep both of its ends continuous.
3. `recenter` subtracts the mean that SARS adds to a group (about -0.11 for independent rewards). Off by
   default.
"""

from typing import Literal

import torch
from torch import Tensor

from pixrl.equations._tensors import (
    Real,
    broadcasts,
    require_above,
    require_choice,
    require_same_shape,
    widen,
    working_dtype,
)
from pixrl.errors import InputError, ShapeError

Synergy = Literal["tanh", "min", "max", "harmonic", "none"]

PUBLISHED_STEPS = 25
"""The number of sampling steps that `start`, `end` and `center` of `prompt_weight` are given for."""
HARMONIC_FLOOR = 0.1
"""The least share of |a| + |b| that |a + b| counts for in the harmonic mean."""


def synergy(a_id: Tensor, a_prompt: Tensor, kind: Synergy) -> Tensor:
    """Return how far two advantages agree, for every sample.

    `tanh` is the paper's, tanh(a b), in [-1, 1]. `min`, `max` and `harmonic`, 2 a b / (a + b), are the rivals
    of its Table 3, and `none` is 0. The harmonic mean has a pole at a = -b, so |a + b| counts for at least a
    tenth of |a| + |b|: its magnitude is at most ten times the harmonic mean of |a| and |b|. Equal signs are
    untouched. For opposite signs it is no mean at all, its sign follows -(a + b): a weakness of that rival,
    kept as it is.

    Args:
        a_id, a_prompt: advantages, any one shape.
        kind: which of the five.

    Returns:
        The shape of `a_id`. It is symmetric in its two arguments.

    Raises:
        ShapeError: the shapes differ.
        InputError: `kind` is unknown.

    Source: Customized-GRPO Eq. 10 and Table 3.
    """
    require_choice("kind", kind, ("tanh", "min", "max", "harmonic", "none"))
    require_same_shape(a_id=a_id, a_prompt=a_prompt)
    a, b = widen(a_id, a_prompt)
    if kind == "tanh":
        return (a * b).tanh()
    if kind == "min":
        return torch.minimum(a, b)
    if kind == "max":
        return torch.maximum(a, b)
    if kind == "harmonic":
        tiny = torch.finfo(a.dtype).tiny
        floor = (HARMONIC_FLOOR * (a.abs() + b.abs())).clamp_min(tiny)
        return 2 * a * b / torch.maximum((a + b).abs(), floor).copysign(a + b)
    return torch.zeros_like(a)


def shape_advantage(
    a_id: Tensor,
    a_prompt: Tensor,
    w_id: Tensor | float,
    w_prompt: Tensor | float,
    alpha: float = 0.5,
    kind: Synergy = "tanh",
    *,
    recenter: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Return the SARS advantage: the weighted sum plus the synergy, minus it where both advantages are bad.

    A = w_id a_id + w_prompt a_prompt + alpha S   if a_id > 0 or a_prompt > 0
    A = w_id a_id + w_prompt a_prompt - alpha S   otherwise

    Args:
        a_id, a_prompt: advantages, `[P, G]` or `[B]`, each normalized in its group.
        w_id, w_prompt: weights, numbers or tensors that broadcast to the shape of `a_id`.
        alpha: strength of the synergy, at least 0.
        kind: see `synergy`.
        recenter: subtract the mean over the last axis, the samples of one group. Log that mean either way.
        valid: bool, the shape of `a_id`, for `recenter` alone: failed samples are left out of the mean and
            stay as they are.

    Returns:
        The shape of `a_id`.

    Raises:
        ShapeError: the shapes differ or a weight does not broadcast to them.
        InputError: `alpha` is negative, `kind` is unknown, or `valid` is given without `recenter`.

    Source: Customized-GRPO Eq. 11.
    """
    if not alpha >= 0:
        raise InputError(f"alpha must be at least 0, got {alpha!r}")
    s = synergy(a_id, a_prompt, kind)
    a_id, a_prompt = widen(a_id, a_prompt)
    for name, weight in {"w_id": w_id, "w_prompt": w_prompt}.items():
        if isinstance(weight, Tensor) and not broadcasts(weight, a_id):
            raise ShapeError(
                f"{name} has shape {list(weight.shape)}, which does not broadcast to the advantages' {list(a_id.shape)}"
            )
    signed = torch.where((a_id > 0) | (a_prompt > 0), s, -s)
    shaped = w_id * a_id + w_prompt * a_prompt + alpha * signed
    if not recenter:
        if valid is not None:
            raise InputError("valid has an effect with recenter=True alone")
        return shaped
    valid = torch.ones_like(shaped, dtype=torch.bool) if valid is None else valid
    require_same_shape(a_id=shaped, valid=valid)
    total = torch.where(valid, shaped, 0.0).sum(dim=-1, keepdim=True)
    return torch.where(valid, shaped - total / valid.sum(dim=-1, keepdim=True), shaped)


def prompt_weight(
    step: Real,
    num_steps: int = PUBLISHED_STEPS,
    w_max: float = 0.7,
    w_min: float = 0.3,
    start: float = 6,
    end: float = 22,
    steepness: float = 0.8,
    center: float = 14.0,
    inverted: bool = False,
) -> Real:
    """Return the weight of the prompt reward at a sampling step; the identity's is 1 minus it.

    w_max before `start`; w_min from `end` on; between them
    w_min + (w_max - w_min) (1 - sigmoid(steepness (step - center)))

    Look the weight up by the *true* step index stored with a sample, never by the position in a loop over
    shuffled steps: the released code does the latter, which makes the weight independent of time.

    Args:
        step: true index of the sampling step, 0 is the noisiest; a number gives a float, a tensor a tensor.
        num_steps: sampling steps in all. `start`, `end` and `center` are given for 25 and scale with it.
        w_max, w_min: the bounds, 0 <= w_min <= w_max <= 1.
        start, end: first step of the transition and of the identity phase, of 25, `start` <= `end`.
        steepness: lambda, per step; it is not scaled. 0.8 * 25 / num_steps keeps the curve's shape.
        center: midpoint of the sigmoid, of 25.
        inverted: the paper's ablation, w_min first and w_max last.

    Raises:
        InputError: a step is outside [0, num_steps], or a bound is out of order.

    Source: Customized-GRPO Eq. 12.
    """
    require_above(0, num_steps=num_steps)
    if not (0 <= w_min <= w_max <= 1 and start <= end):
        raise InputError(
            f"need 0 <= w_min <= w_max <= 1 and start <= end, got w_min {w_min}, w_max {w_max}, "
            f"start {start}, end {end}"
        )
    # a lone number keeps double precision
    exact = step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64)
    position = exact.to(working_dtype(exact))
    if not bool(((position >= 0) & (position <= num_steps)).all()):
        raise InputError(f"step must be in [0, {num_steps}], got {step}")
    first, last = (w_min, w_max) if inverted else (w_max, w_min)
    stretch = num_steps / PUBLISHED_STEPS
    fading = last + (first - last) * (1 - (steepness * (position - center * stretch)).sigmoid())
    weight = torch.where(
        position < start * stretch, first, torch.where(position < end * stretch, fading, last)
    )
    if isinstance(step, Tensor):
        return weight
    return weight.item()
