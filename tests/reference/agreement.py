"""How an outcome of the product is held against a plain loop's."""

import math

import pytest

from tests.reference.product import Outcome
from tests.reference.world import Weights

WEIGHTS = 1e-9
"""Largest difference of weights, relative to the largest of their tensor.

float64 rounds to 1e-16; three steps of some thousand sums leave 1e-13 at most, and what Adam divides by the smallest
gradient that is not 0 (eps 1e-4 in these runs) some hundred times that.
"""
FIGURES = {"rel": 1e-6, "abs": 1e-9, "nan_ok": True}
"""Figures of the log: shares are means in float32, which rounds to 6e-8; some others are small differences."""


def assert_same_weights(outcome: Outcome, expected: dict[str, Weights]) -> None:
    for slot, tensors in expected.items():
        for name, wanted in tensors.items():
            found = outcome.slots[f"{slot}/{name}"]
            wanted = wanted.detach()
            apart = (found - wanted).abs().max() / wanted.abs().max()
            assert apart <= WEIGHTS, f"{slot}/{name} is {apart:.1e} apart"


def assert_same_figures(
    outcome: Outcome, expected: list[dict[str, float]], ignored: frozenset[str] = frozenset()
) -> None:
    """Every figure of every step, by name; none is missing and none is more."""
    for step, (found, wanted) in enumerate(zip(outcome.log, expected, strict=True)):
        assert found.keys() - ignored == wanted.keys() - ignored
        for name in wanted.keys() - ignored:
            assert found[name] == pytest.approx(wanted[name], **FIGURES), (step, name)


def assert_moved(expected: dict[str, Weights], before: dict[str, Weights]) -> None:
    """The trained weights went far enough for a difference of method to show: each tensor by a hundredth."""
    for name, tensor in expected["current"].items():
        moved = (tensor.detach() - before["current"][name]).norm() / before["current"][name].norm()
        assert moved > 0.01 and math.isfinite(moved), name
