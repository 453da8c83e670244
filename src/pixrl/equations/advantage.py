"""Advantages: how much better a sample is than the others of its group.

| paper                | here          |
|----------------------|---------------|
| r_i                  | `rewards_PG`: one row a prompt, one column a sample |
| epsilon_std          | `eps`         |

A reward of nan marks a sample whose scoring failed: it takes no part in any statistic, its advantage is 0,
and the caller drops it from the loss. It is never treated as a reward of zero.
"""

from typing import Literal

import torch
from torch import Tensor

from pixrl.equations._tensors import require_above, require_axes, require_choice, widen
from pixrl.errors import InputError


def group_advantages(
    rewards_PG: Tensor,
    scale: Literal["group", "global", "none"] = "group",
    eps: float = 1e-4,
    clip: float | None = None,
) -> Tensor:
    """Divide rewards minus their group's mean by a population standard deviation + eps, and clamp to +-clip.

    A_i = (r_i - mean(r_1..r_G)) / (std + eps)

    Args:
        rewards_PG: rewards, `[P, G]`; nan marks a failed sample.
        scale: whose standard deviation divides: the row's (`group`), the whole batch's rewards' (`global`),
            or nobody's (`none`, `eps` unused).
        eps: added to the standard deviation, at least 0.
        clip: the largest magnitude, above 0, or None for no limit (5 is published).

    Returns:
        `[P, G]`, at least float32. All-equal groups and failed samples give exact zeros, never nan.

    Raises:
        ShapeError: `rewards_PG` is not `[P, G]`.
        InputError: a reward is infinite, `scale` is unknown, `eps` is negative or `clip` not positive.

    Source: Customized-GRPO Eq. 8; the global scale is Flow-GRPO's.
    """
    require_choice("scale", scale, ("group", "global", "none"))
    if not eps >= 0:
        raise InputError(f"eps must be at least 0, got {eps!r}")
    valid, centered = _centered(rewards_PG)
    least = torch.finfo(centered.dtype).tiny  # with eps = 0, too, an all-equal group gives zeros
    if scale == "group":
        centered = centered / (_population_std(centered, valid, dim=1) + eps).clamp_min(least)
    elif scale == "global":
        # the spread of the rewards themselves, prompts' means included
        rewards = torch.where(valid, rewards_PG.to(centered.dtype), 0.0)
        overall = rewards - rewards.sum() / valid.sum()
        centered = centered / (_population_std(overall, valid, dim=None) + eps).clamp_min(least)
    if clip is not None:
        require_above(0, clip=clip)
        centered = centered.clamp(-clip, clip)
    return torch.where(valid, centered, 0.0)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """Return every reward minus the mean of the others of its group: r_i - mean_{j != i} r_j.

    Args:
        rewards_PG: rewards, `[P, G]`; nan marks a failed sample.

    Returns:
        `[P, G]`, at least float32; 0 for failed samples and for a sample with no others to compare with.

    Raises:
        ShapeError: `rewards_PG` is not `[P, G]`.
        InputError: a reward is infinite.

    Source: the leave-one-out baseline (RLOO); here in place of RMLer's raw reward.
    """
    valid, centered = _centered(rewards_PG)
    count = valid.sum(dim=1, keepdim=True)
    # r_i - (n mean - r_i) / (n - 1) = n / (n - 1) (r_i - mean)
    return centered * count / (count - 1).clamp_min(1)


def _centered(rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Return which samples were scored, and rewards minus their row's mean over those; 0 for the others.

    Each row is shifted by its least reward first: equal rewards then centre to an exact zero.
    """
    require_axes("PG", rewards_PG=rewards_PG)
    if bool(rewards_PG.isinf().any()):
        raise InputError("a reward is infinite; score a failed sample nan, with its reason")
    (rewards,) = widen(rewards_PG)
    valid = ~rewards.isnan()
    least = torch.where(valid, rewards, torch.inf).amin(dim=1, keepdim=True)
    shifted = torch.where(valid, rewards - least, 0.0)
    mean = shifted.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True)
    return valid, torch.where(valid, shifted - mean, 0.0)


def _population_std(centered: Tensor, valid: Tensor, dim: int | None) -> Tensor:
    """Return sqrt(mean of squares) of centred values over the scored samples of a row (dim 1) or of all (None).

    nan where none was scored.
    """
    squares = torch.where(valid, centered**2, 0.0)
    return (squares.sum(dim=dim, keepdim=True) / valid.sum(dim=dim, keepdim=True)).sqrt()
