"""Tiny checkpoints, made once a session."""

from pathlib import Path

import pytest
from tests import tiny

from pixrl import models
from pixrl.models.sd3 import SD3Policy
from pixrl.models.sdxl import SDXLPolicy


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd3(tmp_path_factory.mktemp("tiny") / "sd3", card=tiny.SD3_CARD)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture
def sd3(sd3_folder: Path) -> SD3Policy:
    policy = models.load(sd3_folder, device="cpu", dtype="float32")
    assert isinstance(policy, SD3Policy)
    return policy


@pytest.fixture
def sdxl(sdxl_folder: Path) -> SDXLPolicy:
    renderer = models.load(sdxl_folder, device="cpu", dtype="float32")
    assert isinstance(renderer, SDXLPolicy)
    return renderer
