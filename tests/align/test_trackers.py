"""Weights & Biases and trackio, offline: a run's figures are sent once each, however often it was interrupted."""

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pixrl.doctor.diagnosis import Findings, Need
from pixrl.doctor.needs import find_trackers
from pixrl.errors import CheckpointError, ConfigError, RunError
from pixrl.fusion.config import FuseConfig
from pixrl.jobs import align as align_job
from pixrl.jobs import fuse as fuse_job
from pixrl.runs.config import AlignConfig
from pixrl.runs.folder import RunFolder
from pixrl.runs.loop import Loop
from pixrl.runs.reading import evaluations
from pixrl.runs.trackers import IDENTITY, Tracker
from tests.align.parts import recipe
from tests.fuse.world import fake_world

MISSING = [name for name in Tracker if find_spec(name) is None]
needs = {
    name: pytest.mark.skipif(name in MISSING, reason=f"{name} is not installed: pip install 'pixrl[{name}]'")
    for name in Tracker
}
EACH = [pytest.param(name, marks=needs[name]) for name in Tracker]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackio")


@pytest.fixture(autouse=True)
def offline(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Nothing leaves this process, and each test has a project of its own."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("TRACKIO_DIR", str(store))  # read when trackio is imported for the first time
    monkeypatch.setenv("TRACKIO_PROJECT", f"test-{abs(hash(request.node.nodeid))}")
    monkeypatch.setattr(sys, "argv", ["pixrl"])
    yield
    if sys.modules.get("wandb") is not None:
        sys.modules["wandb"].teardown()  # the next test's reads the environment anew


def sent(tracker: Tracker, run: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows that a tracker has of a run, in order."""
    if tracker is Tracker.WANDB:
        sys.modules["wandb"].teardown()  # it writes the file by a process of its own, which ends with this
        (part,) = (run / "wandb").glob("offline-run-*/*.wandb")
        return [row for row in map(history, records(part)) if row is not None]
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.name}-{json.loads((run / IDENTITY).read_text())['id']}"
    rows = SQLiteStorage.get_logs(os.environ["TRACKIO_PROJECT"], name)
    return [(row.pop("step"), {k: x for k, x in row.items() if k != "timestamp"}) for row in rows]


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, behind seven bytes."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield record
            record = b""


def history(record: bytes) -> tuple[int, dict[str, Any]] | None:
    from wandb.proto import wandb_internal_pb2

    parsed = wandb_internal_pb2.Record()
    parsed.ParseFromString(record)
    if parsed.WhichOneof("record_type") != "history":
        return None
    row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in parsed.history.item}
    figures = {name: x for name, x in row.items() if not name.startswith("_")}
    return (parsed.history.step.num, figures) if figures else None


def expected(run: Path) -> list[tuple[int, dict[str, float]]]:
    """The rows that the folder says."""
    rows = {
        int(row["step"]): {k: x for k, x in row.items() if k != "step"}
        for row in RunFolder.open(run).metrics()
    }
    for row in evaluations(run):
        figures = {f"evaluation/{name}": x for name, x in row.items() if name != "step"}
        rows.setdefault(row["step"], {}).update(figures)
    return sorted(
        (step, {name: x for name, x in row.items() if x is not None and x == x}) for step, row in rows.items()
    )


def assert_mirrors(tracker: Tracker, run: Path) -> None:
    found, wanted = sent(tracker, run), expected(run)
    assert [step for step, _ in found] == [step for step, _ in wanted]
    for (_, row), (_, figures) in zip(found, wanted, strict=True):
        assert lasting(row) == pytest.approx(lasting(figures))


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """What a step that is drawn again has again: not its time, nor the checks of a process's first step."""
    passing = ("seconds/", "images_per_second", "on_policy_deviation/", "gradient_disagreement")
    return {name: x for name, x in row.items() if not name.startswith(passing)}


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> pytest.MonkeyPatch:
    """Let a run break off after a step is logged, as a second Ctrl-C does."""
    train = Loop._train

    def broken(self: Loop[Any, Any], step: int) -> Any:
        taken = train(self, step)
        if step == after:
            raise KeyboardInterrupt
        return taken

    monkeypatch.setattr(Loop, "_train", broken)
    return monkeypatch


both = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: pip install 'pixrl[dev]'"
)


@both
def test_an_alignment_that_was_interrupted_is_sent_once(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(sd3_folder, prompt_file, log=list(Tracker), steps=4)
    settings["evaluation"]["every"] = 2
    settings["output"] = {"checkpoint_every": 2}
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 2)  # one step behind the checkpoint
        align_job.start(AlignConfig.model_validate(settings), run)
    for tracker in Tracker:
        assert [step for step, _ in sent(tracker, run)] == [0, 1, 2]
    align_job.go_on(run)
    assert [step for step, _ in expected(run)] == [0, 1, 2, 3, 4]
    for tracker in Tracker:
        assert_mirrors(tracker, run)


@pytest.mark.parametrize("tracker", EACH)
def test_a_fusion_is_sent_once(tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FuseConfig(concepts=("owl", "snail"), budget=24, batch=8, exemplars=2, log=(tracker,))
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 1)
        fuse_job.start(config, run, world=fake_world())
    fuse_job.go_on(run, world=fake_world())
    assert len(expected(run)) == 4  # the last one is the pool's
    assert_mirrors(tracker, run)


@both
def test_a_run_that_had_no_tracker_is_sent_whole(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    config = AlignConfig.model_validate(recipe(sd3_folder, prompt_file, steps=2))
    run = align_job.start(config, tmp_path / "run")
    assert not (run / IDENTITY).exists() and "log:" not in (run / "recipe.yaml").read_text()
    align_job.go_on(run, overrides=["log=[wandb, trackio]"])
    for tracker in Tracker:
        assert_mirrors(tracker, run)
    assert RunFolder.open(run).recipe()["log"] == [*Tracker]


@pytest.mark.parametrize("tracker", list(Tracker))
def test_a_missing_package_is_said_before_anything_begins(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    config = AlignConfig.model_validate(recipe(sd3_folder, prompt_file, log=[tracker]))
    wanted = rf"^log: {tracker} needs {tracker}, which cannot be imported .* Type: pip install 'pixrl\[{tracker}\]'$"
    with pytest.raises(RunError, match=wanted):
        align_job.start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    findings = Findings()
    find_trackers(config.log, findings)
    assert [one.need for one in findings.problems] == [Need.PACKAGE]


@needs[Tracker.WANDB]
def test_wandb_asks_for_no_login_while_a_run_begins(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = AlignConfig.model_validate(recipe(sd3_folder, prompt_file, log=["wandb"]))
    with pytest.raises(
        RunError, match=r"^log: wandb has no API key here. Type: wandb login. Or keep its log"
    ):
        align_job.start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs[Tracker.TRACKIO]
def test_a_damaged_identity_is_said(tmp_path: Path) -> None:
    config = FuseConfig(concepts=("owl", "snail"), budget=8, batch=8, exemplars=2, log=("trackio",))
    run = tmp_path / "run"
    fuse_job.start(config, run, world=fake_world())
    (run / IDENTITY).write_text("{")
    with pytest.raises(CheckpointError, match=r"trackers\.json, which holds the id .* Delete it"):
        fuse_job.go_on(run, world=fake_world())


def test_what_is_no_tracker_is_refused(sd3_folder: Path, prompt_file: Path) -> None:
    from pixrl.runs.config import load_recipe

    settings = recipe(sd3_folder, prompt_file)
    with pytest.raises(ConfigError, match="log: wandb, wandb: name each tracker once"):
        load_recipe(settings, ["log=[wandb, wandb]"])
    with pytest.raises(ConfigError, match=r"log\.0: .*'wandb' or 'trackio'.*wanbd.*Did you mean"):
        load_recipe(settings, ["log=[wanbd]"])
