"""Folders of runs as runs leave them, made once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pixrl.runs.reading import SCORES, START, samples_of
from pixrl.runs.record import shape_of
from tests.align.synthetic import run_folder, settings

Root = Callable[[], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two alignments: `done` to its end, and `half` after 12 of 40 steps."""
    root = tmp_path_factory.mktemp("studio")
    for name, steps, done, evaluated in (("done", 4, 4, (0, 4)), ("half", 40, 12, (0, 10))):
        config = settings(steps=steps)
        folder = run_folder(root / name, config, done=done, evaluated=evaluated)
        start = json.loads((folder.path / START).read_text())
        (folder.path / START).write_text(json.dumps({**start, "shape": shape_of(config).__dict__}))
        for at, gain in ((evaluated[0], 0.0), (evaluated[1], 0.25)):
            values = {  # sums without rounding
                "geneval": [0.125 * n + gain * (n % 3 - 1) for n in range(6)],
                "preference": [20.0 + n for n in range(6)],
            }
            (samples_of(folder, at) / SCORES).write_text(json.dumps(values))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may spoil."""
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"
