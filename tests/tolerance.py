"""How this suite chooses numeric bounds: here, and from no measurement.

Two right ways to compute one thing differ by rounding: another processor has wider vectors, another kernel adds in
another order, two threads add two halves, another batch size takes another kernel. How much follows from three things:

* `dtype`, by its epsilon: 2.2e-16 for float64, 1.2e-7 for float32, 7.8e-3 for bfloat16. It is that of the lower of the
  two compared, unless a third was used on the way (autocast): then tell it.
* `terms`: how many roundings can add up in one of the numbers. For a sum or a dot product, its length; for layers one
  after another, the sum of their widths; for a sampling loop, that times its steps. In autocast sums are kept in
  float32 and only what is stored is rounded: then the terms are the stores, some ten a layer. A round number will do.
* `scale`: the size of the numbers that were added up. It is the largest absolute value of the expected tensor, since a
  small number beside large ones is a difference of large ones and carries their error. Tell it where everything cancels
  (an expected zero, a mean of advantages) or where the input was larger than the result.

`agree` holds every number to `epsilon * terms * scale`, the worst case of a sum. That is about sqrt(terms) times what
rounding does on average, and the difference pays for what a model makes of it. `agree_in_norm` holds all numbers
together to `2 * epsilon * sqrt(terms)` of the expected tensor's norm: for half precision. `agree_after_adam` compares
weights after training, of which a few may be anything: Adam's step has one size, however small (and however much
rounding) the gradient was. Pictures of random models are compared as latents or where they are not clamped: a clamp
hides errors, and a steep decoder in front of it magnifies them.

A flipped sign, a dropped factor of two or a neighbour's row changes the result by about its own size. So a bound over a
tenth of that (in norm: a quarter) is refused: compare in a higher precision, earlier, or in norm.

Not for these functions: what is exact by construction (a copy, integers, the same call on the same tensors in one
process) is compared with torch.equal. Equal weights that lie elsewhere, as those of another slot, are not the same
tensors: MKL's kernels for AVX2 add in another order where memory is aligned otherwise. What is random is held to bounds
from its standard error; what must differ, to one far above `rounding(...)`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MODEL = 1000
"""The terms of one pass through a tiny model of `tests.tiny`: some 20 layers one after another, up to 64 wide."""
PICTURE = 10 * MODEL
"""Those of a picture: four steps, two passes each for guidance, and the decoder."""
GRADIENT = 3 * MODEL
"""Those of a gradient: a pass forwards, and one backwards of twice its length."""
STORES = 40
"""What one pass stores, layer after layer: the terms of a tiny model in autocast."""


def epsilon(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of the dtype."""
    return torch.finfo(dtype).eps


def rounding(dtype: torch.dtype, terms: int, scale: float = 1.0) -> float:
    """The most that rounding changes a number: `epsilon * terms * scale`. As `abs=` of pytest.approx, for example.

    Raises:
        ValueError: it is over a tenth of `scale`, so that a wrong result might pass.
    """
    return _below(0.1, epsilon(dtype) * terms, dtype, terms) * scale


def agree(
    actual: Tensor,
    expected: Tensor,
    terms: int,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> bool:
    """Whether shapes are equal, nan and infinity are in the same places, and every number is within `rounding`.

    For `assert agree(...)`. Where it says no, it prints how far the numbers are apart, which pytest shows.
    """
    a, b, kind = _comparable(actual, expected, dtype)
    if a.shape != b.shape or not torch.equal(_special(a), _special(b)):
        print(f"shapes {list(a.shape)} and {list(b.shape)}, or nan or infinity in different places")
        return False
    a, b = a[b.isfinite()], b[b.isfinite()]
    size = (b.abs().max().item() if len(b) else 0.0) if scale is None else scale
    found, allowed = ((a - b).abs().max().item() if len(b) else 0.0), rounding(kind, terms, size)
    if found > allowed:
        print(f"apart by {found:.3g} at a scale of {size:.3g}; {terms} terms of {kind} allow {allowed:.3g}")
    return found <= allowed


def agree_in_norm(
    actual: Tensor,
    expected: Tensor,
    terms: int,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> bool:
    """As `agree`, of all numbers together: the norm of the difference against that of what is expected, or `scale`."""
    a, b, kind = _comparable(actual, expected, dtype)
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        print(f"shapes {list(a.shape)} and {list(b.shape)}, or numbers that are not finite")
        return False
    size = b.norm().item() if scale is None else scale
    found = (a - b).norm().item()
    allowed = _below(0.25, 2 * epsilon(kind) * math.sqrt(terms), kind, terms) * size
    if found > allowed:
        print(f"apart by {found:.3g} at a norm of {size:.3g}; {terms} terms of {kind} allow {allowed:.3g}")
    return found <= allowed


def agree_after_adam(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Mapping[str, Tensor], terms: int
) -> bool:
    """Whether two trainings from the same `start` by steps of Adam (or AdamW) moved their weights alike.

    Where the gradient is below its own rounding, a share of about `epsilon * terms` of the numbers, the step's sign is
    rounding's too and the weights end two steps apart. So the norm of the difference is held to
    `2 * sqrt(epsilon * terms)` of the norm of the movement, over all tensors together.
    """
    if not one.keys() == other.keys() == start.keys():
        print("tensors of different names")
        return False
    found, moved = (
        math.sqrt(sum((one[name].double() - x[name].double()).square().sum().item() for name in one))
        for x in (other, start)
    )
    kind = max((x.dtype for end in (one, other) for x in end.values()), key=epsilon)
    allowed = _below(0.25, 2 * math.sqrt(epsilon(kind) * terms), kind, terms) * moved
    if moved == 0 or found > allowed:
        print(
            f"apart by {found:.3g} after moving by {moved:.3g}; {terms} terms of {kind} allow {allowed:.3g}"
        )
    return moved > 0 and found <= allowed


def _comparable(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in float64, and the dtype that sets the bound."""
    lower = max(actual.dtype, expected.dtype, key=epsilon)
    return actual.detach().double().cpu(), expected.detach().double().cpu(), dtype or lower


def _special(x: Tensor) -> Tensor:
    """0 for a finite number, other marks for nan and both infinities."""
    return torch.where(x.isnan(), 2.0, torch.where(x.isinf(), x.sign(), 0.0))


def _below(limit: float, share: float, dtype: torch.dtype, terms: int) -> float:
    if share > limit:
        raise ValueError(
            f"{terms} terms of {dtype} leave {share:.2g} of the value to rounding: this comparison could not fail. "
            "Compare in a higher precision, earlier in the computation, or with agree_in_norm."
        )
    return share
