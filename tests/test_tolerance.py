"""The bounds of the suite pass what rounding does and nothing else."""

import math

import pytest
import torch

from tests.tolerance import GRADIENT, MODEL, agree, agree_after_adam, agree_in_norm, rounding


def pair(dtype: torch.dtype, length: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """The same products, added in the dtype and exactly."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 200, length, generator=generator, dtype=torch.float64).to(dtype)
    total = torch.zeros(200, dtype=dtype)
    for x, y in zip(left.unbind(1), right.unbind(1), strict=True):
        total = total + x * y
    return total, (left.double() * right.double()).sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_order_of_a_sum_agrees(dtype: torch.dtype) -> None:
    found, exact = pair(dtype)
    assert agree(found, exact, 256, dtype=dtype)
    assert agree_in_norm(found, exact, 256, dtype=dtype)


def test_the_lower_precision_of_the_two_decides() -> None:
    found, exact = pair(torch.float32)
    assert agree(found, exact, 256)
    assert not agree(found.double(), exact, 1, dtype=torch.float64)


@pytest.mark.parametrize("compare", [agree, agree_in_norm])
@pytest.mark.parametrize(
    "change", [lambda x: -x, lambda x: 2 * x, lambda x: x.roll(1), lambda x: x + x.mean()]
)
def test_a_wrong_result_does_not(compare, change) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)) + 0.5
    assert compare(x, x, 4 * MODEL)
    assert not compare(change(x), x, 4 * MODEL)


def test_special_numbers_belong_to_their_places() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert agree(x, x, 1)
    for wrong in (x.nan_to_num(), x.abs(), x.flip(0), x[:3]):
        assert not agree(wrong, x, 1)
    assert not agree_in_norm(x, x, 1)


def test_an_expected_zero_needs_a_scale() -> None:
    error, zero = torch.tensor([1e-7]), torch.zeros(1)
    assert not agree(error, zero, 10)
    assert agree(error, zero, 10, scale=1.0)


def test_a_bound_that_nothing_could_break_is_refused() -> None:
    with pytest.raises(ValueError, match="this comparison could not fail"):
        rounding(torch.bfloat16, MODEL)
    x = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="could not fail"):
        agree(x, x, 100)
    with pytest.raises(ValueError, match="could not fail"):
        agree_in_norm(x, x, MODEL)


def test_what_adam_may_do_to_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"a": torch.zeros(4000), "b": torch.zeros(7)}
    steps = {name: torch.randn(x.shape, generator=generator).sign() for name, x in start.items()}
    few = {"a": steps["a"].clone(), "b": steps["b"]}
    few["a"][:1] *= -1  # a gradient within rounding of zero
    assert agree_after_adam(few, steps, start, GRADIENT)
    assert not agree_after_adam({"a": steps["a"].roll(1), "b": steps["b"]}, steps, start, GRADIENT)
    assert not agree_after_adam({name: 1.1 * x for name, x in steps.items()}, steps, start, GRADIENT)
    assert not agree_after_adam(start, start, start, GRADIENT)  # nothing was trained
    assert not agree_after_adam({"a": steps["a"]}, steps, start, GRADIENT)
