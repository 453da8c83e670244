"""What holds for every test: random numbers that are the same on every machine, in any order and for any selection."""

import os
import random
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


@pytest.fixture(scope="session", autouse=True)
def no_power_failure() -> Iterator[None]:
    """Nothing waits for the disk: a kill loses no page, and no test pulls the plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def launch() -> Iterator[Any]:
    """What runs pixrl's commands in processes that know each other (tests/align/launching.py)."""
    from tests.align.launching import launching

    yield from launching()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's chromium, driven by playwright; without one of them the test is skipped."""
    play = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with play.sync_playwright() as running:
        try:
            chromium = running.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox"], timeout=60_000
            )
        except play.Error as error:
            pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()
