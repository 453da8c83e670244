"""Every entry of the tables keeps its interface's promises, on a tiny checkpoint of the real classes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pixrl import models, rewards
from pixrl.conformance import check_policy, check_renderer, check_reward
from pixrl.models.base import FlowPolicy
from pixrl.types import RewardBatch
from tests import tiny


def make_sd3(folder: Path) -> Path:
    return tiny.sd3(folder, card=tiny.SD3_CARD)


RENDERERS: dict[str, Callable[[Path], Path]] = {"sd3": make_sd3, "sdxl": tiny.sdxl, "flux": tiny.flux}


def test_every_renderer_of_the_table_is_checked() -> None:
    assert RENDERERS.keys() == models.RENDERERS.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", RENDERERS)
def test_renderer(kind: str, dtype: str, tmp_path: Path) -> None:
    renderer = models.load(RENDERERS[kind](tmp_path), device="cpu", dtype=dtype)
    check = check_policy if isinstance(renderer, FlowPolicy) else check_renderer
    check(renderer)
