"""DiffusionNFT: which way the loss pulls, its stop-gradient, its schedule for the old policy."""

import itertools
import math

import pytest
import torch

from pixrl.equations import implicit_velocities, interpolate, nft_loss, old_policy_decay, optimality
from pixrl.errors import InputError, ShapeError

from .helpers import close, draw, values

# -- optimality ----------------------------------------------------------------------------------------------


def test_optimality_is_a_probability_and_rises() -> None:
    advantage = torch.linspace(-12, 12, 201, dtype=torch.float64)
    r = optimality(advantage)
    assert r.min() == 0
    assert r.max() == 1
    assert (r.diff() >= 0).all()
    close(r + optimality(-advantage), [1.0] * 201)


def test_optimality_by_hand() -> None:
    # E2PO Eq. 3 with clip 5: 1/2 + A / 10, cut to [0, 1]
    close(optimality(values(-7.0, -5.0, -1.0, 0.0, 2.5, 5.0, 9.0)), [0.0, 0.0, 0.4, 0.5, 0.75, 1.0, 1.0])
    close(optimality(values(-1.0, 1.0, 3.0), 2.0), [0.25, 0.75, 1.0])
    close(optimality(values(-0.25, 1.0), 0.5), [0.25, 1.0])
    assert optimality(draw(2, 3).half()).dtype == torch.float32
    assert optimality(draw(2, 3)).shape == (2, 3)
    for wrong in (0.0, -1.0):
        with pytest.raises(InputError, match="clip"):
            optimality(values(1.0), wrong)


# -- implicit_velocities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_the_two_policies_lie_on_either_side_of_the_old_one(beta: float) -> None:
    v, v_old = draw(3, 4), draw(3, 4, seed=1)
    positive, negative = implicit_velocities(v, v_old, beta)
    close((positive + negative) / 2, v_old.tolist())
    close(positive - v_old, (beta * (v - v_old)).tolist())
    for same in implicit_velocities(v, v, beta):
        close(same, v.tolist())


def test_implicit_velocities_by_hand() -> None:
    # E2PO Eqs. 5, 6 with v = 3, v_old = 1, beta = 1/4: 3/4 + 3/4 and 5/4 - 3/4
    positive, negative = implicit_velocities(values(3.0), values(1.0), 0.25)
    close(positive, [1.5])
    close(negative, [0.5])
    positive, negative = implicit_velocities(values(3.0).half(), values(1.0).half(), 1.0)
    assert positive.dtype == negative.dtype == torch.float32
    close(positive, [3.0])
    close(negative, [-1.0])
    with pytest.raises(ShapeError, match="v_old"):
        implicit_velocities(draw(3, 1), draw(3, 4), 1.0)


# -- nft_loss ------------------------------------------------------------------------------------------------

X0, NOISE = draw(3, 4, 2), draw(3, 4, 2, seed=1)
T = values(0.2, 0.5, 0.9)
X_T, TARGET = interpolate(X0, NOISE, T), NOISE - X0


def loss(v: torch.Tensor, v_old: torch.Tensor, r: float, beta: float = 1.0) -> torch.Tensor:
    return nft_loss(X_T, T, X0, v, v_old, torch.full((3,), r, dtype=torch.float64), beta)


def gradient(v: torch.Tensor, v_old: torch.Tensor, r: float, beta: float = 1.0) -> torch.Tensor:
    v = v.clone().requires_grad_()
    return torch.autograd.grad(loss(v, v_old, r, beta).sum(), v)[0]


def test_a_perfect_velocity_costs_nothing() -> None:
    for beta in (0.5, 1.0):
        for r in (0.0, 0.4, 1.0):
            close(loss(TARGET, TARGET, r, beta), [0.0] * 3)


def test_good_samples_attract_and_bad_ones_repel() -> None:
    v_old = TARGET + draw(3, 4, 2, seed=2)
    toward = (TARGET - v_old).flatten(1)
    for beta in (0.3, 1.0):
        attracted = -gradient(v_old, v_old, 1.0, beta).flatten(1)
        repelled = -gradient(v_old, v_old, 0.0, beta).flatten(1)
        assert (torch.cosine_similarity(attracted, toward) > 0.999).all()
        assert (torch.cosine_similarity(repelled, toward) < -0.999).all()


