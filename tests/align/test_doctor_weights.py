"""A generator whose files, weights and configs do not belong together: a finding, never a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pixrl import api
from pixrl.device import Precision
from pixrl.doctor import estimate as doctor_work
from pixrl.doctor import needs as doctor_needs
from pixrl.doctor.diagnosis import Diagnosis, Need
from pixrl.hub import Remote
from tests import published, tiny
from tests.align.test_doctor import needs, toy

FUSE: dict[str, Any] = {"kind": "fuse", "clip": "toy:clip", "segmenter": "toy:segmenter", "device": "cpu"}
WHOLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD3 with T5."""
    return tiny.sd3(tmp_path_factory.mktemp("whole") / "sd3", card=tiny.SD3_CARD, with_t5=True)


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


def set_config(part: Path, **values: object) -> None:
    file = part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lines(found: Diagnosis) -> str:
    return "\n".join(found.lines())


def test_every_family_fits_itself(whole: Path, tmp_path: Path) -> None:
    assert api.examine(toy(model=str(whole))).can_run
    file = published.sd3(whole, tmp_path / "one.safetensors")
    assert api.examine(toy(model=f"{file}@{whole}")).can_run
    flux = tiny.flux(tmp_path / "flux")
    assert api.examine(toy(model=str(flux))).can_run
    file = published.flux(flux, tmp_path / "two.safetensors")
    assert api.examine(toy(model=f"{file}@{flux}")).can_run
    sdxl = tiny.sdxl(tmp_path / "sdxl")
    file = published.sdxl(sdxl, tmp_path / "three.safetensors")
    for model in (str(sdxl), f"{file}@{sdxl}"):
        assert api.examine(FUSE | {"model": model}).can_run
    half = tiny.sd3(tmp_path / "half", card=tiny.SD3_CARD, half=True)
    assert api.examine(toy(model=str(half))).can_run


def other_blocks(model: Path) -> None:
    set_config(model / "transformer", num_layers=3)


def other_width(model: Path) -> None:
    set_config(model / "vae", block_out_channels=[8, 8, 32])


def other_words(model: Path) -> None:
    set_config(model / "text_encoder", vocab_size=77)


def no_index(model: Path) -> None:
    part = model / "transformer"
    (part / WHOLE).rename(part / "diffusion_pytorch_model-00001-of-00001.safetensors")


def another_name(model: Path) -> None:
    (model / "vae" / WHOLE).rename(model / "vae" / "weights.safetensors")


def narrow_text(model: Path) -> None:
    """A CLIP of another width than the transformer takes, with weights that fit it."""
    other = tiny.sd3(model.parent / "other")
    for name in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(model / name)
        shutil.copytree(other / name, model / name)


def torn(model: Path) -> None:
    """A block that does not hold together: what comes out of the text's rows is not what the blocks are wide."""
    set_config(model / "transformer", caption_projection_dim=20)


def not_a_number(model: Path) -> None:
    set_config(model / "transformer", num_attention_heads="many")


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (other_blocks, "weights are missing (transformer_blocks."),
    (other_width, "another shape"),
    (other_words, "another shape"),
    (no_index, "index"),
    (another_name, "holds weights.safetensors"),
    (narrow_text, "pooled_projection_dim of the SD3Transformer2DModel"),
    (torn, "they contradict each other"),
    (not_a_number, "does not describe a SD3Transformer2DModel"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[one.__name__ for one, _ in BROKEN])
def test_a_generator_that_does_not_hold_together(
    change: Callable[[Path], None], message: str, whole: Path, tmp_path: Path
) -> None:
    model = copied(whole, tmp_path)
    change(model)
    found = api.examine(toy(model=str(model)))
    assert not found.can_run
    said = [problem.message for problem in found.problems if problem.need is Need.WEIGHTS]
    assert any(message in one for one in said), said


def test_a_single_file_of_another_model(whole: Path, tmp_path: Path) -> None:
    flux = published.flux(tiny.flux(tmp_path / "flux"), tmp_path / "flux.safetensors")
    found = api.examine(toy(model=f"{flux}@{whole}"))
    assert not found.can_run
    assert f"The weights of {flux} do not fit a SD3Transformer2DModel (transformer)" in lines(found)
    assert f"{flux}@FOLDER" in needs(found)[Need.WEIGHTS]
    longer = copied(whole, tmp_path)
    set_config(longer / "transformer", num_layers=3)
    file = published.sd3(whole, tmp_path / "sd3.safetensors")
    found = api.examine(toy(model=f"{file}@{longer}"))
    assert "joint_blocks." in lines(found)
    assert not found.can_run


def test_fusions_are_examined_alike(tmp_path: Path) -> None:
    sdxl = tiny.sdxl(tmp_path / "sdxl")
    fuse: dict[str, Any] = {
        "kind": "fuse",
        "model": str(sdxl),
        "clip": "toy:clip",
        "segmenter": "toy:segmenter",
    }
    set_config(sdxl / "unet", cross_attention_dim=24)
    found = api.examine(fuse | {"device": "cpu"})
    assert not found.can_run
    assert "both CLIPs give" in lines(found)


def test_memory_is_not_checked_before_the_configs_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_needs, "ask", lambda ref: Remote(5 * 2**30))
    found = api.examine(toy(model="owner/name@v2"))
    assert found.can_run
    assert not found.memory_checked
    assert found.to_json()["memory_checked"] is False
    assert "5.0 GiB of weights" in found.notes[0]
    assert "not known before its configs are there" in found.notes[0]
    assert "hf download owner/name --revision v2" in found.notes[0]
    assert "It can run." not in lines(found)
    assert "memory was not checked" in list(found.lines())[-1]
    assert "not checked" in next(line for line in found.lines() if line.startswith("memory"))


def test_the_least_time_does_not_depend_on_who_else_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall time in which others had the processor does not count."""
    cpu, plain = torch.device("cpu"), Precision(torch.float32, None)
    before, _ = doctor_work.lower_bound(10**9, cpu, plain)
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(doctor_work.time, "perf_counter", lambda: float(next(clock)))
    threads = torch.get_num_threads()
    held_up, _ = doctor_work.lower_bound(10**9, cpu, plain)
    assert before / 5 < held_up < 5 * before
    assert torch.get_num_threads() == threads
