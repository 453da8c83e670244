"""`pixrl study` itself: where it works, what it takes, and cells that go to other processes."""

import pickle
from functools import partial
from pathlib import Path

import pytest
from tests.studies.command import main

from pixrl import config as recipes
from pixrl import libraries
from studies.command import KINDS
from studies.grid import _work


def test_an_installed_package_without_the_repository_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(libraries, "CHECKOUT", tmp_path)
    assert main(["toy/align-study"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: Studies need a checkout of the repository") and "pip install -e ." in said


def test_a_recipe_for_no_study_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy/e2po"]) == 2
    assert "toy/e2po is a recipe for align, which is no study" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["toy/fuse-alpha", "toy/align-study", "toy/personalize-long"])
def test_cells_can_go_to_other_processes(name: str, tmp_path: Path) -> None:
    kind = KINDS[recipes.kind_of(name) or ""]
    study = recipes.load(kind.model, name)
    work = partial(_work, kind.cell, kind.model, study.model_dump_json(), tmp_path)
    again = pickle.loads(pickle.dumps(work))
    assert again.args == work.args and kind.model.model_validate_json(again.args[2]) == study
