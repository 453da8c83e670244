"""A compiled transformer draws and learns, and ends as one that is not compiled."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPModel

from pixrl import config, models
from pixrl.errors import ConfigError
from pixrl.models.memory.sharding import VARIANTS, compile_blocks
from pixrl.models.sd3 import SD3Policy
from pixrl.runs.config import AlignConfig
from pixrl.runs.loaded import load_run
from tests import tiny
from tests.align.parts import CLIPPED, aligner, groups, recipe, scored, weights_of
from tests.tolerance import GRADIENT, agree_after_adam

BACKEND = "pixrl_counting"


@pytest.fixture
def calls() -> Iterator[list[bool]]:
    """Whether gradients were on, for every call of a compiled block; the backend runs what it captured."""
    found: list[bool] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*given: torch.Tensor) -> Any:
            found.append(torch.is_grad_enabled())
            return graph.forward(*given)

        return run

    torch._dynamo.register_backend(counting, name=BACKEND)
    before = (torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit)
    yield found
    torch._dynamo.reset()
    torch._dynamo.backends.registry._COMPILER_FNS.pop(BACKEND)
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = before


def load(folder: Path) -> SD3Policy:
    policy = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(policy, SD3Policy)
    policy.attach_lora(rank=4, alpha=8)
    return policy


def test_rollouts_and_updates_go_through_the_compiled_blocks(sd3_folder: Path, calls: list[bool]) -> None:
    ends = []
    for compiled in (False, True):
        policy = load(sd3_folder)
        start = weights_of(policy)
        if compiled:
            assert compile_blocks(policy.denoiser, BACKEND) == 2
        found = aligner(policy, CLIPPED, noises=4)
        rollouts = found.collect(groups(1), 0)
        drawn = calls.count(False)
        assert drawn == (2 * 4 if compiled else 0)  # two blocks, four steps
        found.update(rollouts, scored([0.1, 0.9, 0.4, 0.2]), {"r": 1.0})
        assert (calls.count(True) > 0) is compiled
        ends.append(weights_of(policy))
    assert agree_after_adam(*ends, start, GRADIENT)


def test_the_option_compiles(sd3_folder: Path, prompt_file: Path, calls: list[bool]) -> None:
    for backend in (None, BACKEND):
        machine = {"device": "cpu", "dtype": "float32", "compile": backend}
        settings = config.load(AlignConfig, recipe(sd3_folder, prompt_file, machine=machine))
        blocks = load_run(settings).policy.denoiser.transformer_blocks
        assert isinstance(blocks, nn.ModuleList)
        assert [block._compiled_call_impl is not None for block in blocks] == [backend is not None] * 2
    assert torch._dynamo.config.recompile_limit == VARIANTS
    assert torch._dynamo.config.fail_on_recompile_limit_hit


def test_what_cannot_be_compiled(sd3_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no backend 'inducter' here\. Did you mean 'inductor'"):
        compile_blocks(nn.Module(), "inducter")
    with pytest.raises(ConfigError, match="CLIPModel has no list of blocks"):
        compile_blocks(CLIPModel.from_pretrained(tiny.clip(tmp_path)), "inductor")
    machine = {"compile": "inductor", "offload": "sequential", "gradient_checkpointing": True}
    with pytest.raises(ConfigError, match="layers whose weights come and go cannot be compiled"):
        config.load(AlignConfig, recipe(sd3_folder, prompt_file, machine=machine))
