"""Weights divided among processes change nothing: the same pictures, checkpoints, resumes; else it is refused."""

import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixrl import api, models
from pixrl.algorithms.world import Team
from pixrl.data.pictures import read_picture
from pixrl.doctor import estimate as doctor
from pixrl.doctor.diagnosis import Diagnosis, Need
from pixrl.errors import ConfigError, InputError
from pixrl.models.memory.estimate import Cost
from pixrl.models.memory.sharding import require_blocks, sharded_bytes, transformer_blocks
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.sd3 import SD3Policy
from pixrl.runs.config import AlignConfig
from pixrl.runs.folder import RunFolder
from pixrl.runs.planner import kept_bytes, require_equal_shares
from pixrl.runs.reading import START
from tests.align.launching import Launch
from tests.align.parts import (
    CLIPPED,
    GRPO,
    aligner,
    groups,
    recipe,
    same,
    scored,
    weights_of,
    with_reward,
)
from tests.align.test_processes import EPS, assert_trained_alike

T = TypeVar("T")
FULL, NONE = ("--set", "machine.shard=full"), ("--set", "machine.shard=none")
DIVIDED = "divide the denoiser's weights among them"


def write_recipe(folder: Path, settings: dict[str, Any]) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"kind": "align", **settings}))
    return str(file)


def is_divided(run: Path) -> bool:
    return any(DIVIDED in note for note in json.loads((run / START).read_text())["notes"])


@pytest.mark.slow
def test_sharded_is_trained_as_whole(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch
) -> None:
    """Although the first process has nothing to train, since its pictures fail, and the second one's rows are split.

    Not bit for bit on every processor: gathered weights lie at other addresses, and MKL without AVX rounds by those.
    """
    settings = recipe(sd3_folder, prompt_file, **(GRPO | with_reward("fails_on_the_first_process")))
    settings["optimizer"] |= {"eps": EPS}
    settings["machine"] |= {"train_batch": 1}
    file = write_recipe(tmp_path, settings)
    full, none = tmp_path / "full", tmp_path / "none"
    assert launch(2, "align", file, "--out", str(full), *FULL) == [0, 0]
    assert launch(2, "align", file, "--out", str(none), *NONE) == [0, 0]
    assert is_divided(full) and not is_divided(none)
    assert_trained_alike(full, none)
    rows = [RunFolder.open(run).manifest() for run in (full, none)]
    assert len(rows[0]) == len(rows[1]) == 18
    for one, other in zip(*rows, strict=True):
        assert (one.seed, one.prompt, one.failed) == (other.seed, other.prompt, other.failed)
        if one.step == 0:  # drawn with the same weights: a level of 8 bits is far above rounding
            pictures = [read_picture(run / str(row.file)) for run, row in ((full, one), (none, other))]
            levels = [np.asarray(picture, dtype=np.int16) for picture in pictures]
            assert np.abs(levels[0] - levels[1]).max() <= 1


@pytest.mark.slow
def test_a_run_goes_on_with_shards_and_without(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch
) -> None:
    """Two processes with shards, one without, two with shards, and two that fit: they end as one that did all of it."""
    settings = recipe(sd3_folder, prompt_file, optimizer={"lr": 1e-3, "eps": EPS})
    settings["machine"] |= {"gradient_checkpointing": True}
    file = write_recipe(tmp_path, settings)
    mixed, whole = tmp_path / "mixed", tmp_path / "whole"
    assert launch(2, "align", file, "--out", str(mixed), "--steps", "1", *FULL) == [0, 0]
    assert is_divided(mixed)
    assert launch(1, "resume", str(mixed), "--set", "steps=2", *NONE) == [0]
    assert not is_divided(mixed)
    assert launch(2, "resume", str(mixed), "--set", "steps=3", *FULL) == [0, 0]
    assert is_divided(mixed)
    assert launch(2, "resume", str(mixed), "--set", "steps=4", "--set", "machine.shard=auto") == [0, 0]
    assert not is_divided(mixed)
    assert launch(1, "align", file, "--out", str(whole), "--steps", "4") == [0]
    assert_trained_alike(mixed, whole)


def test_each_process_holds_its_part_and_one_block(sd3_folder: Path, launch: Launch) -> None:
    assert launch(2, str(sd3_folder), act=_hold) == [0, 0]


