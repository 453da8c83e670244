"""What the provenance of a toy checkpoint says of it, and whether that still holds."""

import json
from typing import Any

import pytest

from pixrl.toy import CHECKPOINTS
from pixrl.toy.verify import verify
from pixrl.toy.verify_generators import FRECHET


def recorded(name: str) -> dict[str, Any]:
    """The checkpoint's figures by what they measure, as its provenance has them."""
    gates = json.loads((CHECKPOINTS / name / "provenance.json").read_text())["gates"]
    return {gate["figure"]: gate for gate in gates}


def require_as_recorded(name: str) -> None:
    """Measure a quarter of the samples and hold them to what is recorded: two standard errors of a share of 64."""
    known, gates = recorded(name), verify([name], quick=True)
    assert [gate.figure for gate in gates] == list(known)
    for gate in gates:
        if gate.figure == FRECHET:  # a covariance of so few pictures says nothing of that of all
            assert gate.passed == known[FRECHET]["passed"]
            continue
        assert gate.value == pytest.approx(known[gate.figure]["value"], rel=0.15, abs=0.125), gate
