"""Where a run lies: its marker, what --force may replace and when that goes, links, and what runs out."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixrl import api, cli
from pixrl.errors import RunError
from pixrl.fusion.config import FuseConfig
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs.check import check
from pixrl.runs import files
from pixrl.runs import place as run_place
from pixrl.runs.folder import RunFolder
from pixrl.runs.place import MARKER, REPLACED
from tests import kills
from tests.fuse.world import fake_world

CONFIG = FuseConfig(concepts=("owl", "snail"), budget=8, batch=4, exemplars=1)
EXEMPLARS = 2


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: fake_world())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    api.run_fuse(CONFIG, tmp_path / "run", live=False)
    return tmp_path / "run"


def replace(run: Path, die_after: int | None = None) -> None:
    world = fake_world(die_after=die_after)
    fuse_job.start(CONFIG.model_copy(update={"seed": 1}), run, force=True, world=world)


def test_the_marker_says_what_is_pixrls(run: Path) -> None:
    marker = json.loads((run / MARKER).read_text())
    assert marker["made_by"] == "pixrl" and marker["kind"] == "fuse" and marker["version"]
    assert run_place.is_run(run)


def test_a_run_of_before_there_were_markers_is_one(run: Path) -> None:
    (run / MARKER).unlink()
    assert run_place.is_run(run)
    replace(run)
    assert RunFolder.open(run).recipe()["seed"] == 1


@pytest.mark.parametrize(
    "content",
    [
        {"recipe.yaml": "kind: fuse\n"},
        {"report.html": "mine", "samples/a.png": "mine"},
        {"recipe.yaml": "kind: align-study\n", "environment.json": '{"recipe_sha256": "0"}', "records.jsonl": ""},
        {"recipe.yaml": "bread", "environment.json": "{}"},
        {MARKER: '{"made_by": "me"}', "metrics.jsonl": "mine"},
    ],
)  # fmt: skip
def test_force_touches_nothing_without_a_marker(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    before = kills.content(tmp_path)
    with pytest.raises(RunError, match="is no run of pixrl, so nothing in it is replaced"):
        replace(tmp_path / "mine")
    assert kills.content(tmp_path) == before


def test_force_touches_no_run_that_holds_something_else(run: Path) -> None:
    (run / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"also holds thesis\.tex, which pixrl did not make"):
        replace(run)
    assert RunFolder.open(run).recipe()["seed"] == 0
    assert "thesis.tex is not pixrl's" in " ".join(check(run).notes)


def test_the_old_run_goes_when_the_new_one_has_saved_its_first_step(run: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        replace(run, die_after=EXEMPLARS + 4)
    assert RunFolder.open(run).recipe()["seed"] == 1
    assert not (run / REPLACED).exists()
    assert len(RunFolder.open(run).manifest()) == 4


@pytest.mark.parametrize("pictures", [1, EXEMPLARS])
def test_the_old_run_comes_back_when_the_new_one_fails_before(run: Path, pictures: int) -> None:
    before = kills.content(run)
    with pytest.raises(KeyboardInterrupt, match="holds the run again that was there before"):
        replace(run, die_after=pictures)
    assert kills.content(run) == before
    assert [entry.name for entry in run.parent.iterdir()] == ["run"]


def test_a_second_replacement_before_the_first_step_keeps_the_oldest(run: Path) -> None:
    """A process that is killed puts nothing back; the next start does not take its remains for a run to keep."""
    before = kills.content(run)
    RunFolder.create(run, kind="fuse", recipe=CONFIG, force=True)
    assert kills.content(run / REPLACED) == before
    assert "waits in .replaced" in " ".join(check(run).notes)
    RunFolder.create(run, kind="fuse", recipe=CONFIG.model_copy(update={"seed": 2}), force=True)
    assert kills.content(run / REPLACED) == before
    api.resume(run, live=False)
    assert RunFolder.open(run).recipe()["seed"] == 2 and not (run / REPLACED).exists()


def test_a_wrong_place_is_refused_before_the_model_loads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(fuse_job, "load_world", load)
    with pytest.raises(RunError, match="already holds a run"):
        fuse_job.start(CONFIG, run)


@pytest.mark.parametrize("target", ["there", "missing", "run"])
def test_a_link_as_out(tmp_path: Path, run: Path, target: str) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    api.run_fuse(CONFIG, link, live=False, force=target == "run")
    assert link.is_symlink()
    assert RunFolder.open(link).kind == "fuse" and (tmp_path / target / "report.html").is_file()
    api.resume(link, live=False)
    assert check(link).findings == ()
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "there", "link"} | {target}


def test_killed_while_a_given_folder_is_filled(tmp_path: Path) -> None:
    """It was there before, so it does not appear at once; the same command starts the run all the same."""

    def start(run: Path) -> None:
        RunFolder.create(run, kind="fuse", recipe=CONFIG)

    (tmp_path / "count").mkdir()
    status, total = kills.in_child(lambda: start(tmp_path / "count"))
    assert status == 0
    for number in range(total):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        assert kills.in_child(lambda at=run: start(at), number)[0] == kills.KILLED  # type: ignore[misc]
        try:
            opened = RunFolder.open(run)
        except RunError as error:
            assert "Nothing was drawn there yet: type the command that starts it" in str(error)
            opened = RunFolder.create(run, kind="fuse", recipe=CONFIG)
        assert opened.manifest() == []


def test_half_a_run_with_pictures_is_not_taken_for_an_empty_folder(run: Path) -> None:
    (run / "environment.json").unlink()
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder.create(run, kind="fuse", recipe=CONFIG)
    with pytest.raises(RunError, match=r"environment\.json missing\. Put it back"):
        RunFolder.open(run)


def limited(kind: int, bound: int) -> Callable[[Path], None]:
    def work(run: Path) -> None:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (bound, hard))
        with pytest.raises(RunError) as caught:
            api.run_fuse(CONFIG.model_copy(update={"budget": 800, "seed": 5}), run, live=False)
        resource.setrlimit(kind, (hard, hard))
        (run.parent / "said").write_text(str(caught.value))

    return work


def test_a_file_that_grows_too_big_ends_in_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert kills.in_child(lambda: limited(resource.RLIMIT_FSIZE, 40_000)(run))[0] == 0
    said = (tmp_path / "said").read_text()
    assert "manifest.jsonl" in said and "ulimit -f" in said and "pixrl resume" in said
    assert len(RunFolder.open(run).manifest()) > 4
    found = check(run, repair=True)  # the pictures of the step that could not be logged
    assert found.good and all("does not name it" in one.problem for one in found.findings)
    assert check(run).findings == ()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "no memory left"),
        (MemoryError(), "no memory left"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "no memory left"),
    ],
)
def test_what_runs_out_ends_in_one_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    made: list[int] = []
    sample = fake_world().renderer.__class__.sample

    def failing(*given: object) -> object:
        made.append(1)
        if len(made) == 4:  # in the second step: two concepts' exemplars come first
            raise error
        return sample(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("tests.fuse.world.FakeRenderer.sample", failing)
        done = CliRunner().invoke(
            cli.app, ["fuse", "owl", "snail", "--budget", "8", "--set", "batch=4", "--out", str(tmp_path / "run")]
        )  # fmt: skip
    printed = " ".join(done.output.split())
    assert done.exit_code == 1 and said in printed and "pixrl resume" in printed, printed
    api.resume(tmp_path / "run", live=False)
    assert len(RunFolder.open(tmp_path / "run").manifest()) == 8


def test_no_file_handles_while_a_step_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = os.open

    def refuse(path: object, flags: int, *more: int) -> int:
        if "000005.png" in str(path) and not opened:
            opened.append(str(path))
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return original(path, flags, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "open", refuse)
        with pytest.raises(RunError, match=r"000005\.png .*ulimit -n.*Nothing saved before it is lost"):
            api.run_fuse(CONFIG, tmp_path / "run", live=False)
    api.resume(tmp_path / "run", live=False)
    assert len(RunFolder.open(tmp_path / "run").manifest()) == 8
