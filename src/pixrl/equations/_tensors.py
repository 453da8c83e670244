"""The parts that all equations share: the working dtype, per-sample views and means, and input checks.

The choice of dtype, for the whole package: an equation computes, and returns, in the widest dtype of its data
but in no less than float32. float16 and bfloat16 come out as float32; float64 stays float64, which is what
gradient checks need. The one exception is `SDEStep.next_x`, which keeps the dtype the latents are stored in.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pixrl.errors import InputError, ShapeError

Real = TypeVar("Real", float, Tensor)
"""A Python number or a tensor; a function returns the kind that it was given."""


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the widest dtype among the tensors, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in their common working dtype."""
    dtype = working_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)


def per_sample(value_B: Tensor, like: Tensor) -> Tensor:
    """View `[B]` values as `[B, 1, ..., 1]`, in the dtype of `like`, so that they scale whole samples."""
    return value_B.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def sample_mean(values: Tensor) -> Tensor:
    """Return the mean over every dimension except the batch: `[B, ...]` -> `[B]`."""
    return values if values.ndim == 1 else values.flatten(1).mean(dim=1)


def broadcasts(tensor: Tensor, to: Tensor) -> bool:
    """Return whether `tensor` broadcasts to the shape of `to` without growing it."""
    pairs = zip(reversed(tensor.shape), reversed(to.shape), strict=False)
    return tensor.ndim <= to.ndim and all(mine in (1, theirs) for mine, theirs in pairs)


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ShapeError unless all tensors have the first one's shape. Nothing is broadcast."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)} but {first} has {list(reference.shape)}; "
                "the two must be equal, nothing is broadcast here"
            )


def require_axes(axes: str, **tensors: Tensor) -> None:
    """Raise ShapeError unless every tensor has one dimension for each letter of `axes`."""
    for name, tensor in tensors.items():
        if tensor.ndim != len(axes):
            wanted = ", ".join(axes)
            raise ShapeError(f"{name} must be [{wanted}], got shape {list(tensor.shape)}")


def require_batch(size: int, **tensors: Tensor) -> None:
    """Raise ShapeError unless every tensor is `[B]` with B = `size`."""
    for name, tensor in tensors.items():
        if tensor.shape != (size,):
            raise ShapeError(f"{name} must be [B] with B = {size}, got shape {list(tensor.shape)}")


def require_unit_time(**times: Tensor) -> None:
    """Raise InputError unless all times are in [0, 1]: timesteps of 0..1000 are not times."""
    for name, time in times.items():
        if not bool(((time >= 0) & (time <= 1)).all()):
            raise InputError(
                f"{name} must be in [0, 1] (1 is pure noise), got {time.min().item():g} to "
                f"{time.max().item():g}; divide diffusion timesteps by 1000"
            )


def require_choice(name: str, given: object, allowed: Sequence[object]) -> None:
    """Raise InputError unless `given` is one of `allowed`."""
    if given not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}")


def require_above(limit: float, **values: float) -> None:
    """Raise InputError unless every value is greater than `limit`."""
    for name, value in values.items():
        if not value > limit:
            raise InputError(f"{name} must be greater than {limit:g}, got {value!r}")