def test_an_indifferent_sample_pulls_nowhere_from_the_old_policy() -> None:
    v_old = TARGET + draw(3, 4, 2, seed=2)
    close(gradient(v_old, v_old, 0.5), torch.zeros(3, 4, 2).tolist())
    assert gradient(v_old + 0.1, v_old, 0.5).abs().max() > 0


def test_the_loss_is_linear_in_the_optimality() -> None:
    v, v_old = draw(3, 4, 2, seed=3), draw(3, 4, 2, seed=4)
    middle = 0.3 * loss(v, v_old, 1.0) + 0.7 * loss(v, v_old, 0.0)
    close(loss(v, v_old, 0.3), middle.tolist())


def test_the_sign_of_beta_swaps_the_two_policies() -> None:
    v, v_old = draw(3, 4, 2, seed=3), draw(3, 4, 2, seed=4)
    close(loss(v, v_old, 0.2, 0.7), loss(v, v_old, 0.8, -0.7).tolist())


def test_the_weight_carries_no_gradient() -> None:
    v, v_old = draw(3, 4, 2, seed=3), draw(3, 4, 2, seed=4)
    got = gradient(v, v_old, 1.0)  # r = 1, beta = 1: x0' = x_t - t v alone
    time = T[:, None, None]
    error = X_T - time * v - X0
    weight = error.abs().mean(dim=(1, 2), keepdim=True)
    # d/dv of mean(error^2) / w with w held fixed: 2 error (-t) / (8 w)
    close(got, (-2 * time * error / (8 * weight)).tolist())


def test_gradients_match_finite_differences_with_the_weight_held_fixed() -> None:
    v, v_old = draw(3, 4, 2, seed=3), draw(3, 4, 2, seed=4)
    frozen = [
        (X_T - T[:, None, None] * u - X0).abs().mean(dim=(1, 2)) for u in implicit_velocities(v, v_old, 0.6)
    ]

    def by_hand(v: torch.Tensor) -> torch.Tensor:
        parts = zip(implicit_velocities(v, v_old, 0.6), frozen, (0.8, 0.2), strict=True)
        return sum(r * ((X_T - T[:, None, None] * u - X0) ** 2).mean(dim=(1, 2)) / w for u, w, r in parts)

    close(loss(v, v_old, 0.8, 0.6), by_hand(v).tolist())
    exact = gradient(v, v_old, 0.8, 0.6)
    nudge = draw(3, 4, 2, seed=5) * 1e-5
    slope = (by_hand(v + nudge) - by_hand(v - nudge)) / 2
    close((exact * nudge).sum(dim=(1, 2)), slope.tolist(), tol=1e-12)


def test_nft_loss_by_hand() -> None:
    # two values a sample. x_t = (1, 2), t = 1/2, x0 = (0, 1), v = (1, 0), v_old = (0, 1), beta = 1, r = 1/4
    # v+ = (1, 0): x0' = (0.5, 2), errors (0.5, 1), w = 0.75, L+ = 0.625 / 0.75 = 5/6
    # v- = (-1, 2): x0' = (1.5, 1), errors (1.5, 0), w = 0.75, L- = 1.125 / 0.75 = 3/2
    # r L+ + (1 - r) L- = 5/24 + 27/24 = 4/3
    def row(*numbers: float) -> torch.Tensor:
        return values(*numbers)[None]

    got = nft_loss(row(1, 2), values(0.5), row(0, 1), row(1, 0), row(0, 1), values(0.25), 1.0)
    close(got, [4 / 3])


