"""The clipped policy-gradient loss and the distance to the reference policy.

| paper                      | here                              |
|----------------------------|-----------------------------------|
| rho (RMLer: k_t)           | exp(`log_prob` - `old_log_prob`)  |
| A_i (RMLer: R)             | `advantage`                       |
| epsilon (RMLer: xi)        | `clip`                            |
"""

from typing import Literal

import torch
from torch import Tensor

from pixrl.equations._tensors import (
    broadcasts,
    per_sample,
    require_above,
    require_axes,
    require_batch,
    require_choice,
    require_same_shape,
    sample_mean,
    widen,
)
from pixrl.errors import InputError, ShapeError


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's pessimistic loss of every sample: max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)).

    All three must be `[B]`. A `[B, 1]` among them would broadcast to `[B, B]`, which is a bug in published
    code.

    Args:
        log_prob: under the policy being trained, `[B]`.
        old_log_prob: under the policy that drew the samples, `[B]`, no gradient.
        advantage: `[B]`.
        clip: half width of the trusted ratios, above 0 (1e-4 or less for mean log-probs of a flow, 0.2 in
            RMLer).

    Returns:
        The loss to minimize, `[B]`.

    Raises:
        ShapeError: an argument is not `[B]`.
        InputError: `clip` is not positive.

    Source: RMLer Eq. 4, Customized-GRPO Eq. 7 (both negated into a loss).
    """
    require_axes("B", log_prob=log_prob)
    require_batch(len(log_prob), old_log_prob=old_log_prob, advantage=advantage)
    require_above(0, clip=clip)
    log_prob, old_log_prob, advantage = widen(log_prob, old_log_prob, advantage)
    ratio = (log_prob - old_log_prob).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def gaussian_kl(
    mean: Tensor,
    ref_mean: Tensor,
    std: Tensor | float,
    *,
    form: Literal["exact", "flow_grpo"] = "exact",
    dt: Tensor | None = None,
) -> Tensor:
    """Return the KL divergence of two Gaussians of one std: mean((mean - ref_mean)^2 / (2 std^2)).

    Two forms, because published KL weights belong to one or the other:

    * `exact`: `std` is that of the noise really added, as in `SDEStep.std`. This is the divergence.
    * `flow_grpo`: sqrt(-dt) is left out of `std` on purpose, as in Flow-GRPO's code: the result is -dt times
      the exact one. Flow-GRPO's weight of 0.04 belongs to this form. Give `dt`; `std` stays `SDEStep.std`.

    Args:
        mean: the policy's mean, `[B, ...]`.
        ref_mean: the reference policy's mean, the shape of `mean`.
        std: a number, `[B]`, or as many axes as `mean` and broadcasting to it; above 0 for a finite result.
        form: which of the two.
        dt: `sigma_next - sigma`, `[B]`, negative; for `flow_grpo` alone.

    Returns:
        `[B]`, the mean over all non-batch dimensions.

    Raises:
        ShapeError: a shape differs from the ones above.
        InputError: `form` is unknown, or `dt` is missing, not negative, or given where it has no effect.

    Source: Flow-GRPO.
    """
    require_choice("form", form, ("exact", "flow_grpo"))
    require_same_shape(mean=mean, ref_mean=ref_mean)
    if (dt is None) != (form == "exact"):
        raise InputError(f"dt belongs to the form 'flow_grpo' and to no other, got form {form!r} and dt {dt}")
    mean, ref_mean = widen(mean, ref_mean)
    variance = _deviation(std, mean) ** 2
    if dt is not None:
        require_batch(len(mean), dt=dt)
        if not bool((dt < 0).all()):
            raise InputError(f"dt = sigma_next - sigma must be negative, got {dt.tolist()}")
        variance = variance / -per_sample(dt, mean)
    return sample_mean((mean - ref_mean) ** 2 / (2 * variance))


def _deviation(std: Tensor | float, like: Tensor) -> Tensor:
    """Check that a standard deviation broadcasts to `like` and cannot be read in two ways; return it."""
    if not isinstance(std, Tensor):
        return torch.tensor(std, dtype=like.dtype, device=like.device)
    if std.shape == like.shape[:1]:
        return per_sample(std, like)
    if std.ndim not in (0, like.ndim) or not broadcasts(std, like):
        raise ShapeError(
            f"std must be a number, [B] = [{len(like)}], or broadcast axis by axis to the mean's "
            f"{list(like.shape)}, got {list(std.shape)}"
        )
    return std.to(like.dtype)
