"""The guard on the toy world: it finds rewards that are gamed within twelve steps."""

from pathlib import Path

import pytest
from benchmarks.guard import JUDGE, first_finding, recipe

import pixrl
from pixrl.errors import GuardError


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.parametrize(("game", "moved"), [("brightness", "-"), ("edges", "[+]")])
def test_a_gamed_reward_ends_the_run_within_twelve_steps(game: str, moved: str, tmp_path: Path) -> None:
    """Pictures bleach, or fill with confetti, while the trained reward rises: colours fall, or multiply."""
    reward = {"name": game, "kind": "python", "options": {"function": f"{JUDGE}:{game}"}}
    settings = recipe(reward, 16, 8e-3) | {"monitor": {"action": "stop"}}
    with pytest.raises(GuardError, match=rf"step (4|8|12): .*picture/colours [^;]*\({moved}"):
        pixrl.align(settings, seed=0, out=tmp_path / "run")
    assert first_finding(tmp_path / "run", 12) != "nothing"
