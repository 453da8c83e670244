"""Run folders: what was returned from is on the disk, whatever happens next."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixrl import config
from pixrl.errors import CheckpointError, RunError, ShapeError
from pixrl.runs import files
from pixrl.runs.folder import MANIFEST, METRICS, ManifestRow, RunFolder


class Recipe(config.Settings):
    budget: int = 128
    seed: int = 3


def row(index: int) -> ManifestRow:
    return ManifestRow(
        index=index,
        step=index // 4,
        concepts=("owl", "snail"),
        seed=index + 10,
        scores={"reward": 0.1 * index, "s1": math.nan},
        failed="no foreground found" if index == 2 else None,
        extra={"coefficients": [0.1, 1 / 3], "note": "ü\u2028"},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", kind="fuse", recipe=Recipe())


def test_a_new_run_holds_recipe_and_environment(run: RunFolder) -> None:
    assert run.recipe_text().startswith("kind: fuse\nbudget: 128\n")
    assert run.recipe() == {"kind": "fuse", "budget": 128, "seed": 3}
    assert config.load(Recipe, run.recipe(), kind="fuse") == Recipe()
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["seed"] == 3
    assert (
        environment["versions"]["torch"] == torch.__version__.split("+")[0]
        or environment["versions"]["torch"]
    )
    assert environment["machine"]["cores"] >= 1
    assert environment["threads"]["torch"] == torch.get_num_threads()
    assert environment["command"]
    assert run.samples_dir.is_dir()
    assert run.report_path == run.path / "report.html"
    assert RunFolder.open(run.path).kind == "fuse"


def test_nothing_is_left_beside_a_new_run(run: RunFolder) -> None:
    assert [entry.name for entry in run.path.parent.iterdir()] == ["run"]


def test_rows_come_back_as_they_went_in(run: RunFolder) -> None:
    run.append_manifest([row(0), row(1)])
    run.append_manifest([row(2)])
    read = RunFolder.open(run.path).manifest()
    assert read == [row(0), row(1), row(2)]
    assert read[0].scores["s1"] is None
    lines = (run.path / MANIFEST).read_text().split("\n")
    assert list(json.loads(lines[0])) == [*ManifestRow.model_fields, "crc"]


def test_metrics_come_back_and_nan_is_null_on_disk(run: RunFolder) -> None:
    run.log(1, {"reward/fusion/mean": 0.5, "kl": math.nan})
    run.log(2, {"reward/fusion/mean": 0.6})
    assert '"kl": null' in (run.path / METRICS).read_text()
    first, second = RunFolder.open(run.path).metrics()
    assert (first["step"], first["reward/fusion/mean"], math.isnan(first["kl"])) == (1, 0.5, True)
    assert second == {"step": 2, "reward/fusion/mean": 0.6}
    run.truncate_metrics(2)
    assert [line["step"] for line in run.metrics()] == [1]
    run.truncate_metrics(0)
    assert run.metrics() == []


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_torn_last_line_is_dropped_and_written_over(run: RunFolder, cut: int) -> None:
    run.append_manifest([row(0), row(1)])
    path = run.path / MANIFEST
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = RunFolder.open(run.path)
    assert again.manifest() == [row(0)]
    again.append_manifest([row(1)])
    assert path.read_bytes() == whole


def test_a_damaged_last_line_is_dropped_too(run: RunFolder) -> None:
    run.append_manifest([row(0), row(1)])
    path = run.path / MANIFEST
    path.write_bytes(path.read_bytes()[:-20] + b"\0" * 20)
    assert RunFolder.open(run.path).manifest() == [row(0)]


def test_every_single_changed_byte_is_noticed(run: RunFolder) -> None:
    run.append_manifest([row(0), row(1)])
    path = run.path / MANIFEST
    whole = path.read_bytes()
    for place in range(0, whole.index(b"\n") + 1, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="line 1"):
            run.manifest()


@pytest.mark.parametrize("name", [MANIFEST, METRICS])
def test_damage_in_the_middle_is_an_error_that_offers_the_last_good_line(run: RunFolder, name: str) -> None:
    run.append_manifest([row(i) for i in range(5)])
    for step in range(5):
        run.log(step, {"loss": 0.5})
    path = run.path / name
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b": ", b":  ", 1)
    path.write_bytes(b"".join(lines))
    with pytest.raises(
        CheckpointError, match=rf"{name}, line 3: .* Lines 1 to 2 are good; .*resume .*run --repair"
    ):
        RunFolder.open(run.path)
    with pytest.raises(CheckpointError):
        run.truncate_manifest(1) if name == MANIFEST else run.truncate_metrics(1)
    repaired = RunFolder.open(run.path, repair=True)
    assert (len(repaired.manifest()), len(repaired.metrics())) == ((2, 5) if name == MANIFEST else (5, 2))


def test_damage_in_the_first_line_leaves_nothing_to_offer(run: RunFolder) -> None:
    run.append_manifest([row(0), row(1)])
    path = run.path / MANIFEST
    path.write_bytes(b"x" + path.read_bytes())
    with pytest.raises(CheckpointError, match="No line before it is left"):
        run.manifest()


def test_a_row_of_another_shape_is_an_error(run: RunFolder) -> None:
    run.log(1, {"loss": 1.0})
    (run.path / MANIFEST).write_bytes((run.path / METRICS).read_bytes())
    with pytest.raises(CheckpointError, match="another version"):
        RunFolder.open(run.path)


def test_truncation(run: RunFolder) -> None:
    run.append_manifest([row(i) for i in range(4)])
    run.truncate_manifest(4)
    run.truncate_manifest(2)
    assert run.manifest() == [row(0), row(1)]
    with pytest.raises(CheckpointError, match="has 2 rows, not 3"):
        run.truncate_manifest(3)
    run.truncate_manifest(0)
    assert run.manifest() == []
    run.append_manifest([row(0)])
    assert run.manifest() == [row(0)]


def test_of_two_writers_the_first_notices_the_second(run: RunFolder) -> None:
    run.append_manifest([row(0), row(1)])
    second = RunFolder.open(run.path)
    second.truncate_manifest(1)
    with pytest.raises(RunError, match="changed by another process"):
        run.append_manifest([row(2)])
    second.append_manifest([row(1)])
    assert second.manifest() == [row(0), row(1)]


def test_pictures_are_written_exactly(run: RunFolder) -> None:
    picture = torch.arange(48, dtype=torch.float32).view(3, 4, 4) / 255
    name = run.save_image(12, picture)
    assert name == "rollouts/images/000012.png"
    back = torch.tensor(list(Image.open(run.path / name).tobytes())).view(4, 4, 3).permute(2, 0, 1)
    assert torch.equal(back, (picture * 255).round().long())
    assert len(list((run.path / "rollouts/images").iterdir())) == 1
    with pytest.raises(ShapeError, match=r"\[4, 4\]"):
        run.save_image(0, picture[0])


def test_an_existing_run_is_refused_and_replaced_only_by_force(run: RunFolder) -> None:
    run.append_manifest([row(0)])
    with pytest.raises(RunError, match=r"already holds a run.*pixrl resume .*--force"):
        RunFolder.create(run.path, kind="fuse", recipe=Recipe())
    assert len(run.manifest()) == 1
    new = RunFolder.create(run.path, kind="fuse", recipe=Recipe(budget=1), force=True)
    assert new.manifest() == []
    assert new.recipe()["budget"] == 1
    assert [entry.name for entry in run.path.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_run_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="is no run of pixrl"):
        RunFolder.create(tmp_path, kind="fuse", recipe=Recipe(), force=force)
    with pytest.raises(RunError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.tex", kind="fuse", recipe=Recipe(), force=force)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "deep" / "run").mkdir(parents=True)
    assert RunFolder.create(tmp_path / "deep" / "run", kind="fuse", recipe=Recipe()).manifest() == []
    assert RunFolder.create(tmp_path / "other" / "run", kind="fuse", recipe=Recipe()).manifest() == []


def test_a_half_written_run_is_refused_by_open_and_replaceable_by_force(
    run: RunFolder, tmp_path: Path
) -> None:
    (run.path / "environment.json").unlink()
    with pytest.raises(RunError, match=r"only half of one: environment\.json missing"):
        RunFolder.open(run.path)
    RunFolder.create(run.path, kind="fuse", recipe=Recipe(), force=True)
    with pytest.raises(RunError, match="There is no run folder"):
        RunFolder.open(tmp_path / "nowhere")


def test_a_changed_recipe_is_noticed(run: RunFolder) -> None:
    path = run.path / "recipe.yaml"
    path.write_text(path.read_text().replace("128", "129"))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        RunFolder.open(run.path)


class FullDisk:
    """Stands in for os.write: takes some bytes, then the disk is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.write = os.write

    def __call__(self, descriptor: int, content: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = content[: self.room]
        self.room -= len(part)
        return self.write(descriptor, part)


@pytest.mark.parametrize("room", [0, 1, 100, 400])
def test_a_full_disk_loses_nothing_saved_before(
    run: RunFolder, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.append_manifest([row(0)])
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", FullDisk(room))
        with pytest.raises(
            RunError, match=r"The disk is full: .*manifest\.jsonl needs .* are free.*pixrl resume"
        ):
            run.append_manifest([row(1), row(2)])
        with pytest.raises(RunError, match=r"The disk is full: .*000001\.png"):
            run.save_image(1, torch.rand(3, 16, 16))
    assert run.manifest() == [row(0)]
    assert list((run.path / "rollouts/images").iterdir()) == []
    run.append_manifest([row(1), row(2)])
    assert RunFolder.open(run.path).manifest() == [row(0), row(1), row(2)]


def test_a_full_disk_that_shows_at_fsync(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    run.append_manifest([row(0)])
    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync_folder", lambda folder: None)
        patch.setattr("pixrl.runs.folder.fsync_folder", lambda folder: None)
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(RunError, match="The disk is full"):
            run.append_manifest([row(1)])
    assert run.manifest() == [row(0)]


def test_a_full_disk_at_the_start_leaves_no_half_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "write", FullDisk(30))
    with pytest.raises(RunError, match="The disk is full"):
        RunFolder.create(tmp_path / "run", kind="fuse", recipe=Recipe())
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_disk_are_not_renamed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, content: memoryview) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "write", broken)
    with pytest.raises(OSError, match="Input/output"):
        run.append_manifest([row(0)])