def test_the_weight_is_bounded_below() -> None:
    # errors of 1e-7 everywhere: 1e-14 / 1e-5, not 1e-14 / 1e-7
    zero, small = torch.zeros(1, 4, dtype=torch.float64), torch.full((1, 4), 1e-7, dtype=torch.float64)
    close(nft_loss(small, values(0.5), zero, zero, zero, values(1.0), 1.0), [1e-9], tol=1e-14)
    inputs = zero.clone().requires_grad_()
    nft_loss(zero, values(0.5), zero, inputs, zero, values(1.0), 1.0).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.isfinite().all()


def test_a_loss_of_size_one_error_does_not_depend_on_scale_or_size() -> None:
    # self-normalized: errors of one magnitude e give a loss of e, whatever the number of values
    for size in (1, 50):
        zero, three = torch.zeros(1, size), torch.full((1, size), 3.0)
        close(nft_loss(three, values(0.5), zero, zero, zero, values(1.0), 1.0), [3.0], tol=1e-6)


def test_samples_do_not_mix() -> None:
    v, v_old, r = draw(3, 4, 2, seed=3), draw(3, 4, 2, seed=4), values(0.1, 0.5, 0.9)
    together = nft_loss(X_T, T, X0, v, v_old, r, 1.0)
    assert together.shape == (3,)
    for i in range(3):
        rows = (tensor[i : i + 1] for tensor in (X_T, T, X0, v, v_old, r))
        close(together[i : i + 1], nft_loss(*rows, 1.0).tolist())


def test_half_precision_is_computed_in_float32() -> None:
    tensors = [tensor.bfloat16() for tensor in (X_T, X0, draw(3, 4, 2, seed=3), draw(3, 4, 2, seed=4))]
    x_t, x0, v, v_old = tensors
    got = nft_loss(x_t, T, x0, v, v_old, values(0.1, 0.5, 0.9), 1.0)
    assert got.dtype == torch.float32
    x_t, x0, v, v_old = (tensor.double() for tensor in tensors)
    close(got.double(), nft_loss(x_t, T, x0, v, v_old, values(0.1, 0.5, 0.9), 1.0).tolist(), tol=1e-5)


def test_nft_loss_arguments_are_checked() -> None:
    r = values(0.1, 0.5, 0.9)
    for name, arguments in {
        "x0": (X_T, T, X0[:1], X0, X0, r),
        "v has": (X_T, T, X0, X0[:, :1], X0, r),
        "v_old": (X_T, T, X0, X0, X0[..., :1], r),
        "t must be": (X_T, T[:, None], X0, X0, X0, r),
        "r must be": (X_T, T, X0, X0, X0, r[:, None]),
    }.items():
        with pytest.raises(ShapeError, match=name):
            nft_loss(*arguments, 1.0)
    with pytest.raises(InputError, match="t must be in"):
        nft_loss(X_T, T * 1000, X0, X0, X0, r, 1.0)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="not the advantage"):
            nft_loss(X_T, T, X0, X0, X0, values(0.0, 1.0, wrong), 1.0)


# -- old_policy_decay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "kind", "expected"),
    [
        (0, 0, 0.0),
        (1000, 0, 0.0),
        (0, 1, 0.0),
        (100, 1, 0.1),
        (499, 1, 0.499),
        (500, 1, 0.5),
        (9000, 1, 0.5),
        (0, 2, 0.0),
        (75, 2, 0.0),
        (76, 2, 0.0075),
        (175, 2, 0.75),
        (208, 2, 0.9975),
        (209, 2, 0.999),
        (9000, 2, 0.999),
    ],
)
def test_decay_by_hand(step: int, kind: int, expected: float) -> None:
    assert old_policy_decay(step, kind) == pytest.approx(expected, abs=1e-12)


def test_decay_never_falls_and_never_reaches_one() -> None:
    for kind in (0, 1, 2):
        decays = [old_policy_decay(step, kind) for step in range(600)]
        assert all(0 <= early <= late < 1 for early, late in itertools.pairwise(decays))


def test_decay_arguments_are_checked() -> None:
    with pytest.raises(InputError, match="0, 1, 2"):
        old_policy_decay(0, 3)
    for kind in (0, 1, 2):
        with pytest.raises(InputError, match="step"):
            old_policy_decay(-1, kind)
