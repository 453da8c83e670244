"""Runs that lost a file, or are resumed from another place: nothing that was trained is thrown away."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pixrl import api
from pixrl.config import find_recipe
from pixrl.errors import CheckpointError
from pixrl.jobs import align as align_job
from pixrl.jobs.check import check
from pixrl.runs import checkpoint
from pixrl.runs.config import AlignConfig
from pixrl.runs.data import with_full_paths
from pixrl.runs.folder import RunFolder
from pixrl.runs.loop import Loop, Step
from pixrl.runs.reading import GALLERY, START, evaluations, gallery_entries
from tests.align.parts import JUDGE, final, recipe, same

CHEAP: dict[str, Any] = {
    "exploration": {"kind": "noise", "noises": 2},
    "sampling": {"steps": 1, "solver": "euler"},
    "loss": {"kind": "nft", "timesteps": 1},
    "evaluation": {"prompts": 1},
}


@pytest.fixture
def settings(sd3_folder: Path, prompt_file: Path) -> dict[str, Any]:
    prompts = {"source": str(prompt_file), "per_step": 1}
    return recipe(sd3_folder, prompt_file, steps=2, prompts=prompts, **CHEAP)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, config: AlignConfig, run: Path) -> None:
    """A run that is stopped when `step` steps are saved."""
    train = Loop._train

    def broken(self: Loop[Any, Any], number: int) -> Step[Any, Any]:
        if number == step:
            raise KeyboardInterrupt
        return train(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train", broken)
        with pytest.raises(KeyboardInterrupt):
            align_job.start(config, run)


@pytest.mark.parametrize("loss", ["missing", "damaged"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_lost_start_throws_nothing_away(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, loss: str, steps: int
) -> None:
    config = AlignConfig.model_validate(settings)
    whole, run = align_job.start(config, tmp_path / "whole"), tmp_path / "run"
    stop_after(steps, monkeypatch, config, run)
    if loss == "missing":
        (run / START).unlink()
    else:
        (run / START).write_text('{"recipe": {"mod')
        (run / GALLERY).write_text("[")
        with pytest.raises(CheckpointError, match=r"gallery\.json is damaged.*pixrl resume"):
            gallery_entries(RunFolder.open(run))
    assert len(check(run).findings) == (1 if loss == "missing" else 2)
    align_job.go_on(run)
    assert same(final(whole), final(run)) and evaluations(whole) == evaluations(run)
    for file in (START, GALLERY):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert check(run).findings == ()


def test_check_puts_the_checkpoints_copy_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = align_job.start(AlignConfig.model_validate(settings), tmp_path / "run")
    before = json.loads((run / START).read_text())
    (run / START).unlink()
    assert check(run, repair=True).good and check(run).findings == ()
    assert json.loads((run / START).read_text()) == before


def test_a_lost_start_of_an_older_run_is_said_and_an_edited_recipe_still_refused(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of before they kept a copy: training goes on, and the notes say what is not known."""
    run, config = tmp_path / "run", AlignConfig.model_validate(settings)
    stop_after(1, monkeypatch, config, run)
    folder = checkpoint.step_folder(run, 1)
    tensors, state = checkpoint.load(folder)
    checkpoint.save(folder, tensors, {name: x for name, x in state.items() if name != "start"})
    (run / START).unlink()
    edited = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(edited.replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(CheckpointError, match=r"start\.json, which says what it was, is gone"):
        align_job.go_on(run)
    (run / "recipe.yaml").write_text(edited)
    align_job.go_on(run)
    assert [row["step"] for row in RunFolder.open(run).metrics()] == [0, 1]
    assert align_job.LOST in json.loads((run / START).read_text())["notes"]


def test_a_run_of_relative_sources_is_resumed_from_another_folder(
    tmp_path: Path, sd3_folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    (home / "prompts.txt").write_text("a red owl\na cat\n")
    (home / "judge.py").write_text(JUDGE.read_text())
    (home / "model").symlink_to(sd3_folder)
    monkeypatch.chdir(home)
    relative = settings | {
        "model": "model",
        "prompts": {"source": "prompts.txt", "per_step": 1},
        "rewards": [{"name": "python", "options": {"function": "judge.py:brightness"}}],
    }
    stop_after(1, monkeypatch, AlignConfig.model_validate(relative), Path("run"))
    monkeypatch.chdir(other)
    api.resume(home / "run", live=False)
    found = RunFolder.open(home / "run").recipe()
    assert found["model"] == str(home / "model")
    assert found["prompts"]["source"] == str(home / "prompts.txt")
    assert found["rewards"][0]["options"]["function"] == f"{home / 'judge.py'}:brightness"
    assert check(home / "run").findings == ()


def test_names_that_are_no_files_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("geneval", "preference", "raw"):
        (tmp_path / name).mkdir()
    config = AlignConfig.model_validate(json.loads(_as_json("toy/e2po")))
    assert with_full_paths(config) == config


def _as_json(name: str) -> str:
    import yaml

    found = yaml.safe_load(find_recipe(name).read_text())
    found.pop("kind", None)
    return json.dumps(found)


def test_only_what_is_set_anew_is_looked_for_when_a_run_of_relative_sources_is_resumed(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, prompt_file: Path
) -> None:
    """Runs of before the whole paths were recorded keep their recipe."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(prompt_file, "mine.txt")
    before = AlignConfig.model_validate(settings | {"prompts": {"source": "mine.txt"}})
    after = before.model_copy(update={"steps": 3})
    assert with_full_paths(after, before) == after
    assert with_full_paths(after).prompts.source == str(tmp_path / "mine.txt")


def test_killed_between_a_changed_recipe_and_its_start(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume --set` writes three files; whichever is the last one written, plain `resume` goes on."""
    run = align_job.start(AlignConfig.model_validate(settings), tmp_path / "run")
    for writes in range(3):
        copy = Path(shutil.copytree(run, tmp_path / f"copy-{writes}"))
        done: list[Path] = []

        def stop(path: Path, content: bytes, done: list[Path] = done, writes: int = writes) -> None:
            if len(done) == writes:
                raise KeyboardInterrupt
            done.append(path)
            path.write_bytes(content)

        with monkeypatch.context() as patch:
            patch.setattr("pixrl.runs.folder.write_atomic", stop)
            patch.setattr("pixrl.runs.record.write_atomic", stop)
            with pytest.raises(KeyboardInterrupt):
                align_job.go_on(copy, overrides=["optimizer.lr=0.002", "steps=3"])
        align_job.go_on(copy)
        assert RunFolder.open(copy).recipe()["steps"] == (2 if writes < 2 else 3)
