"""Two real processes over gloo end with the weights of the plain loops, as two threads do in the other files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pixrl.algorithms.world import Team
from tests.align.launching import Launch
from tests.reference import test_baselines, test_e2po, test_grpo, test_nft
from tests.reference.agreement import assert_same_weights
from tests.reference.product import Outcome, train

CASES: list[tuple[Any, str]] = [
    (test_nft, "stages"),
    (test_grpo, "flow_grpo"),
    (test_grpo, "customized_grpo_inverted"),
    (test_e2po, "sars"),
    (test_e2po, "grpo_window"),
    (test_baselines, "from_the_prompt"),
]


def play(folder: str) -> None:
    """One of the two processes."""
    torch.set_default_dtype(torch.float64)
    team = Team("cpu")
    assert team.size == 2
    found = [train(module.product_run(module.CASES[name]), team).slots for module, name in CASES]
    torch.save(found, Path(folder) / f"{team.rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_the_plain_loops(tmp_path: Path, launch: Launch) -> None:
    assert launch(2, str(tmp_path), act=play) == [0, 0]
    outcomes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, (module, name) in enumerate(CASES):
        expected, _ = module.plain_run(module.CASES[name])
        for found in outcomes:
            assert_same_weights(Outcome(found[number], [], []), expected)
