"""The guard lets honest runs be: five train toy:sd3 on the preference model, a seed each (benchmarks/guard.py: ten)."""

from pathlib import Path

import pytest
from benchmarks.guard import PREFERENCE, first_finding, recipe

import pixrl

STEPS = 8
"""The step after whose evaluation both games of test_guard_games.py are found."""


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_found_in_an_honest_run(seed: int, tmp_path: Path) -> None:
    """With `stop`, a finding would end the run with a GuardError."""
    settings = recipe(PREFERENCE, STEPS, 2e-3) | {"monitor": {"action": "stop"}}
    done = pixrl.align(settings, seed=seed, out=tmp_path / "run")
    assert len(done.metrics) == STEPS and len(done.evaluations) == 3
    assert first_finding(done.run, STEPS) == "nothing"
