"""What the equations share."""

import pytest
import torch

from pixrl.equations import _tensors
from pixrl.errors import InputError, PixrlError, ShapeError

from .helpers import close, draw, values


def test_working_dtype_is_the_widest_but_at_least_float32() -> None:
    def of(*dtypes: torch.dtype) -> torch.dtype:
        return _tensors.working_dtype(*(torch.zeros(1, dtype=dtype) for dtype in dtypes))

    assert of(torch.float16) == of(torch.bfloat16) == of(torch.int64) == torch.float32
    assert of(torch.float16, torch.bfloat16) == torch.float32
    assert of(torch.bfloat16, torch.float64) == of(torch.float64, torch.float32) == torch.float64


def test_widen_gives_all_the_same_dtype() -> None:
    a, b = _tensors.widen(torch.ones(2, dtype=torch.float16), torch.ones(3, dtype=torch.float64))
    assert a.dtype == b.dtype == torch.float64
    assert a.tolist() == [1, 1]


def test_per_sample_and_sample_mean() -> None:
    x = draw(2, 3, 4)
    view = _tensors.per_sample(torch.tensor([1, 2]), x)
    assert view.shape == (2, 1, 1)
    assert view.dtype == x.dtype
    assert view.flatten().tolist() == [1, 2]
    close(_tensors.sample_mean(x), [x[0].sum().item() / 12, x[1].sum().item() / 12])
    assert _tensors.sample_mean(x[0, 0]) is not None
    close(_tensors.sample_mean(x[0, 0]), x[0, 0].tolist())
    assert _tensors.sample_mean(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("shape", "to", "expected"),
    [
        ((), (2, 3), True),
        ((3,), (2, 3), True),
        ((2, 1), (2, 3), True),
        ((2,), (2, 3), False),
        ((1, 2, 3), (2, 3), False),
        ((2, 3), (2, 1), False),
        ((16, 1), (16,), False),
        ((4, 3), (2, 3), False),
    ],
)
def test_broadcasts_never_grows_the_target(shape, to, expected) -> None:
    assert _tensors.broadcasts(torch.zeros(shape), torch.zeros(to)) is expected


def test_errors_name_the_argument_and_what_it_was() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match=r"b has shape \[2\] but a has \[2, 3\]"):
        _tensors.require_same_shape(a=x, ok=x, b=x[:, 0])
    with pytest.raises(ShapeError, match=r"q must be \[P, G\], got shape \[3\]"):
        _tensors.require_axes("PG", p=x, q=x[0])
    with pytest.raises(ShapeError, match=r"t must be \[B\] with B = 2, got shape \[2, 3\]"):
        _tensors.require_batch(2, ok=x[:, 0], t=x)
    with pytest.raises(InputError, match=r"t must be in \[0, 1\].*got -1 to 0.5"):
        _tensors.require_unit_time(ok=values(0.0, 1.0), t=values(-1.0, 0.5))
    with pytest.raises(InputError, match=r"got 0 to 1\.5"):
        _tensors.require_unit_time(t=values(0.0, 1.5))
    with pytest.raises(InputError, match="kind must be one of 'a', 'b', got 'c'"):
        _tensors.require_choice("kind", "c", ("a", "b"))
    with pytest.raises(InputError, match="clip must be greater than 0, got 0"):
        _tensors.require_above(0, ok=1, clip=0)
    with pytest.raises(InputError, match="nan"):
        _tensors.require_above(0, clip=float("nan"))


def test_errors_are_value_errors_of_this_library() -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        _tensors.require_axes("B", x=torch.zeros(1, 1))
    assert isinstance(caught.value, PixrlError)


def test_checks_pass_good_values() -> None:
    x = torch.zeros(2, 3)
    _tensors.require_same_shape(a=x, b=x.clone())
    _tensors.require_axes("BD", a=x)
    _tensors.require_batch(3, a=x[0])
    _tensors.require_unit_time(t=values(0.0, 0.5, 1.0))
    _tensors.require_choice("kind", "a", ("a", "b"))
    _tensors.require_above(0, clip=1e-9)
