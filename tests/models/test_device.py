"""Where a model runs and in which precision; the image decoder never runs in float16."""

from pathlib import Path

import pytest
import torch
from tests.tolerance import STORES, agree_in_norm

from pixrl import device, models
from pixrl.device import DType, Precision, choose_device, choose_precision
from pixrl.errors import InputError
from pixrl.models.latents import decode_latents
from pixrl.models.pipeline import micro_batch_for
from pixrl.models.sd3 import SD3Policy

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FULL, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("where", "dtype", "expected"),
    [
        (CPU, "float32", Precision(FULL, None)),
        (CPU, "bfloat16", Precision(FULL, BF16)),
        (GPU, "float32", Precision(FULL, None)),
        (GPU, "bfloat16", Precision(BF16, BF16)),
        (GPU, "float16", Precision(F16, F16)),
        (GPU, "auto", Precision(BF16, BF16)),
    ],
)
def test_precision(where: torch.device, dtype: str, expected: Precision) -> None:
    assert choose_precision(where, dtype) == expected


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: True)
    assert choose_precision(CPU, "auto") == Precision(FULL, BF16)
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: False)
    assert choose_precision(CPU, "auto") == Precision(FULL, None)
    assert choose_precision(GPU, "auto", on_gpu=DType.FLOAT16) == Precision(F16, F16)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(InputError, match="no CUDA GPU"):
        choose_device("cuda")


def test_micro_batches_shrink_with_the_picture() -> None:
    assert micro_batch_for(CPU, 64, 64) == 32
    assert micro_batch_for(CPU, 512, 512) == 1
    assert micro_batch_for(GPU, 512, 512) == 64
    assert micro_batch_for(GPU, 1024, 1024) == 16
    assert micro_batch_for(GPU, 16384, 16384) == 1


def test_within_float16_autocast_the_decoder_runs_in_bfloat16(sd3: SD3Policy) -> None:
    latents = sd3.initial_noise([1])
    with torch.no_grad():
        with torch.autocast("cpu", dtype=F16):
            narrow = decode_latents(sd3.vae, latents)
        with torch.autocast("cpu", dtype=BF16):
            wide = decode_latents(sd3.vae, latents)
        full = decode_latents(sd3.vae, latents)
    assert torch.equal(narrow, wide)
    assert not torch.equal(narrow, full)
    assert agree_in_norm(narrow, full, STORES, dtype=BF16)


def test_loading_is_quiet(sd3_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import transformers.utils.logging as logging

    before = logging.get_verbosity()
    models.load(sd3_folder)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert logging.get_verbosity() == before
