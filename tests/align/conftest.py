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


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red owl\ntwo blue snails\na cat\na green house\na fish\n")
    return file
