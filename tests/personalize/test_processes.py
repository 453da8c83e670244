"""Two gloo processes end as one, also where one of them has no group."""

from pathlib import Path

import pytest
import yaml

from pixrl.runs.folder import RunFolder
from tests.align.launching import Launch
from tests.align.test_processes import EPS, assert_trained_alike, processes_of
from tests.personalize.test_job import METHODS, recipe


@pytest.mark.slow
@pytest.mark.parametrize(("method", "per_step"), [("customized", 3), ("rpo", 1)])
def test_two_processes_end_as_one(
    tmp_path: Path, flux_folder: Path, subjects: Path, launch: Launch, method: str, per_step: int
) -> None:
    settings = recipe(flux_folder, subjects, kind="personalize", **METHODS[method])
    settings["prompts"]["per_step"] = per_step
    settings["optimizer"]["eps"] = EPS
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    for processes in (1, 2):
        words = ["personalize", str(file), "--out", str(tmp_path / str(processes))]
        assert launch(processes, *words) == [0] * processes
    one, two = tmp_path / "1", tmp_path / "2"
    assert [processes_of(run) for run in (one, two)] == [1, 2]
    assert_trained_alike(one, two)
    rows = [RunFolder.open(run).manifest() for run in (one, two)]
    assert [row.seed for row in rows[0]] == [row.seed for row in rows[1]]
    metrics = [RunFolder.open(run).metrics()[0] for run in (one, two)]
    for name in ("conflict_share", "reward_correlation"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-3)
