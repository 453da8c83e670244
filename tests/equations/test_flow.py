"""Rectified flow: end points, round trips, the velocity as the path's derivative."""

import pytest
import torch

from pixrl.equations import interpolate, predict_noise, predict_x0
from pixrl.errors import InputError, ShapeError

from .helpers import close, draw, values

T = values(0.0, 0.25, 0.6, 1.0)


def test_the_path_runs_from_data_to_noise() -> None:
    x0, noise = draw(4, 3, 2), draw(4, 3, 2, seed=1)
    close(interpolate(x0, noise, torch.zeros(4)), x0)
    close(interpolate(x0, noise, torch.ones(4)), noise)


def test_predictions_invert_the_path_at_every_time() -> None:
    x0, noise = draw(4, 3, 2), draw(4, 3, 2, seed=1)
    x_t, velocity = interpolate(x0, noise, T), noise - x0
    close(predict_x0(x_t, velocity, T), x0)
    close(predict_noise(x_t, velocity, T), noise)


def test_predictions_put_any_state_back_together() -> None:
    x_t, velocity = draw(4, 5), draw(4, 5, seed=1)
    close(interpolate(predict_x0(x_t, velocity, T), predict_noise(x_t, velocity, T), T), x_t)


def test_the_velocity_is_the_derivative_in_time() -> None:
    x0, noise, t = draw(1, 6), draw(1, 6, seed=1), values(0.3).requires_grad_()
    slopes = [torch.autograd.grad(interpolate(x0, noise, t)[0, i], t)[0].item() for i in range(6)]
    close(torch.tensor(slopes), (noise - x0)[0].tolist(), tol=1e-6)


def test_each_sample_has_its_own_time() -> None:
    x0, noise = draw(3, 3), draw(3, 3, seed=1)
    t = values(0.1, 0.5, 0.9)
    for function in (interpolate, predict_x0, predict_noise):
        together = function(x0, noise, t)
        alone = [function(x0[i : i + 1], noise[i : i + 1], t[i : i + 1]) for i in range(3)]
        close(together, torch.cat(alone).tolist())


@pytest.mark.parametrize("function", [interpolate, predict_x0, predict_noise])
def test_gradients_match_finite_differences(function) -> None:
    a, b, t = draw(2, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_(), values(0.3, 0.7)
    assert torch.autograd.gradcheck(lambda a, b, t: function(a, b, t), (a, b, t.requires_grad_()))


def test_by_hand() -> None:
    # x0 = 2, noise = -1, t = 1/4: 3/4 * 2 - 1/4 = 1.25 (Customized-GRPO Eq. 3); v = -1 - 2 = -3
    x0, noise, t = values(2.0), values(-1.0), values(0.25)
    close(interpolate(x0, noise, t), [1.25])
    close(predict_x0(values(1.25), values(-3.0), t), [2.0])
    close(predict_noise(values(1.25), values(-3.0), t), [-1.0])


@pytest.mark.parametrize("function", [interpolate, predict_x0, predict_noise])
def test_half_precision_is_computed_in_float32(function) -> None:
    a, b = draw(2, 3).bfloat16(), draw(2, 3, seed=1).bfloat16()
    t = values(0.3, 0.7)
    result = function(a, b, t)
    assert result.dtype == torch.float32
    close(result.double(), function(a.double(), b.double(), t).tolist(), tol=1e-6)
    assert function(a.double(), b, t.float()).dtype == torch.float64


@pytest.mark.parametrize("function", [interpolate, predict_x0, predict_noise])
def test_shapes_and_times_are_checked(function) -> None:
    a = draw(4, 3)
    with pytest.raises(ShapeError, match=r"\[4, 1\].*\[4, 3\]"):
        function(a, draw(4, 1), T)
    for wrong in (T[:1], T[:, None], T[0]):
        with pytest.raises(ShapeError, match="B = 4"):
            function(a, a, wrong)
    for wrong in (-0.01, 1.01, float("nan"), 500.0):
        with pytest.raises(InputError, match="divide diffusion timesteps"):
            function(a, a, values(0.0, 1.0, 0.5, wrong))
