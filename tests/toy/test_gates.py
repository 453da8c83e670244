"""The shipped checkpoints: complete, small, and as good as their gates say."""

import json
from pathlib import Path

import pytest
import torch

from pixrl.errors import InputError
from pixrl.toy import CHECKPOINTS
from pixrl.toy.verify import CHECKS, Gate, auc, verify

BUDGET_MB = 25
SHIPPED = sorted(path.name for path in CHECKPOINTS.iterdir() if (path / "provenance.json").exists())
PASSING = ["clip", "vae", "segmenter", "identity", "preference", "sd3", "flux"]
"""Those whose gates must hold."""


@pytest.mark.parametrize("name", PASSING)
def test_checkpoint_passes_its_gates(name: str) -> None:
    gates = verify([name], quick=True)
    assert gates and all(gate.checkpoint == name for gate in gates)
    assert all(gate.passed for gate in gates), gates


@pytest.mark.parametrize("name", SHIPPED)
def test_provenance_says_how_it_was_made_and_what_was_measured(name: str) -> None:
    record = json.loads((CHECKPOINTS / name / "provenance.json").read_text())
    assert "pixrl toy build" in record["command"]
    assert record["seconds"] > 0 and record["plans"] and record["versions"]["torch"]
    for gate in record["gates"]:
        figures = Gate(
            gate["checkpoint"], gate["figure"], gate["value"], gate["at_least"], gate.get("at_most", 1e9)
        )
        assert gate["passed"] == figures.passed


def test_everything_fits_the_budget() -> None:
    size = sum(path.stat().st_size for path in Path(CHECKPOINTS).rglob("*") if path.is_file())
    assert 1e6 < size <= BUDGET_MB * 1e6


def test_no_file_names_the_machine_that_it_was_made_on() -> None:
    files = [path for path in CHECKPOINTS.rglob("*.json") if path.name != "tokenizer.json"]
    named = [path for path in files if '"/' in path.read_text()]
    assert files and not named


def test_auc_counts_pairs() -> None:
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert auc(torch.tensor([0.0]), torch.tensor([1.0])) == 0.0
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])) == pytest.approx((0.5 + 0 + 1 + 0) / 4)


def test_unknown_checkpoints_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'clip'"):
        verify(["clipp"])
    assert list(CHECKS) == ["clip", "vae", "segmenter", "identity", "preference", "sd3", "flux"]
