"""The clipped loss in all four quadrants, the 16 x 16 trap, and both forms of the KL term."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pixrl.equations import clipped_surrogate, dance_step, gaussian_kl
from pixrl.errors import InputError, ShapeError

from .helpers import close, draw, values


def test_at_the_old_policy_the_loss_is_the_policy_gradient() -> None:
    log_prob = draw(5).requires_grad_()
    advantage = draw(5, seed=1)
    loss = clipped_surrogate(log_prob, log_prob.detach(), advantage, 0.2)
    close(loss.detach(), (-advantage).tolist())
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    close(gradient, (-advantage).tolist())


# ratio, advantage, clip 0.2 -> loss, and whether the gradient flows (RMLer Eq. 4, negated, case by case)
QUADRANTS = [
    (1.5, 2.0, -1.2 * 2.0, False),  # better and already likelier than the limit
    (0.5, 2.0, -0.5 * 2.0, True),  # better and less likely: pull back in full
    (1.5, -2.0, 1.5 * 2.0, True),  # worse and likelier: push down in full
    (0.5, -2.0, 0.8 * 2.0, False),  # worse and already below the limit
    (1.1, 2.0, -1.1 * 2.0, True),
    (0.9, -2.0, 0.9 * 2.0, True),
    (1.3, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "flows"), QUADRANTS)
def test_by_hand_in_every_quadrant(ratio: float, advantage: float, loss: float, flows: bool) -> None:
    log_prob = values(math.log(ratio) - 3).requires_grad_()
    got = clipped_surrogate(log_prob, values(-3.0), values(advantage), 0.2)
    close(got.detach(), [loss])
    (gradient,) = torch.autograd.grad(got.sum(), log_prob)
    close(gradient, [-advantage * ratio if flows else 0.0])


def test_the_loss_is_pessimistic_and_clipping_is_wide_open_at_last() -> None:
    log_prob, old, advantage = draw(50), draw(50, seed=1), draw(50, seed=2)
    unclipped = -advantage * (log_prob - old).exp()
    assert (clipped_surrogate(log_prob, old, advantage, 0.2) >= unclipped - 1e-12).all()
    close(clipped_surrogate(log_prob, old, advantage, 1e9), unclipped.tolist())


def test_gradients_match_finite_differences() -> None:
    old, advantage = draw(6, seed=1), draw(6, seed=2)
    inputs = (draw(6).requires_grad_(),)
    assert torch.autograd.gradcheck(lambda lp: clipped_surrogate(lp, old, advantage, 0.2), inputs)


def test_samples_do_not_mix() -> None:
    log_prob, old, advantage = draw(4), draw(4, seed=1), draw(4, seed=2)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = clipped_surrogate(log_prob[order], old[order], advantage[order], 0.2)
    close(shuffled, clipped_surrogate(log_prob, old, advantage, 0.2)[order].tolist())


def test_sixteen_actions_against_sixteen_states_never_broadcast() -> None:
    row, column = draw(16), draw(16, 1)
    for arguments in ((row, column, row), (row, row, column), (column, row, row), (column, column, row)):
        with pytest.raises(ShapeError, match=r"\[16, 1\]"):
            clipped_surrogate(*arguments, 0.2)
    with pytest.raises(ShapeError, match="B = 16"):
        clipped_surrogate(row, row, row[:1], 0.2)
    assert clipped_surrogate(row, row, row, 0.2).shape == (16,)


def test_half_precision_ratios_are_taken_in_float32() -> None:
    # the difference of two bfloat16 log-probs is exact in float32; its exponential would not be in bfloat16
    log_prob, old = values(-1.0).bfloat16(), values(-1.0078125).bfloat16()
    loss = clipped_surrogate(log_prob, old, values(1.0).bfloat16(), 0.5)
    assert loss.dtype == torch.float32
    close(loss, [-math.exp(0.0078125)], tol=1e-6)


def test_clip_must_be_positive() -> None:
    for wrong in (0.0, -0.2):
        with pytest.raises(InputError, match="clip"):
            clipped_surrogate(draw(2), draw(2), draw(2), wrong)


# -- gaussian_kl ---------------------------------------------------------------------------------------------


def test_the_exact_form_is_the_divergence() -> None:
    mean, reference, std = draw(3, 4, 2), draw(3, 4, 2, seed=1), values(0.3, 1.0, 2.5)
    shaped = std[:, None, None].expand_as(mean)
    wanted = kl_divergence(Normal(mean, shaped), Normal(reference, shaped)).mean(dim=(1, 2))
    close(gaussian_kl(mean, reference, std), wanted.tolist())
    close(gaussian_kl(mean, reference, std[:, None, None]), wanted.tolist())
    close(gaussian_kl(mean, reference, shaped), wanted.tolist())
    close(gaussian_kl(reference, mean, std), wanted.tolist())


def test_no_distance_no_divergence() -> None:
    mean = draw(3, 4)
    close(gaussian_kl(mean, mean, 0.1), [0.0, 0.0, 0.0])


def test_kl_by_hand() -> None:
    # differences 1 and 3, std 0.5: (1 + 9) / 2 / (2 * 0.25) = 10
    mean, reference = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)
    close(gaussian_kl(mean, reference, 0.5), [10.0])
    close(gaussian_kl(mean, reference, torch.tensor(0.5)), [10.0])
    close(gaussian_kl(mean, reference, torch.tensor([[0.5, 1.0]])), [(1 / 0.5 + 9 / 2) / 2])


def test_the_flow_grpo_form_leaves_sqrt_dt_out_of_std() -> None:
    x, velocity, other = draw(2, 5), draw(2, 5, seed=1), draw(2, 5, seed=2)
    sigma, sigma_next = values(0.9, 0.5), values(0.8, 0.3)
    step = dance_step(x, velocity, sigma, sigma_next, 0.3, noise=x)
    reference = dance_step(x, other, sigma, sigma_next, 0.3, noise=x)
    dt = sigma_next - sigma
    exact = gaussian_kl(step.mean, reference.mean, step.std)
    published = gaussian_kl(step.mean, reference.mean, step.std, form="flow_grpo", dt=dt)
    close(published, (exact * -dt).tolist())
    # dance: std / sqrt(-dt) is eta itself
    close(published, ((step.mean - reference.mean) ** 2 / (2 * 0.3**2)).mean(dim=1).tolist())


def test_kl_gradients_match_finite_differences() -> None:
    inputs = (
        draw(2, 3).requires_grad_(),
        draw(2, 3, seed=1).requires_grad_(),
        values(0.5, 1.5).requires_grad_(),
    )
    dt = values(-0.1, -0.2)
    assert torch.autograd.gradcheck(gaussian_kl, inputs)
    assert torch.autograd.gradcheck(lambda *a: gaussian_kl(*a, form="flow_grpo", dt=dt), inputs)


def test_kl_arguments_are_checked() -> None:
    mean, dt = draw(3, 4), values(-0.1, -0.1, -0.1)
    with pytest.raises(ShapeError, match="ref_mean"):
        gaussian_kl(mean, mean[:1], 1.0)
    for wrong in (mean[0], draw(3, 4, 1), draw(3, 2), draw(1)):
        with pytest.raises(ShapeError, match="std must be"):
            gaussian_kl(mean, mean, wrong)
    with pytest.raises(InputError, match="'exact', 'flow_grpo'"):
        gaussian_kl(mean, mean, 1.0, form="reverse")
    with pytest.raises(InputError, match="flow_grpo"):
        gaussian_kl(mean, mean, 1.0, form="flow_grpo")
    with pytest.raises(InputError, match="no other"):
        gaussian_kl(mean, mean, 1.0, dt=dt)
    with pytest.raises(ShapeError, match="dt"):
        gaussian_kl(mean, mean, 1.0, form="flow_grpo", dt=dt[:1])
    for wrong in (0.1, 0.0):
        with pytest.raises(InputError, match="negative"):
            gaussian_kl(mean, mean, 1.0, form="flow_grpo", dt=values(-0.1, -0.1, wrong))


def test_kl_of_half_precision_means_is_float32() -> None:
    mean = draw(2, 3).half()
    result = gaussian_kl(mean, mean + 1, values(1.0, 2.0))
    assert result.dtype == torch.float32
    close(result, [0.5, 0.125], tol=2e-3)
    for std in (values(1.0, 2.0), values(1.0, 2.0)[:, None], values(1.0)[0]):
        assert gaussian_kl(mean, mean + 1, std).dtype == torch.float32
