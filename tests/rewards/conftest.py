"""Tiny checkpoints, made once a session."""

from pathlib import Path

import pytest
import torch
from tests import tiny
from torch import Tensor

from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.segmentation import Segmenter


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="session")
def segmenter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.segmenter(tmp_path_factory.mktemp("tiny") / "segmenter")


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> ClipSimilarity:
    return ClipSimilarity(clip_folder, device="cpu")


@pytest.fixture(scope="session")
def segmenter(segmenter_folder: Path) -> Segmenter:
    return Segmenter(segmenter_folder, device="cpu")


@pytest.fixture
def images() -> Tensor:
    """Five pictures with some structure, 32 x 32."""
    coarse = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
