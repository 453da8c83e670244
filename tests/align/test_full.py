"""`train: full`: all weights are trained. Copies, masters, shards, checkpoints, exports; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pixrl
from pixrl import models
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import Slot
from tests.align.launching import Launch
from tests.align.parts import GRPO, final, recipe, with_reward
from tests.align.test_processes import EPS, assert_trained_alike, trained
from tests.align.test_sharding import FULL, NONE, is_divided, write_recipe


def full(made: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name != "lora"} | {"train": "full"}


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, GRPO], ids=["nft", "grpo"])
def test_sharded_is_trained_as_whole(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch, method: dict[str, Any]
) -> None:
    settings = full(recipe(sd3_folder, prompt_file, **(method | with_reward("fails_on_the_first_process"))))
    settings["optimizer"] |= {"eps": EPS}
    settings["machine"] |= {"train_batch": 1}
    file = write_recipe(tmp_path, settings)
    sharded, none, alone = (tmp_path / name for name in ("full", "none", "alone"))
    assert launch(2, "align", file, "--out", str(sharded), *FULL) == [0, 0]
    assert launch(2, "align", file, "--out", str(none), *NONE) == [0, 0]
    assert is_divided(sharded) and not is_divided(none)
    a, b = trained(sharded), trained(none)
    assert a.keys() == b.keys()
    for k in a:
        d = (a[k].float()-b[k].float()).abs().max().item()
        if d > 1e-6: print(k, d, a[k].abs().max())
    assert 0
