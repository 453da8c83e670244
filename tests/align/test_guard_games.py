"""The guard on the toy world: it finds rewards that are gamed within eight steps."""

from pathlib import Path

import pytest
from benchmarks.guard import JUDGE, first_finding, recipe

import pixrl
from pixrl.errors import GuardError


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.parametrize(("game", "sign"), [("brightness", "colours"), ("edges", "brightness")])
def test_a_gamed_reward_ends_the_run_within_eight_steps(game: str, sign: str, tmp_path: Path) -> None:
    """Pictures lose their colours, or turn dark, while the trained reward rises."""
    reward = {"name": game, "kind": "python", "options": {"function": f"{JUDGE}:{game}"}}
    settings = recipe(reward, 12, 8e-3) | {"monitor": {"action": "stop"}}
    with pytest.raises(GuardError, match=rf"step [48]: .*picture/{sign}"):
        pixrl.align(settings, seed=0, out=tmp_path / "run")
    assert first_finding(tmp_path / "run", 12) != "nothing"
