"""What each action of the guard does to a run, and to a resumed one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pixrl
from pixrl import api
from pixrl.errors import ConfigError, GuardError
from pixrl.runs import checkpoint
from pixrl.runs.folder import RunFolder
from pixrl.runs.guard import Looked, MonitorSettings, compare
from pixrl.runs.reading import evaluations, read_findings

JUDGE = "tests/align/guard_judge.py"


def recipe(folder: Path, prompts: Path, **settings: Any) -> dict[str, Any]:
    """A tiny run that games a reward for edges: after six steps the fine detail is up by half a standard deviation."""
    rewards = [
        {"name": "game", "kind": "python", "options": {"function": f"{JUDGE}:edges"}},
        {"name": "other", "kind": "python", "options": {"function": f"{JUDGE}:contrast"}, "held_out": True},
    ]
    return {
        "model": str(folder), "steps": 9, "rewards": rewards,
        "prompts": {"source": str(prompts), "per_step": 2},
        "exploration": {"kind": "noise", "noises": 8}, "sampling": {"steps": 3},
        "loss": {"kind": "nft", "timesteps": 2, "kl": 0.01}, "optimizer": {"lr": 0.03},
        "lora": {"rank": 4, "alpha": 8}, "machine": {"device": "cpu", "dtype": "float32"},
        "evaluation": {"prompts": 8, "per_prompt": 2, "every": 3},
        "output": {"images_every": 1000, "checkpoint_every": 3}, **settings,
    }  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red owl\ntwo blue snails\na cat\na green house\na fish\na dog\na blue cat\nan owl\n")
    return file


NARROW = {"shift": 0.3}


def checkpoints(run: Path) -> list[str]:
    return sorted(place.name for place in (run / "checkpoints").iterdir() if place.suffix == "")


def test_a_warning_changes_nothing(
    sd3_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipe(sd3_folder, prompts)
    plain = pixrl.align(given, out=tmp_path / "plain")
    watched = pixrl.align({**given, "monitor": NARROW}, out=tmp_path / "watched", live=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "The guard, step 6: picture/fine_detail" in said and "The guard, step 3" not in said
    assert plain.evaluations == watched.evaluations
    folder = RunFolder.open(watched.run)
    assert read_findings(folder, 0) == ()
    assert not any(one.found for one in read_findings(folder, 3))
    assert {one.name for one in read_findings(folder, 6) if one.found} == {"picture/fine_detail"}
    assert not any(one.found for one in read_findings(RunFolder.open(plain.run), 9))
    page = watched.report.read_text()
    assert "What the guard found" in page and "What the guard found" not in plain.report.read_text()


@pytest.mark.parametrize(("action", "left"), [("stop", 6), ("rollback", 3)])
def test_the_run_ends(sd3_folder: Path, prompts: Path, tmp_path: Path, action: str, left: int) -> None:
    monitor = {**NARROW, "action": action}
    run = tmp_path / "run"
    with pytest.raises(
        GuardError, match=f"step 6: picture/fine_detail.*monitor.action={action}.*--set monitor"
    ) as told:
        pixrl.align(recipe(sd3_folder, prompts, monitor=monitor), out=run)
    assert f"pixrl resume {run} --set monitor.action=warn" in str(told.value)
    newest = checkpoint.latest(run)
    assert newest is not None and checkpoint.step_of(newest) == left
    whole = pixrl.align(recipe(sd3_folder, prompts), out=tmp_path / "whole")
    api.resume(run, ["monitor.action=warn"], live=False)
    assert evaluations(run) == whole.evaluations
    ends = [checkpoint.load(checkpoint.step_folder(one, 9))[0] for one in (run, whole.run)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_raising_the_kl_lasts_and_is_resumed_exactly(sd3_folder: Path, prompts: Path, tmp_path: Path) -> None:
    monitor = {**NARROW, "action": "raise_kl", "kl_factor": 50.0}
    given = recipe(sd3_folder, prompts, monitor=monitor, steps=12)
    whole = pixrl.align(given, out=tmp_path / "whole")
    plain = pixrl.align(recipe(sd3_folder, prompts, steps=12), out=tmp_path / "plain")
    kls = [[row["kl"] for row in one.metrics] for one in (whole, plain)]
    assert kls[0][:7] == kls[1][:7] and kls[0][-1] < kls[1][-1]
    state = checkpoint.read_state(checkpoint.step_folder(whole.run, 9))
    assert state is not None and state["kl_raised"] >= 50
    part = pixrl.align({**given, "steps": 8}, out=tmp_path / "part").run
    api.resume(part, ["steps=12"], live=False)
    assert [row["kl"] for row in RunFolder.open(part).metrics()] == kls[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"monitor": {"action": "stop"}, "evaluation": {"prompts": 8}}, "set evaluation.every"),
        (
            {"monitor": {"action": "raise_kl"}, "loss": {"kind": "nft", "kl": 0.0, "timesteps": 2}},
            "loss.kl, which is not above 0",
        ),
        (
            {"monitor": {"action": "rollback"}, "output": {"checkpoint_every": 1}},
            "3 steps back, and the kept ones reach back 1: raise output.keep_checkpoints",
        ),
        ({"monitor": {"action": "shout"}}, "monitor.action"),
    ],
)
def test_an_action_that_could_do_nothing(
    sd3_folder: Path, prompts: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pixrl.align(recipe(sd3_folder, prompts, **settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_was_written_down_is_what_is_seen_again(sd3_folder: Path, prompts: Path, tmp_path: Path) -> None:
    run = pixrl.align(recipe(sd3_folder, prompts, steps=3), out=tmp_path / "run").run
    folder = RunFolder.open(run)
    sides = [Looked.of(folder, step, 2) for step in (0, 3)]
    again = compare(sides[0], sides[1], MonitorSettings(), ["game"], ["other"])
    assert [one.name for one in again] == [one.name for one in read_findings(folder, 3)]
    written = json.loads((run / "samples/step-000003/guard.json").read_text())
    assert [row["after"] for row in written] == [one.after for one in again]
    (run / "samples/step-000003/guard.json").write_text("[{")
    assert read_findings(folder, 3) == ()
