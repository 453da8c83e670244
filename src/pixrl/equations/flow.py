"""Rectified flow: the straight line between data and noise.

Time t is in [0, 1] and t = 1 is noise. Sources: E2PO Eq. 1, Customized-GRPO Eq. 3.

    x_t = (1 - t) x0 + t noise          velocity v = dx_t/dt = noise - x0
"""

from torch import Tensor

from pixrl.equations._tensors import per_sample, require_batch, require_same_shape, require_unit_time, widen


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the state at time t between data and noise: x_t = (1 - t) x0 + t noise.

    Args:
        x0: data, `[B, ...]`.
        noise: standard normal, the shape of `x0`.
        t: time, `[B]`, in [0, 1].

    Returns:
        x_t, the shape of `x0`.

    Raises:
        ShapeError: the shapes of `x0` and `noise` differ or `t` is not `[B]`.
        InputError: a time is outside [0, 1].

    Source: E2PO Eq. 1, Customized-GRPO Eq. 3.
    """
    require_same_shape(x0=x0, noise=noise)
    x0, noise = widen(x0, noise)
    time = _time(t, x0)
    return (1 - time) * x0 + time * noise


def predict_x0(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Return the data that a velocity points back to: x0 = x_t - t v.

    Args:
        x_t: state, `[B, ...]`.
        velocity: the shape of `x_t`.
        t: time, `[B]`, in [0, 1].

    Raises:
        ShapeError: the shapes of `x_t` and `velocity` differ or `t` is not `[B]`.
        InputError: a time is outside [0, 1].

    Source: Customized-GRPO Eq. 3 solved for x0 with v = noise - x0.
    """
    require_same_shape(x_t=x_t, velocity=velocity)
    x_t, velocity = widen(x_t, velocity)
    return x_t - _time(t, x_t) * velocity


def predict_noise(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Return the noise that a velocity points on to: noise = x_t + (1 - t) v.

    Args:
        x_t: state, `[B, ...]`.
        velocity: the shape of `x_t`.
        t: time, `[B]`, in [0, 1].

    Raises:
        ShapeError: the shapes of `x_t` and `velocity` differ or `t` is not `[B]`.
        InputError: a time is outside [0, 1].

    Source: Customized-GRPO Eq. 3 solved for the noise with v = noise - x0.
    """
    require_same_shape(x_t=x_t, velocity=velocity)
    x_t, velocity = widen(x_t, velocity)
    return x_t + (1 - _time(t, x_t)) * velocity


def _time(t: Tensor, like: Tensor) -> Tensor:
    """Check times, and return them ready to scale the samples of `like`."""
    require_batch(len(like), t=t)
    require_unit_time(t=t)
    return per_sample(t, like)
