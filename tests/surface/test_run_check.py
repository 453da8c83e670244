"""`pixrl check`: every kind of damage is found, told, and mended where it can be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixrl import api, cli
from pixrl.errors import CheckpointError
from pixrl.fusion.config import FuseConfig
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs.check import check
from pixrl.runs import checkpoint
from pixrl.runs.folder import EVALUATIONS, MANIFEST, METRICS, JsonLines, RunFolder
from studies import grid as study_runner
from tests.fuse.world import fake_world

CONFIG = FuseConfig(concepts=("owl", "snail"), budget=12, batch=4, exemplars=1, pool=0)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: fake_world())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    fuse_job.start(CONFIG, run, world=fake_world())
    return run


@pytest.fixture
def run(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def append(name: str, text: str) -> Callable[[Path], None]:
    def work(run: Path) -> None:
        with (run / name).open("a") as file:
            file.write(text)

    return work


def damage_line(name: str, number: int) -> Callable[[Path], None]:
    def work(run: Path) -> None:
        lines = (run / name).read_bytes().splitlines(keepends=True)
        lines[number] = lines[number].replace(b":", b";", 1)
        (run / name).write_bytes(b"".join(lines))

    return work


def make(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(b"half")


HARM: dict[str, tuple[Callable[[Path], object], str, str, bool]] = {
    "torn manifest": (append(MANIFEST, '{"index": 12'), MANIFEST, "the last line is torn", True),
    "torn metrics": (append(METRICS, '{"step"'), METRICS, "the last line is torn", True),
    "torn evaluations": (append(EVALUATIONS, '{"step"'), EVALUATIONS, "the last line is torn", True),
    "metrics": (damage_line(METRICS, 1), METRICS, "line 2 does not match its checksum", True),
    "checkpoint": (
        lambda run: flip(checkpoint.step_folder(run, 3) / "tensors.safetensors"),
        "checkpoints/step-000003",
        "does not match its checksum",
        True,
    ),
    "leftover": (make("samples/.a.png.4000000.tmp"), "samples/.a.png.4000000.tmp", "left over", True),
    "picture": (
        lambda run: (run / "rollouts/images/000003.png").write_bytes(b"\x89PNG"),
        "rollouts/images/000003.png",
        "no whole picture",
        False,
    ),
    "no picture": (
        lambda run: (run / "rollouts/images/000003.png").unlink(),
        "rollouts/images/000003.png",
        "missing",
        False,
    ),
    "odd picture": (
        lambda run: shutil.copy(run / "rollouts/images/000003.png", run / "rollouts/images/000099.png"),
        "rollouts/images/000099.png",
        "does not name it",
        True,
    ),
    "world": (make("world.json"), "world.json", "missing or damaged", False),
    "selection": (make("selection.json"), "selection.json", "damaged", False),
    "coefficients": (
        make("rollouts/coefficients/step-000001.safetensors"),
        "rollouts/coefficients/step-000001.safetensors",
        "missing or damaged",
        False,
    ),
}


def test_a_whole_run_is_well(run: Path) -> None:
    found = check(run)
    assert found.findings == () and found.good and found.files > 20
    assert list(found.lines()) == [f"{run} (fuse): looked at {found.files} files, all is well."]


@pytest.mark.parametrize("name", HARM)
def test_every_damage_is_found_and_mended_where_it_can_be(run: Path, name: str) -> None:
    harm, file, problem, mends = HARM[name]
    harm(run)
    (one,) = check(run).findings
    assert one.file == file and problem in one.problem and not one.repaired
    (mended,) = check(run, repair=True).findings
    assert mended.repaired is mends
    assert bool(check(run).findings) is not mends


@pytest.mark.parametrize("name", ["world", "selection", "checkpoint", "metrics", "torn manifest"])
def test_resume_goes_on_from_what_check_mends_or_leaves_to_it(run: Path, whole: Path, name: str) -> None:
    """world.json beside good checkpoints is written again from the copy in the newest one."""
    HARM[name][0](run)
    check(run, repair=True)
    api.resume(run, live=False)
    assert check(run).findings == ()
    for file in ("world.json", MANIFEST, "selection.json"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_the_command(run: Path) -> None:
    def pixrl(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["check", str(run), *words])
        return done.exit_code, done.output

    assert pixrl()[0] == 0
    HARM["checkpoint"][0](run)
    status, said = pixrl()
    assert status == 1 and "checkpoints/step-000003" in said and "1 wrong" in said
    assert pixrl("--repair")[0] == 0
    status, said = pixrl("--json")
    told = json.loads(said)
    assert status == 0 and told["good"] and told["findings"] == []
    assert told["notes"] == ["checkpoints/step-000003.set-aside was set aside; nothing reads it."]
    assert CliRunner().invoke(cli.app, ["check", str(run / "nowhere")]).exit_code == 1


def test_the_runs_of_a_folder_of_fusions_are_looked_at_too(tmp_path: Path) -> None:
    place = api.run_pairs(CONFIG.model_copy(update={"concepts": ()}), ["owl & snail"], tmp_path / "all")
    assert check(place).findings == ()
    child = next((place / "runs").iterdir())
    HARM["leftover"][0](child)
    (one,) = check(place, repair=True).findings
    assert one.file == f"runs/{child.name}/samples/.a.png.4000000.tmp" and one.repaired
    (place / "failures.json").write_text("{")
    assert [one.file for one in check(place).findings] == ["failures.json"]
    with pytest.raises(CheckpointError, match=r"failures\.json is damaged.*pixrl resume"):
        api.write_report(place)
    api.resume(place, live=False)
    assert check(place).findings == ()


def test_a_studys_records_are_looked_at_and_its_message_names_a_command_that_helps(tmp_path: Path) -> None:
    log = study_runner.open_records(CONFIG, "study", tmp_path / "study")
    log.append([{"variant": "a", "seed": n} for n in range(3)])
    damage_line("records.jsonl", 1)(tmp_path / "study")
    with pytest.raises(CheckpointError, match=r"type: pixrl check .*study --repair"):
        log.read()
    assert check(tmp_path / "study", repair=True).good
    assert len(study_runner.open_records(CONFIG, "study", tmp_path / "study").read()) == 1


def test_a_study_killed_while_it_begins_has_its_environment_later(tmp_path: Path) -> None:
    """The recipe is the last of the two: where it is, both are."""
    study_runner.open_records(CONFIG, "study", tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    (tmp_path / "environment.json").unlink()
    study_runner.open_records(CONFIG, "study", tmp_path)
    assert (tmp_path / "environment.json").is_file()


def test_checkpoints_behind_the_place_are_set_aside_not_kept_in_the_way(run: Path) -> None:
    """A manifest that was cut back has no pictures for the newest checkpoints: the next ones must not be deleted."""
    damage_line(MANIFEST, 5)(run)
    RunFolder.open(run, repair=True)
    api.resume(run, live=False)
    assert [f.name for f in checkpoint.all_folders(run)] == ["step-000002", "step-000003"]
    assert (run / "checkpoints/step-000003.set-aside").is_dir()
    assert check(run).findings == ()


def test_evaluations_are_repaired_by_resume_too(run: Path) -> None:
    log = JsonLines(run / EVALUATIONS, run)
    log.append([{"step": n} for n in range(3)])
    damage_line(EVALUATIONS, 1)(run)
    RunFolder.open(run, repair=True)
    assert log.read() == [{"step": 0}]
