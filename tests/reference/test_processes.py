"""Two real processes over gloo end with the weights of the plain loops, as two threads do in the other files."""

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from pixrl.algorithms.world import Team
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


def play(rank: int, port: int, folder: Path) -> None:
    """One of the two processes."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    here = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in here.items()}
    team = Team("cpu")
    assert (team.rank, team.size) == (rank, 2)
    found = [train(module.product_run(module.CASES[name]), team).slots for module, name in CASES]
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_the_plain_loops(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    players = [context.Process(target=play, args=(rank, port, tmp_path)) for rank in range(2)]
    for player in players:
        player.start()
    for player in players:
        player.join(300)
        if player.exitcode is None:
            player.kill()
    assert [player.exitcode for player in players] == [0, 0]
    outcomes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, (module, name) in enumerate(CASES):
        expected, _ = module.plain_run(module.CASES[name])
        for found in outcomes:
            assert_same_weights(Outcome(found[number], [], []), expected)
