"""What the equations' tests share."""

import torch
from torch import Tensor


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values from their own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def values(*numbers: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The numbers as a float64 vector."""
    return torch.tensor(numbers, dtype=dtype)


def close(
    actual: Tensor, expected: Tensor | float | list[float] | list[list[float]], tol: float = 1e-9
) -> None:
    """Same shape (a bare number stands for a scalar) and equal within `tol`, absolute."""
    wanted = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=tol)