def _hold(folder: str) -> None:
    policy = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(policy, FlowPipelinePolicy)
    bytes_of = {id(block): _bytes(block) for block in transformer_blocks(policy.denoiser)}
    total = _bytes(policy.denoiser)
    rest = total - sum(bytes_of.values())
    most = sharded_bytes(policy.denoiser, 2)
    slots = policy.attach_lora(rank=4, alpha=8)
    condition = policy.encode(["a cat"])
    kept = kept_bytes(policy, condition)
    policy.shard(Team("cpu").mesh())
    assert kept_bytes(policy, condition) == kept > 0
    lora = {id(x) for x in slots.all_parameters()}
    seen: list[int] = []

    def look(block: nn.Module, *of_call: object) -> None:
        frozen = [x for x in policy.denoiser.parameters() if id(x) not in lora]
        gathered = sum(x.nbytes for x in frozen if not isinstance(x, DTensor))
        assert gathered == rest + bytes_of[id(block)]
        parts = sum(x.to_local().nbytes for x in frozen if isinstance(x, DTensor))
        seen.append(parts + gathered + gathered // 2)

    for block in transformer_blocks(policy.denoiser):
        block.register_forward_pre_hook(look)
    x = policy.initial_noise([1])
    velocity = policy.velocity(x, x.new_full((1,), 0.5), condition)
    velocity.square().mean().backward()
    assert len(seen) == len(bytes_of) and max(seen) <= most < 2 * max(seen)
    assert all(not isinstance(x, DTensor) and x.grad is not None for x in slots.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in module.parameters())


class Others:
    """A world of two, whose other process has more rows to train and adds nothing."""

    rank, size = 0, 2

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: T) -> list[T]:
        return [value, value + 2] if type(value) is int else [value]  # type: ignore[list-item]


@pytest.mark.parametrize("failed", [False, True], ids=["a row to spare", "no row of its own"])
def test_passes_to_keep_in_step_count_for_nothing(policy: SD3Policy, failed: bool) -> None:
    start = weights_of(policy)
    scores = [float("nan")] * 3 if failed else [1.0, 0.0, 0.3]
    ends, passes = [], []
    for in_step in (False, True):
        assert policy.lora is not None
        policy.lora.load_state(start)
        policy.in_step = in_step
        found = aligner(policy, CLIPPED)
        found.world = Others()
        rollouts = found.collect(groups(1), 0)
        count: list[bool] = []
        handle = policy.denoiser.register_forward_hook(lambda *of_call, count=count: count.append(True))
        found.update(rollouts, scored(scores), {"r": 1.0})
        handle.remove()
        ends.append(weights_of(policy))
        passes.append(len(count))
    assert same(*ends)
    parts = len(rollouts.transitions)
    assert passes[1] - passes[0] == (0 if failed else 2 * parts)


def examined(processes: int, **machine: Any) -> Diagnosis:
    rewards = [{"name": "clip_text", "options": {"model": "toy:clip"}}]
    place = {"device": "cpu", "dtype": "float32", **machine}
    settings = {"kind": "align", "model": "toy:sd3", "rewards": rewards, "machine": place}
    return api.examine(settings, processes=processes)


@pytest.fixture
def weighed_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes what it takes whatever the processes: these tests are of the weights."""
    monkeypatch.setattr(doctor.Estimate, "costs", lambda *given: (Cost(1000, 1000), Cost(3000, 3000)))
    monkeypatch.setattr(doctor, "operations_of", lambda program: 0)


@pytest.mark.usefixtures("weighed_quickly")
def test_sharded_where_the_model_does_not_fit_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight processes; `auto` takes shards only where whole weights are too many, and the estimate is their peak."""
    whole = examined(8, shard="none")
    full = examined(8, shard="full")
    assert whole.needed is not None and full.needed is not None
    assert (whole.sharded, full.sharded) == (False, True) and full.needed < whole.needed
    saved = whole.parts["transformer"].bytes - sharded_bytes(load("toy:sd3").denoiser, 8)
    assert whole.trained is not None and whole.trained.folded > 0
    assert whole.needed - full.needed == saved + whole.trained.folded
    for room, processes, sharded, fits in (
        (whole.needed, 8, False, True),
        (whole.needed - 1, 8, True, True),
        (full.needed, 8, True, True),
        (full.needed - 1, 8, True, False),
        (whole.needed - 1, 1, False, False),
    ):
        monkeypatch.setattr(doctor, "free_bytes", lambda device, room=room * processes: room)
        found = examined(processes)
        assert (found.sharded, Need.MEMORY not in {one.need for one in found.problems}) == (sharded, fits)
        assert any("machine.shard" in note for note in found.notes) == (sharded and fits)


