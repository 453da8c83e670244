"""What holds for every test: random numbers that are the same on every machine, in any order and for any selection."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Parameters are drawn when a module is imported."""
    _seed()
    return (yield)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that draws without a generator of its own draws the same each time."""
    _seed()
