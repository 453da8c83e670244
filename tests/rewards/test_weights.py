"""Weights outside transformers' layout: read without running anything, and what does not fit is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pixrl.errors import CheckpointError
from pixrl.rewards.weights import (
    load_weights,
    origin,
    published_folder,
    read_weights,
    require_file,
    weight_shards,
)


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never be printed",)


def tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "module"])
def test_a_pickled_file_holds_named_tensors(tmp_path: Path, wrap: str | None) -> None:
    saved = tensors() if wrap is None else {wrap: tensors(), "epoch": 3}
    torch.save(saved, tmp_path / "w.pt")
    read = read_weights([tmp_path / "w.pt"])
    assert read.keys() == tensors().keys()
    assert all(torch.equal(read[key], value) for key, value in tensors().items())


def test_the_old_pickle_format_is_read_too(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights([tmp_path / "w.pth"])["bias"], torch.ones(2))


def test_nothing_in_a_file_is_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(1), "extra": RunsCode()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"holds more than tensors, which is never run"):
        read_weights([tmp_path / "w.pt"])
    assert "never be printed" not in capfd.readouterr().out.replace("which is never run", "")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_is_cut_short(tmp_path: Path, name: str) -> None:
    whole = tmp_path / name
    save_file(tensors(), whole) if name.endswith("s") else torch.save(tensors(), whole)
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cut short"):
        read_weights([whole])


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds a list, not named weights"):
        read_weights([tmp_path / "w.pt"])
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no named weights, only epoch, loss"):
        read_weights([tmp_path / "w.pt"])
    torch.save(tensors(), tmp_path / "pickle.safetensors")
    with pytest.raises(CheckpointError, match="another format"):
        read_weights([tmp_path / "pickle.safetensors"])


def test_shards_come_from_the_index(tmp_path: Path) -> None:
    torch.save({"weight": tensors()["weight"]}, tmp_path / "a.bin")
    torch.save({"bias": tensors()["bias"]}, tmp_path / "b.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "a.bin", "bias": "b.bin"}}))
    assert read_weights(weight_shards(tmp_path)).keys() == tensors().keys()
    (tmp_path / "b.bin").unlink()
    with pytest.raises(CheckpointError, match=r"b\.bin is missing; the folder holds a\.bin"):
        weight_shards(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        weight_shards(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        weight_shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"x\.pt is missing; the folder holds nothing\..*hf download"):
        require_file(tmp_path, "x.pt")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    load_weights(layer, tensors(), tmp_path)
    assert torch.equal(layer.weight, tensors()["weight"])
    with pytest.raises(CheckpointError, match=r"1 weights are missing \(bias\)"):
        load_weights(layer, {"weight": layer.weight}, tmp_path)
    renamed = {"weights": layer.weight, "bias": layer.bias}
    with pytest.raises(CheckpointError, match=r"1 are not known \(weights \(expected weight\?\)\)"):
        load_weights(layer, renamed, tmp_path)
    with pytest.raises(CheckpointError, match=r"weight has the shape \[3, 2\], but \[2, 3\] was expected"):
        load_weights(layer, {"weight": layer.weight.T, "bias": layer.bias}, tmp_path)


def test_the_origin_names_id_checksum_revision_and_licence(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "w.pt")
    first = origin("owner/name", tmp_path, [tmp_path / "w.pt"], "MIT")
    assert first["revision"] == "local" and first["licence"] == "MIT"
    assert first["model"].startswith("owner/name (") and len(first["model"]) == len("owner/name ()") + 16
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pt")
    assert origin("owner/name", tmp_path, [tmp_path / "w.pt"], "MIT")["model"] != first["model"]
    snapshot = tmp_path / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    assert origin("owner/name", snapshot, [], "MIT")["revision"] == "ab" * 20


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="'owner/nothing' could not be fetched"):
        published_folder("owner/nothing", ["w.pt"])
    assert published_folder(tmp_path, ["w.pt"]) == tmp_path
