"""Diffusion-DPO: learning from pairs of pictures, of which people (or a reward) preferred one.

| paper (Wallace et al. 2023)       | here                                                  |
|-----------------------------------|-------------------------------------------------------|
| x^w, x^l                          | what `won` and `lost` are errors of                   |
| ||eps - eps_theta(x_t, t)||^2     | `won`, `lost`: squared errors of the trained model    |
| ||eps - eps_ref(x_t, t)||^2       | `won_ref`, `lost_ref`: those of the frozen one        |
| beta T omega(lambda_t)            | `beta / 2`                                            |

Departure: the error is whatever the model regresses on, for a flow |v - (noise - x0)|^2, with a constant weight over
noise levels, as Flow-DPO has it (Liu et al. 2025, VideoReward).
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pixrl.equations._tensors import require_above, require_axes, require_same_shape, widen


class Preference(NamedTuple):
    """DPO's loss of some pairs, `[B]`, and the margin that it is of, above 0 where the winner gained more."""

    loss: Tensor
    margin: Tensor


def dpo_loss(won: Tensor, lost: Tensor, won_ref: Tensor, lost_ref: Tensor, beta: float) -> Preference:
    """Ask the trained model to gain more over the frozen one on the winner than on the loser: -log sigmoid(m).

    m = -beta / 2 ((won - won_ref) - (lost - lost_ref))

    Args:
        won: the trained model's squared error on the winner, `[B]`.
        lost: that on the loser, `[B]`.
        won_ref: the frozen model's squared error on the winner, `[B]`, no gradient.
        lost_ref: that on the loser, `[B]`, no gradient.
        beta: how sharply the winner is told from the loser, above 0.

    Returns:
        The loss `[B]`, to minimize, log 2 where trained and frozen model are the same; and m `[B]`.

    Raises:
        ShapeError: the shapes differ, or are not `[B]`.
        InputError: `beta` is not positive.

    Source: Diffusion-DPO Eq. 14.
    """
    require_axes("B", won=won)
    require_same_shape(won=won, lost=lost, won_ref=won_ref, lost_ref=lost_ref)
    require_above(0, beta=beta)
    won, lost, won_ref, lost_ref = widen(won, lost, won_ref, lost_ref)
    margin = -beta / 2 * ((won - won_ref) - (lost - lost_ref))
    return Preference(-F.logsigmoid(margin), margin)
