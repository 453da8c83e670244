"""Checkpoints: all or nothing, exact, and never silently a damaged one."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from pixrl.errors import CheckpointError, RunError
from pixrl.runs import checkpoint, files

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).view(2, 3).T,
    "half": torch.tensor(1.5, dtype=torch.bfloat16),
    "rng": torch.get_rng_state(),
}
STATE = {"step": 100, "best": 1 / 3, "names": ["owl", "snail"], "nothing": None, "deep": {"α": [1, 2.5]}}


def make_run(path: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint.save(
            checkpoint.step_folder(path, step), {"x": torch.tensor([float(step)])}, {"step": step}
        )
    return path


def damage(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def test_round_trip(tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 100)
    assert folder == tmp_path / "checkpoints" / "step-000100"
    checkpoint.save(folder, TENSORS, STATE)
    tensors, state = checkpoint.load(folder)
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "checksums.json",
        "state.json",
        "tensors.safetensors",
    ]
    assert [entry.name for entry in folder.parent.iterdir()] == ["step-000100"]


def test_no_tensors_and_tensors_that_share_memory(tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 0)
    checkpoint.save(folder, {}, {})
    assert checkpoint.load(folder) == ({}, {})
    shared = torch.rand(4)
    checkpoint.save(folder, {"a": shared, "b": shared[:2]}, {})
    assert torch.equal(checkpoint.load(folder)[0]["b"], shared[:2])


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 1)
    for value in (1, 2):
        checkpoint.save(folder, {}, {"value": value})
    assert checkpoint.load(folder)[1] == {"value": 2}
    assert [entry.name for entry in folder.parent.iterdir()] == ["step-000001"]


def test_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    make_run(tmp_path, 2, 10, 1_000_000)
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 1_000_000)
    assert checkpoint.latest(tmp_path, at_most=999_999) == checkpoint.step_folder(tmp_path, 10)
    assert checkpoint.latest(tmp_path, at_most=1) is None


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("harm", [damage, lambda folder, name: (folder / name).unlink()])
def test_a_damaged_checkpoint_is_noticed_and_the_last_good_one_offered(
    tmp_path: Path, name: str, harm: object, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path, 1, 2, 3)
    assert callable(harm)
    harm(checkpoint.step_folder(tmp_path, 3), name)
    with pytest.raises(
        CheckpointError, match=rf"step-000003.*The last good one is .*step-000002; .*resume {tmp_path}"
    ):
        checkpoint.load(checkpoint.step_folder(tmp_path, 3))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pixrl"):
        assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 2)
    assert "step-000003" in caplog.text


def test_when_none_is_left_it_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    damage(checkpoint.step_folder(tmp_path, 1), "state.json")
    with pytest.raises(CheckpointError, match="No good checkpoint is left"):
        checkpoint.load(checkpoint.step_folder(tmp_path, 1))
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        checkpoint.load(checkpoint.step_folder(tmp_path, 7))


def test_checksums_that_list_something_else(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    (checkpoint.step_folder(tmp_path, 1) / "checksums.json").write_text(json.dumps({"../../x": "0"}))
    with pytest.raises(CheckpointError, match="does not list"):
        checkpoint.load(checkpoint.step_folder(tmp_path, 1))


def test_folder_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        checkpoint.save(tmp_path / "step-1", {}, {})
    make_run(tmp_path, 1)
    shutil.copytree(checkpoint.step_folder(tmp_path, 1), tmp_path / "checkpoints" / ".step-000002.9.tmp")
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 1)


def test_keep_last(tmp_path: Path) -> None:
    make_run(tmp_path, 1, 2, 3)
    checkpoint.keep_last(tmp_path, 2)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000003",
    ]
    with pytest.raises(ValueError, match="at least one"):
        checkpoint.keep_last(tmp_path, 0)


def test_keep_last_counts_good_ones_only(tmp_path: Path) -> None:
    make_run(tmp_path, 1, 2, 3)
    damage(checkpoint.step_folder(tmp_path, 3), "state.json")
    checkpoint.keep_last(tmp_path, 1)
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 2)


@pytest.mark.parametrize("moment", range(3))
def test_killed_while_saving(tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file is being written when the process stops, the earlier checkpoint is what `latest` finds."""
    make_run(tmp_path, 1)
    written = []

    def stop(path: Path, content: bytes) -> None:
        if len(written) == moment:
            raise KeyboardInterrupt
        written.append(path)
        files.write_durable(path, content)

    monkeypatch.setattr(checkpoint, "write_durable", stop)
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 1)


def test_a_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, 1)

    def full(descriptor: int, content: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(
            RunError, match=r"The disk is full: .*step-000002 needs .* are free\. Nothing saved before"
        ):
            make_run(tmp_path, 2)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_disk_without_room_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 12)
    with pytest.raises(RunError, match="The disk is full"):
        make_run(tmp_path, 2)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
