"""The self-check is no decoration: what it must refuse is made here, and refused in a run and by the command."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import pixrl
from pixrl import cli
from pixrl.algorithms.exploration import Group
from pixrl.algorithms.loss import Rollouts
from pixrl.algorithms.trainer import Aligner
from pixrl.errors import RunError
from pixrl.runs.folder import RunFolder
from pixrl.runs.training import BROKEN, Deviation, Report, require_agreement, require_on_policy
from tests.align.parts import GRPO, recipe

METHODS = pytest.mark.parametrize("method", [{}, GRPO], ids=["nft", "grpo"])


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn, then the slot `current` moves: what learns is no longer what drew."""
    collect = Aligner.collect

    def collect_and_move(self: Aligner, groups: Sequence[Group], step: int, *watch: Any) -> Rollouts:
        rollouts = collect(self, groups, step, *watch)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(0.5)
        return rollouts

    monkeypatch.setattr(Aligner, "collect", collect_and_move)


@pytest.fixture
def disagreeing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes' gradients are a thousandth apart."""
    monkeypatch.setattr(Aligner, "gradient_disagreement", lambda self: 1e-3)


def selfcheck(folder: Path, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `pixrl selfcheck --json`."""
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"kind": "align", **settings}))
    done = CliRunner().invoke(cli.app, ["selfcheck", str(file), "--json"])
    return done.exit_code, json.loads(done.stdout)


@METHODS
@pytest.mark.usefixtures("moved")
def test_weights_that_moved_stop_a_run_before_it_learns(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, method: dict[str, Any]
) -> None:
    with pytest.raises(RunError, match="The first update is not on-policy"):
        pixrl.align(recipe(sd3_folder, prompt_file, **method), out=tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").metrics() == []


@METHODS
@pytest.mark.usefixtures("moved")
def test_weights_that_moved_fail_the_command(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, method: dict[str, Any]
) -> None:
    code, report = selfcheck(tmp_path, recipe(sd3_folder, prompt_file, **method))
    assert (code, report["passed"]) == (1, False)
    assert report["deviations"][0]["value"] > BROKEN


@pytest.mark.usefixtures("disagreeing")
def test_gradients_that_differ_stop_a_run_and_fail_the_command(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    settings = recipe(sd3_folder, prompt_file)
    with pytest.raises(RunError, match=r"gradients differ by 1\.0e-03 after the first update"):
        pixrl.align(settings, out=tmp_path / "run")
    code, report = selfcheck(tmp_path, settings)
    assert (code, report["passed"], report["deviations"][0]["passed"]) == (1, False, True)


def of(value: float, limit: float = 1e-4) -> Deviation:
    return Deviation("bfloat16", 4, value, limit)


@pytest.mark.parametrize("value", [2 * BROKEN, math.nan, math.inf])
def test_what_no_rounding_explains_is_an_error(value: float) -> None:
    with pytest.raises(RunError, match="not on-policy"):
        require_on_policy(of(value), "ratio")


def test_rounding_above_the_limit_is_a_warning_and_below_it_nothing() -> None:
    assert require_on_policy(of(1e-4), "ratio") is None
    warning = require_on_policy(of(1e-3), "ratio")
    assert warning is not None and "ratio is 1.0e-03 in bfloat16, above 0.0001" in warning


@pytest.mark.parametrize("value", [1e-3, math.nan])
def test_a_disagreement_is_an_error(value: float) -> None:
    require_agreement(1e-7)
    with pytest.raises(RunError, match="must be equal"):
        require_agreement(value)


def test_a_report_passes_by_the_runs_own_dtype_and_by_agreement() -> None:
    assert Report("ratio", (of(1e-5), of(1.0)), 0.0, 1).passed
    assert not Report("ratio", (of(1.0), of(1e-5)), 0.0, 1).passed
    assert not Report("ratio", (of(1e-5),), 1e-3, 2).passed
