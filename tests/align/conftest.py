"""A tiny random SD3 with LoRA slots."""

from pathlib import Path

import pytest

from pixrl import models
from pixrl.models.sd3 import SD3Policy
from tests import tiny


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd3(tmp_path_factory.mktemp("tiny") / "sd3", card=tiny.SD3_CARD)


@pytest.fixture
def policy(sd3_folder: Path) -> SD3Policy:
    found = models.load(sd3_folder, device="cpu", dtype="float32")
    assert isinstance(found, SD3Policy)
    found.attach_lora(rank=4, alpha=8)
    return found
