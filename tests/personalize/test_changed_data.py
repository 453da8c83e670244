"""A run whose subjects changed under it, one that is finished, and one that Ctrl-C broke off."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

import pixrl
from pixrl import api
from pixrl.cli.options import resumable
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.errors import CheckpointError
from pixrl.jobs import align as align_job
from pixrl.runs.data import checksum
from pixrl.runs.folder import RunFolder
from pixrl.runs.reading import evaluations
from tests.personalize.conftest import make_subject
from tests.personalize.test_job import recipe


def repaint(folder: Path) -> None:
    Image.new("RGB", (48, 48), "green").save(folder / "00.png")


def another_prompt(folder: Path) -> None:
    file = folder / "prompts.txt"
    file.write_text(file.read_text().replace("in snow", "on sand"))


def another_class(folder: Path) -> None:
    (folder / "class.txt").write_text("cat\n")
    file = folder / "prompts.txt"
    file.write_text(file.read_text().replace("dog", "cat"))


@pytest.mark.parametrize("change", [repaint, another_prompt, another_class])
def test_subjects_that_changed_are_refused_unless_accepted(
    tmp_path: Path, flux_folder: Path, change: Callable[[Path], None]
) -> None:
    subject = make_subject(tmp_path / "rex")
    run = pixrl.personalize(recipe(flux_folder, subject), steps=1, out=tmp_path / "run").run
    align_job.go_on(run, overrides=["steps=2"])  # nothing changed
    change(subject)
    with pytest.raises(
        CheckpointError, match=r"(?s)prompts and pictures.*prompts\.source .*rex.*accept-changes"
    ):
        align_job.go_on(run, overrides=["steps=3"])
    align_job.go_on(run, overrides=["steps=3"], accept_changes=True)
    assert len(RunFolder.open(run).metrics()) == 3
    align_job.go_on(run, overrides=["steps=4"])  # what was accepted is what is compared with from then on


def test_a_source_that_is_named_anew_is_no_change_of_the_old_one(tmp_path: Path, flux_folder: Path) -> None:
    subject, other = make_subject(tmp_path / "rex"), make_subject(tmp_path / "tom", seed=3)
    run = pixrl.personalize(recipe(flux_folder, subject), steps=1, out=tmp_path / "run").run
    align_job.go_on(run, overrides=["steps=2", f"prompts.source={other}"])
    assert len(RunFolder.open(run).metrics()) == 2


def test_a_checksum_is_of_texts_and_pictures_and_of_no_target() -> None:
    def of(text: str = "a dog", **metadata: object) -> str:
        return checksum(PromptSet("x", (Prompt(text, metadata),)))

    picture = torch.rand(3, 4, 4)
    plain = of(subject="rex", reference=[picture], include=[{"class": "dog", "count": 1}])
    assert plain == of(subject="rex", reference=[picture.clone()], include=[{"count": 1, "class": "dog"}])
    assert plain == of(
        subject="rex", reference=[picture], include=[{"class": "dog", "count": 1}], target=picture
    )
    others = {
        of("a cat", subject="rex", reference=[picture], include=[{"class": "dog", "count": 1}]),
        of(subject="tom", reference=[picture], include=[{"class": "dog", "count": 1}]),
        of(subject="rex", reference=[picture.flip(2)], include=[{"class": "dog", "count": 1}]),
        of(subject="rex", reference=[picture, picture], include=[{"class": "dog", "count": 1}]),
        of(subject="rex", reference=[picture], include=[{"class": "dog", "count": 2}]),
    }
    assert len(others | {plain}) == 6


def test_a_finished_run_draws_nothing_again(
    tmp_path: Path, flux_folder: Path, subjects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pixrl.personalize(recipe(flux_folder, subjects), steps=1, out=tmp_path / "run").run
    before = evaluations(run)
    monkeypatch.setattr(align_job, "_play", lambda *given: pytest.fail("it was played again"))
    assert align_job.go_on(run) == run
    assert evaluations(run) == before


def test_an_evaluation_that_a_finished_run_lacks_is_made(
    tmp_path: Path, flux_folder: Path, subjects: Path
) -> None:
    run = pixrl.personalize(recipe(flux_folder, subjects), steps=1, out=tmp_path / "run").run
    file = run / "evaluations.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0])
    align_job.go_on(run)
    assert file.read_text() == "".join(lines)


def test_another_evaluation_source_may_be_set_beside_the_subject(tmp_path: Path) -> None:
    config, _ = api.load_personalize(
        None, [f"evaluation.source={tmp_path / 'others'}"], subject=tmp_path / "mine"
    )
    assert config.prompts.source == str(tmp_path / "mine")
    assert config.evaluation.source == str(tmp_path / "others")


def test_ctrl_c_says_up_to_which_step_a_run_is_saved(
    tmp_path: Path, flux_folder: Path, subjects: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        with pytest.raises(typer.Exit), resumable(tmp_path / "run"):
            raise KeyboardInterrupt
        return capsys.readouterr().err

    assert "Nothing was started" in interrupted()
    pixrl.personalize(recipe(flux_folder, subjects), steps=2, out=tmp_path / "run")
    assert "Saved up to step 2; what was begun since is drawn again." in interrupted()
    for file in sorted((tmp_path / "run" / "checkpoints").rglob("*.safetensors")):
        file.unlink()
    assert "No step is saved yet; the steps logged since (2) are drawn again." in interrupted()
