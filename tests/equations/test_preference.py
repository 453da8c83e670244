"""Diffusion-DPO's loss of pairs."""

import math

import pytest
import torch

from pixrl.equations import dpo_loss
from pixrl.errors import InputError, ShapeError
from tests.equations.helpers import close, draw, values

ERRORS = [draw(5, seed=seed).abs() for seed in range(4)]


def test_where_nothing_was_learned_the_loss_is_log_2() -> None:
    won, lost = ERRORS[:2]
    loss, margin = dpo_loss(won, lost, won, lost, 30.0)
    close(margin, [0.0] * 5)
    close(loss, [math.log(2)] * 5)


def test_the_two_orders_of_a_pair_share_one_probability() -> None:
    """sigmoid(m) is the probability that the winner was preferred, so that of the other order makes it 1."""
    won, lost, won_ref, lost_ref = ERRORS
    one, margin = dpo_loss(won, lost, won_ref, lost_ref, 3.0)
    other, opposite = dpo_loss(lost, won, lost_ref, won_ref, 3.0)
    close(opposite, (-margin).tolist())
    close((-one).exp() + (-other).exp(), [1.0] * 5)


def test_it_falls_with_the_winners_error_and_rises_with_the_losers() -> None:
    given = [error.clone().requires_grad_() for error in ERRORS]
    dpo_loss(*given, 2.0).loss.sum().backward()
    won, lost, won_ref, lost_ref = (error.grad for error in given)
    assert bool((won > 0).all()) and bool((lost < 0).all())
    close(won + lost, [0.0] * 5)
    close(won + won_ref, [0.0] * 5)
    close(lost + lost_ref, [0.0] * 5)


def test_by_hand() -> None:
    # the winner's error fell by 0.5, the loser's rose by 0.25: m = -beta / 2 (-0.75) = 1.5 with beta 4
    loss, margin = dpo_loss(values(1.0), values(2.25), values(1.5), values(2.0), 4.0)
    close(margin, [1.5])
    close(loss, [math.log(1 + math.exp(-1.5))])


def test_large_margins_neither_overflow_nor_vanish() -> None:
    loss, _ = dpo_loss(values(0.0, 1.0), values(1.0, 0.0), values(0.0, 0.0), values(0.0, 0.0), 5000.0)
    assert loss[0] == 0 and loss[1] == 2500


def test_gradients() -> None:
    inputs = [error.clone().requires_grad_() for error in ERRORS]
    assert torch.autograd.gradcheck(lambda *given: dpo_loss(*given, 1.5).loss, inputs)


def test_dtypes_and_bad_input() -> None:
    assert dpo_loss(*(error.half() for error in ERRORS), 1.0).loss.dtype == torch.float32
    with pytest.raises(ShapeError, match="lost_ref"):
        dpo_loss(*ERRORS[:3], ERRORS[3][:1], 1.0)
    with pytest.raises(ShapeError, match=r"won must be \[B\]"):
        dpo_loss(*(error[None] for error in ERRORS), 1.0)
    with pytest.raises(InputError, match="beta"):
        dpo_loss(*ERRORS, 0.0)