def load(ref: str) -> FlowPipelinePolicy:
    policy = models.load(ref, device="cpu", dtype="float32")
    assert isinstance(policy, FlowPipelinePolicy)
    return policy


def test_the_bytes_of_a_part_by_hand() -> None:
    """Blocks of 100, 64 and 36 numbers and 5 outside: half of 205, the 5, and the two largest blocks."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(side, side, bias=False) for side in (8, 10, 6))
    model.out = nn.Linear(5, 1, bias=False)
    assert sharded_bytes(model, 2) == 4 * 103 - 2 + 4 * (5 + 100 + 64)
    assert sharded_bytes(model.bfloat16(), 5) == 2 * (41 + 5 + 100 + 64)
    model.blocks.append(nn.ModuleDict({"lora_A": nn.Linear(50, 50)}))
    assert sharded_bytes(model, 5) == 2 * (41 + 5 + 100 + 64)


@pytest.mark.parametrize(
    ("processes", "per_step", "shown", "held_out", "message"),
    [
        (1, 4, 4, 9, r"here is one\. Start several \(add --processes 2.*--set machine.shard=none"),
        (2, 5, 4, 9, r"prompts.per_step: 5 prompts .* to 2 processes.*--set prompts.per_step=4$"),
        (4, 3, 4, 9, r"prompts.per_step: 3 .*--set prompts.per_step=4$"),
        (2, 4, 7, 9, r"evaluation.prompts: 7 prompts .*--set evaluation.prompts=6$"),
        (2, 4, 24, 9, r"evaluation.prompts: 9 prompts .*--set evaluation.prompts=8$"),
        (4, 4, 24, 3, r"evaluation.prompts: 3 prompts .*Give an evaluation.source of 4 or more$"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    processes: int, per_step: int, shown: int, held_out: int, message: str
) -> None:
    rewards = {"rewards": [{"name": "clip_text"}]}
    given = {"prompts": {"per_step": per_step}, "evaluation": {"prompts": shown}}
    with pytest.raises(InputError, match=message):
        require_equal_shares(AlignConfig.model_validate(given | rewards), processes, held_out)
    even = {"prompts": {"per_step": 4 * processes}, "evaluation": {"prompts": 2 * processes}}
    require_equal_shares(AlignConfig.model_validate(even | rewards), 2 * processes, 100)


@pytest.mark.usefixtures("weighed_quickly")
def test_the_doctor_says_so_before_anything_loads() -> None:
    said = {one.need: one.message for one in examined(3, shard="full").problems}
    assert "prompts.per_step: 8 prompts cannot be shared out evenly to 3 processes" in said[Need.SETTING]
    said = {one.need: one.message for one in examined(1, shard="full").problems}
    assert "here is one" in said[Need.SETTING]


def test_models_without_blocks_quantized_weights_and_streamed_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no list of blocks.*machine.shard=none"):
        require_blocks(nn.Linear(2, 2))
    quantized = nn.Module()
    quantized.blocks = nn.ModuleList([nn.Linear(2, 2)])
    assert len(require_blocks(quantized)) == 1
    packed = torch.zeros(2, dtype=torch.uint8)
    quantized.blocks[0].weight = nn.Parameter(packed, requires_grad=False)  # type: ignore[union-attr]
    with pytest.raises(
        ConfigError, match=r"1 quantized weights, first blocks.0.weight, .*machine.shard=none"
    ):
        require_blocks(quantized)
    streamed = {"offload": "sequential", "gradient_checkpointing": True, "shard": "full"}
    with pytest.raises(ConfigError, match=r"machine.shard=full: .*take machine.offload=parts"):
        examined(2, **streamed)
