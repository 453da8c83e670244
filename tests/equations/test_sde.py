"""Stochastic steps: the ODE in the limit, marginals kept on a Gaussian, scores that agree, and by hand."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from pixrl.equations import SDEStep, cps_step, dance_step, flow_sde_step
from pixrl.errors import InputError, ShapeError

from .helpers import close, draw, values

STEPS = {
    "flow": partial(flow_sde_step, sigma_max=0.93),
    "dance": partial(dance_step),
    "cps": partial(cps_step),
}
every_step = pytest.mark.parametrize("name", STEPS)
gaussian_steps = pytest.mark.parametrize("name", ["flow", "dance"])
SIGMA, SIGMA_NEXT = values(0.9, 0.5, 0.2), values(0.8, 0.35, 0.15)


# -- the ODE in the limit ------------------------------------------------------------------------------------


@every_step
def test_without_noise_a_step_is_the_euler_step(name: str) -> None:
    x, velocity = draw(3, 4, 2), draw(3, 4, 2, seed=1)
    step = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, 0.0, noise=draw(3, 4, 2, seed=2))
    euler = x + velocity * (SIGMA_NEXT - SIGMA)[:, None, None]
    close(step.mean, euler.tolist())
    close(step.next_x, euler.tolist())
    close(step.std, torch.zeros(3, 1, 1).tolist())


@every_step
def test_the_mean_leaves_the_ode_quadratically_in_eta(name: str) -> None:
    x, velocity = draw(3, 4), draw(3, 4, seed=1)
    euler = x + velocity * (SIGMA_NEXT - SIGMA)[:, None]

    def gap(eta: float) -> float:
        return (STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, eta, noise=x).mean - euler).abs().max().item()

    assert gap(1e-2) > 0
    assert gap(2e-2) / gap(1e-2) == pytest.approx(4, rel=1e-2)


@gaussian_steps
def test_a_step_without_noise_has_no_density(name: str) -> None:
    x = draw(3, 2)
    assert STEPS[name](x, x, SIGMA, SIGMA_NEXT, 0.0, noise=x).log_prob.isnan().all()


def test_a_coefficient_preserving_step_scores_without_a_density() -> None:
    x = draw(3, 2)
    close(cps_step(x, x, SIGMA, SIGMA_NEXT, 0.0, noise=x).log_prob, [0.0, 0.0, 0.0])


# -- marginals on a Gaussian target --------------------------------------------------------------------------
# x0 ~ N(m, q^2) makes x_t ~ N((1 - t) m, V), V = (1 - t)^2 q^2 + t^2, and the velocity E[noise - x0 | x_t] is
# affine in x_t. So is each step's mean: moments follow from two evaluations, without any sampling.

M, Q = 1.5, 0.6


def marginal(t: float, q: float = Q) -> tuple[float, float]:
    """Mean and variance of x_t."""
    return (1 - t) * M, (1 - t) ** 2 * q**2 + t**2


def velocity_field(x: Tensor, t: float, q: float = Q) -> Tensor:
    """E[noise | x_t] - E[x0 | x_t]."""
    mean, variance = marginal(t, q)
    return t / variance * (x - mean) - (M + (1 - t) * q**2 / variance * (x - mean))


def moments_after(
    name: str, sigma: float, sigma_next: float, eta: float, q: float = Q
) -> tuple[float, float]:
    """Mean and variance after one step from the exact marginal at `sigma`."""
    x = values(0.0, 1.0)
    pair = torch.ones(2, dtype=torch.float64)
    step = STEPS[name](x, velocity_field(x, sigma, q), sigma * pair, sigma_next * pair, eta, noise=x)
    offset, slope = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
    mean, variance = marginal(sigma, q)
    return offset + slope * mean, slope**2 * variance + step.std.flatten()[0].item() ** 2


@pytest.mark.parametrize("sigma", [0.1, 0.35, 0.6, 0.85, 1.0])
@gaussian_steps
def test_an_sde_step_keeps_the_marginal_to_first_order(name: str, sigma: float) -> None:
    # what is lost in one step is of order dt^2: a wrong drift or noise would lose dt and halve, not quarter
    eta = 0.7

    def error(dt: float) -> tuple[float, float]:
        mean, variance = moments_after(name, sigma, sigma - dt, eta)
        wanted_mean, wanted_variance = marginal(sigma - dt)
        return abs(mean - wanted_mean), abs(variance - wanted_variance)

    (mean_coarse, variance_coarse), (mean_fine, variance_fine) = error(2e-4), error(1e-4)
    assert mean_coarse < 1e-9  # the mean moves along a straight line: no error at all
    assert mean_fine < 1e-9
    assert variance_coarse < 2e-5
    assert variance_coarse / variance_fine == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.9, 1.0])
def test_a_coefficient_preserving_step_is_exact_where_the_denoiser_is(sigma: float) -> None:
    # a point target (q = 0) is denoised exactly; then the marginal is kept by a step of any length
    mean, variance = moments_after("cps", sigma, sigma / 3, 0.8, q=0.0)
    wanted_mean, wanted_variance = marginal(sigma / 3, q=0.0)
    assert mean == pytest.approx(wanted_mean, abs=1e-12)
    assert variance == pytest.approx(wanted_variance, abs=1e-12)


def test_a_coefficient_preserving_step_keeps_every_mean_and_loses_a_known_variance() -> None:
    # Elsewhere the denoiser's mean is narrower than the data. On paper, for dt -> 0: the new variance is
    # (A + C cos)^2 / V + C sin^2 with A = (1 - s)^2 q^2, C = s^2, V = A + C and the angle eta pi / 2: that
    # is V - A C (1 - cos)^2 / V. The loss is a property of the published step, not of its discretization.
    sigma, eta = 0.5, 0.8
    mean, variance = moments_after("cps", sigma, sigma * (1 - 1e-9), eta)
    a, c = (1 - sigma) ** 2 * Q**2, sigma**2
    loss = a * c * (1 - math.cos(eta * math.pi / 2)) ** 2 / (a + c)
    assert mean == pytest.approx(marginal(sigma)[0], abs=1e-8)
    assert variance == pytest.approx(marginal(sigma)[1] - loss, abs=1e-8)


# -- scores --------------------------------------------------------------------------------------------------


@every_step
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_stored_sample_scores_what_it_was_drawn_with(name: str, dtype: torch.dtype) -> None:
    x, velocity, noise = (draw(3, 4, 2, seed=seed).to(dtype) for seed in range(3))
    drawn = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, noise=noise)
    again = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, next_x=drawn.next_x)
    assert drawn.next_x.dtype == dtype
    assert drawn.log_prob.dtype == drawn.mean.dtype == drawn.std.dtype
    assert drawn.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(drawn.log_prob, again.log_prob)
    assert torch.equal(drawn.next_x, again.next_x)


@every_step
def test_a_sample_given_wider_than_stored_is_rounded_before_it_is_scored(name: str) -> None:
    x, velocity = draw(3, 4).bfloat16(), draw(3, 4, seed=1).bfloat16()
    wide = draw(3, 4, seed=2, dtype=torch.float32)
    step = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, next_x=wide)
    rounded = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, next_x=wide.bfloat16())
    assert step.next_x.dtype == torch.bfloat16
    assert torch.equal(step.log_prob, rounded.log_prob)


@every_step
def test_the_noise_really_added_has_the_returned_std(name: str) -> None:
    x, velocity, noise = draw(3, 4, 2), draw(3, 4, 2, seed=1), draw(3, 4, 2, seed=2)
    step = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, noise=noise)
    assert step.std.shape == (3, 1, 1)
    close(step.next_x, (step.mean + step.std * noise).tolist())
    quiet = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, noise=torch.zeros_like(noise))
    close(quiet.next_x, step.mean.tolist())


@gaussian_steps
def test_log_prob_is_the_mean_gaussian_log_density(name: str) -> None:
    x, velocity, next_x = draw(3, 4, 2), draw(3, 4, 2, seed=1), draw(3, 4, 2, seed=2)
    step = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, next_x=next_x)
    density = Normal(step.mean, step.std.expand_as(step.mean)).log_prob(next_x)
    assert step.log_prob.shape == (3,)
    close(step.log_prob, density.mean(dim=(1, 2)).tolist())


def test_the_coefficient_preserving_score_drops_constants() -> None:
    x, velocity, next_x = draw(3, 4, 2), draw(3, 4, 2, seed=1), draw(3, 4, 2, seed=2)
    step = cps_step(x, velocity, SIGMA, SIGMA_NEXT, next_x=next_x)
    close(step.log_prob, (-((next_x - step.mean) ** 2).mean(dim=(1, 2))).tolist())


@every_step
def test_log_prob_does_not_grow_with_the_number_of_dimensions(name: str) -> None:
    def score(copies: int) -> float:
        x = torch.full((1, copies), 0.4, dtype=torch.float64)
        step = STEPS[name](x, 2 * x, values(0.5), values(0.4), noise=torch.ones_like(x))
        return step.log_prob.item()

    assert score(1) == pytest.approx(score(1000), abs=1e-9)


@every_step
def test_a_drawn_sample_is_a_constant_to_its_score(name: str) -> None:
    x, noise = draw(3, 4), draw(3, 4, seed=2)
    velocity = draw(3, 4, seed=1).requires_grad_()
    drawn = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, noise=noise)
    again = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, next_x=drawn.next_x.detach())
    (from_draw,) = torch.autograd.grad(drawn.log_prob.sum(), velocity, retain_graph=True)
    (from_store,) = torch.autograd.grad(again.log_prob.sum(), velocity)
    assert from_draw.abs().min() > 0
    assert torch.equal(from_draw, from_store)
    assert drawn.next_x.requires_grad  # the path from the velocity to the sample stays open


@every_step
def test_the_score_climbs_toward_the_sample(name: str) -> None:
    # one ascent step on log_prob moves the mean toward the stored sample
    x, next_x = draw(3, 4), draw(3, 4, seed=2)
    velocity = draw(3, 4, seed=1).requires_grad_()
    step = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, next_x=next_x)
    (gradient,) = torch.autograd.grad(step.log_prob.sum(), velocity)
    moved = STEPS[name](x, velocity + 1e-3 * gradient, SIGMA, SIGMA_NEXT, next_x=next_x)
    assert (moved.log_prob > step.log_prob).all()
    assert ((moved.mean - next_x) ** 2).sum() < ((step.mean - next_x) ** 2).sum()


@every_step
def test_gradients_match_finite_differences(name: str) -> None:
    next_x = draw(3, 2, seed=2)

    def outputs(x: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        step = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, next_x=next_x)
        return step.mean, step.log_prob

    inputs = (draw(3, 2).requires_grad_(), draw(3, 2, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(outputs, inputs)


# -- shapes, batches, arguments ------------------------------------------------------------------------------


@every_step
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    sigma = values(1.0, 0.5, 0.2)
    x, velocity, noise = draw(3, 4, 2), draw(3, 4, 2, seed=1), draw(3, 4, 2, seed=2)
    together = STEPS[name](x, velocity, sigma, SIGMA_NEXT, noise=noise)
    for i in range(3):
        rows = (tensor[i : i + 1] for tensor in (x, velocity, sigma, SIGMA_NEXT))
        alone = STEPS[name](*rows, noise=noise[i : i + 1])
        for batched, single in zip(together, alone, strict=True):
            close(batched[i : i + 1], single.tolist())


@every_step
def test_the_dtype_of_the_schedule_does_not_matter(name: str) -> None:
    x, velocity, noise = (draw(3, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    wide = STEPS[name](x, velocity, SIGMA, SIGMA_NEXT, noise=noise)
    narrow = STEPS[name](x, velocity, SIGMA.float(), SIGMA_NEXT.float(), noise=noise.double())
    for a, b in zip(wide, narrow, strict=True):
        assert a.dtype == b.dtype == torch.float32
        close(a, b.tolist(), tol=1e-6)


@every_step
def test_shapes_are_checked(name: str) -> None:
    x = draw(3, 4)
    step = STEPS[name]
    with pytest.raises(ShapeError, match="velocity"):
        step(x, x[:, :1], SIGMA, SIGMA_NEXT, noise=x)
    with pytest.raises(ShapeError, match="sigma must be"):
        step(x, x, SIGMA[:, None], SIGMA_NEXT, noise=x)
    with pytest.raises(ShapeError, match="sigma_next must be"):
        step(x, x, SIGMA, SIGMA_NEXT[:1], noise=x)
    with pytest.raises(ShapeError, match="noise"):
        step(x, x, SIGMA, SIGMA_NEXT, noise=x[:1])
    with pytest.raises(ShapeError, match="next_x"):
        step(x, x, SIGMA, SIGMA_NEXT, next_x=x[:, :1])


@every_step
def test_exactly_one_of_noise_and_sample(name: str) -> None:
    x = draw(3, 4)
    with pytest.raises(InputError, match="neither"):
        STEPS[name](x, x, SIGMA, SIGMA_NEXT)
    with pytest.raises(InputError, match="both"):
        STEPS[name](x, x, SIGMA, SIGMA_NEXT, noise=x, next_x=x)


@every_step
@pytest.mark.parametrize(
    ("sigma", "sigma_next"), [(0.5, 0.5), (0.5, 0.6), (1.1, 0.6), (0.5, -0.1), (math.nan, 0.1)]
)
def test_noise_levels_must_fall_inside_the_unit_interval(name: str, sigma: float, sigma_next: float) -> None:
    x = draw(2, 4)
    with pytest.raises(InputError, match="0 <= sigma_next < sigma <= 1"):
        STEPS[name](x, x, values(0.5, sigma), values(0.4, sigma_next), noise=x)


@every_step
def test_the_last_noise_level_may_be_zero(name: str) -> None:
    x = draw(1, 4)
    assert STEPS[name](x, x, values(0.5), values(0.0), noise=x).mean.isfinite().all()


@every_step
def test_eta_must_not_be_negative(name: str) -> None:
    x = draw(3, 4)
    with pytest.raises(InputError, match="eta"):
        STEPS[name](x, x, SIGMA, SIGMA_NEXT, -0.1, noise=x)
    with pytest.raises(InputError, match="eta"):
        STEPS[name](x, x, SIGMA, SIGMA_NEXT, math.nan, noise=x)


def test_a_coefficient_preserving_angle_ends_at_one() -> None:
    x, velocity, noise = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
    fresh = cps_step(x, velocity, SIGMA, SIGMA_NEXT, 1.0, noise=noise)  # all noise is drawn anew
    x0 = x - SIGMA[:, None] * velocity
    close(fresh.mean, ((1 - SIGMA_NEXT)[:, None] * x0).tolist())
    close(fresh.std, SIGMA_NEXT[:, None].tolist())
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        cps_step(x, velocity, SIGMA, SIGMA_NEXT, 1.01, noise=noise)


@pytest.mark.parametrize(("name", "eta"), [("flow", 0.7), ("dance", 0.3), ("cps", 0.8)])
def test_published_noise_scales_are_the_defaults(name: str, eta: float) -> None:
    x = draw(3, 4)
    default = STEPS[name](x, x, SIGMA, SIGMA_NEXT, noise=x)
    given = STEPS[name](x, x, SIGMA, SIGMA_NEXT, eta, noise=x)
    assert torch.equal(default.std, given.std)
    assert torch.equal(default.mean, given.mean)


# -- sigma = 1 -----------------------------------------------------------------------------------------------


def test_the_first_step_borrows_sigma_max_and_no_other_does() -> None:
    x, velocity, noise = draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
    sigma, sigma_next = values(1.0, 0.9), values(0.9, 0.8)

    def at(sigma_max: float | Tensor) -> SDEStep:
        return flow_sde_step(x, velocity, sigma, sigma_next, sigma_max=sigma_max, noise=noise)

    first = at(0.9)
    # s = 0.7 sqrt(1 / (1 - 0.9)), std = s sqrt(0.1) = 0.7; where sigma = 0.9 s is 0.7 sqrt(9)
    close(first.std.flatten(), [0.7, 2.1 * math.sqrt(0.1)])
    # sigma = 1: half = s^2 / 2 = 2.45, and the velocity's correction vanishes
    close(first.mean[0], (x[0] * (1 - 0.245) - 0.1 * velocity[0]).tolist())
    other = at(torch.tensor(0.95))
    assert other.std[0] > first.std[0]
    assert torch.equal(other.mean[1], first.mean[1])
    assert torch.equal(other.std[1], first.std[1])


def test_sigma_max_must_lie_below_one_where_it_is_used() -> None:
    x = draw(1, 3)
    for wrong in (1.0, 1.2, 0.0, -0.5):
        with pytest.raises(InputError, match="schedule's second value"):
            flow_sde_step(x, x, values(1.0), values(0.9), sigma_max=wrong, noise=x)
    flow_sde_step(x, x, values(0.9), values(0.8), sigma_max=1.0, noise=x)
    with pytest.raises(InputError, match="schedule's second value"):
        flow_sde_step(
            draw(2, 3), draw(2, 3), values(0.9, 1.0), values(0.8, 0.9), sigma_max=1.0, noise=draw(2, 3)
        )


@pytest.mark.parametrize("step", [dance_step, cps_step])
def test_steps_without_a_pole_take_sigma_max_and_ignore_it(step) -> None:
    x = draw(1, 3)
    with_it = step(x, x, values(1.0), values(0.9), sigma_max=0.9, noise=x)
    assert torch.equal(with_it.mean, step(x, x, values(1.0), values(0.9), noise=x).mean)
    assert with_it.mean.isfinite().all()


# -- by hand: x = 0.5, v = -0.25, sigma = 0.8, sigma_next = 0.6, noise = 1 -----------------------------------

HALF_LOG_2PI = 0.9189385332046727


def one(step, eta: float) -> list[float]:
    result = step(values(0.5), values(-0.25), values(0.8), values(0.6), eta, noise=values(1.0))
    return [part.item() for part in result]


def test_flow_by_hand() -> None:
    # s^2 = 0.49 * 0.8 / 0.2 = 1.96; s^2 / (2 sigma) = 1.225; dt = -0.2
    # mean = 0.5 (1 - 0.245) - 0.25 (1 + 0.245) (-0.2) with s^2 (1 - sigma) / (2 sigma) = 0.245
    std = 1.4 * math.sqrt(0.2)
    mean = 0.5 * 0.755 + 0.05 * 1.245
    got = one(partial(flow_sde_step, sigma_max=0.9), 0.7)
    assert got == pytest.approx([mean + std, mean, std, -0.5 - math.log(std) - HALF_LOG_2PI], abs=1e-12)


def test_dance_by_hand() -> None:
    # x0 = 0.5 + 0.8 * 0.25 = 0.7; score = -(0.5 - 0.2 * 0.7) / 0.64 = -0.5625
    # mean = 0.5 + 0.05 - 0.5 * 0.09 * (-0.5625) * (-0.2) = 0.5449375
    std = 0.3 * math.sqrt(0.2)
    got = one(dance_step, 0.3)
    assert got == pytest.approx(
        [0.5449375 + std, 0.5449375, std, -0.5 - math.log(std) - HALF_LOG_2PI], abs=1e-12
    )


def test_cps_by_hand() -> None:
    # eta = 1/3: sin(pi / 6) = 1/2, std = 0.3; x0 = 0.7, x1 = 0.5 - 0.2 * 0.25 = 0.45
    # mean = 0.4 * 0.7 + sqrt(0.36 - 0.09) * 0.45; log_prob = -0.3^2
    mean = 0.28 + math.sqrt(0.27) * 0.45
    assert one(cps_step, 1 / 3) == pytest.approx([mean + 0.3, mean, 0.3, -0.09], abs=1e-12)
