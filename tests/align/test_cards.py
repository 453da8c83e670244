"""Plans for a card that is not here: their arithmetic, against what torch counts and what tensors take; their words."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from pixrl import api, cli, models
from pixrl import config as recipes
from pixrl.algorithms.optim import adamw
from pixrl.device import Precision
from pixrl.doctor import cards
from pixrl.doctor.cards import (
    ATTAINED,
    CARDS,
    RESERVED,
    CardPlans,
    Plan,
    operations,
    parse_card,
    plans_for,
    weigh,
)
from pixrl.errors import CheckpointError, InputError
from pixrl.hub import Checkpoint, locate
from pixrl.models.memory.estimate import (
    PartSize,
    PeakMeter,
    empty_pipeline,
    imagined_headers,
    part_sizes,
    sizes_of,
)
from pixrl.models.memory.plan import Base
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.runs.config import AlignConfig
from pixrl.runs.planner import trial
from tests.align.parts import GRPO, aligner, groups, recipe, scored

NEAR = 1.1
FULL = Precision(torch.float32, None)
NFT = {"loss": {"kind": "nft", "timesteps": 2, "kl": 1e-3}}
SDE = {"sampling": GRPO["sampling"], "loss": {"kind": "clipped", "kl": 0.04}, "optimizer": {"updates": 1}}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red owl\ntwo blue snails\na cat\n")
    return file


def made(model: Path, prompts: Path, machine: Mapping[str, Any] | None = None, **changes: Any) -> AlignConfig:
    found = recipe(model, prompts, **changes)
    found["machine"] |= machine or {}
    return recipes.load(AlignConfig, found)


def policy_of(folder: Path) -> FlowPipelinePolicy:
    policy = models.load(folder, device="cpu", dtype="float32", steps=4)
    assert isinstance(policy, FlowPipelinePolicy)
    policy.attach_lora(rank=4, alpha=8)
    return policy


@pytest.mark.parametrize(("changes", "checkpointing"), [(NFT, True), (SDE, False)])
def test_operations_are_those_that_torch_counts(
    sd3_folder: Path, prompts: Path, changes: Mapping[str, Any], checkpointing: bool
) -> None:
    """A step of two groups of three pictures, drawn, decoded and learned from, on the real weights."""
    config = made(sd3_folder, prompts, {"gradient_checkpointing": checkpointing}, **changes)
    step, evaluation = operations(config, weigh(config, Checkpoint(sd3_folder), FULL))
    policy = policy_of(sd3_folder)
    if checkpointing:
        policy.checkpoint_gradients()
    training = aligner(policy, config.loss, config.sampling)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rollouts = training.collect(groups(2), 0)
        drawn = counter.get_total_flops()
        training.update(rollouts, scored(torch.arange(6.0)), {"r": 1.0})
    assert step / NEAR <= counter.get_total_flops() <= step * NEAR
    assert evaluation * 6 / 4 / NEAR <= drawn <= evaluation * 6 / 4 * NEAR  # four pictures, and as many steps


def test_memory_is_the_sum_of_the_tensors(
    sd3_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "WAYS", ())
    config = made(sd3_folder, prompts, {"rollout_batch": 3, "train_batch": 2})
    plan = plans_for(config, CARDS["4090"]).plans[0]
    policy = policy_of(sd3_folder)
    assert policy.lora is not None
    weights = sum(
        x.nbytes
        for part in policy.pipeline.components.values() if isinstance(part, torch.nn.Module)
        for name, x in part.state_dict().items() if "lora_" not in name
    )  # fmt: skip
    trained = policy.lora.parameters()
    optimizer = adamw(trained, lr=1e-3)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    slots = sum(x.nbytes for x in policy.lora.all_parameters())
    resident = weights + slots + 2 * sum(x.nbytes for x in trained) + moments
    peaks = []
    row = policy.encode(["a red owl"])
    for count, train in ((3, False), (2, True)):
        with PeakMeter() as meter:
            trial(policy, row, train=train, decode=not train)(count)
        peaks.append(meter.peak)
    assert plan.changes == ()
    assert (resident + max(peaks)) / NEAR <= plan.peak <= (resident + max(peaks)) * NEAR
    assert (plan.rollout_batch, plan.train_batch) == (3, 2)


@pytest.mark.parametrize("base", list(Base))
def test_sizes_from_configs_are_those_of_the_weights(sd3_folder: Path, base: Base) -> None:
    """For every part, without its weights."""
    half = Precision(torch.bfloat16, None)
    for ref in (sd3_folder, "toy:flux"):
        checkpoint = locate(ref)
        kind = models.adapter_of(checkpoint).pipeline_class
        assert kind is not None
        pipeline = empty_pipeline(kind, checkpoint.folder, half)
        found = sizes_of(imagined_headers(checkpoint, pipeline, t5=True), checkpoint, half, base)
        assert found == part_sizes(checkpoint, half, base=base)


def test_no_weights_are_needed_and_the_plans_are_in_order(
    sd3_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe, then the same results with ever less memory, then other bases, then the slow plan."""
    bare = tmp_path / "bare"
    shutil.copytree(sd3_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    config = made(
        bare,
        prompts,
        {"dtype": "auto", "device": "auto"},
        lora={"rank": 4, "alpha": 8, "targets": ["ff.net.2"]},
    )
    found = plans_for(config, CARDS["4090"])
    parts, gc = "machine.offload=parts", "machine.gradient_checkpointing=true"
    assert [plan.changes for plan in found.plans] == [
        (),
        (parts,),
        (gc,),
        (gc, parts),
        (gc, parts, "machine.base=int8"),
        (gc, parts, "machine.base=nf4"),
        (gc, "machine.offload=sequential"),
    ]
    as_is, offloaded, again, both, int8, nf4, slow = found.plans
    assert as_is.peak > offloaded.peak
    assert both.peak > max(int8.peak, nf4.peak)
    assert as_is.peak >= again.peak > both.peak > slow.peak
    assert as_is.seconds < again.seconds < both.seconds < slow.seconds
    assert found.chosen is as_is
    assert found.faster is None
    assert found.dtype == "bfloat16"
    two = plans_for(config, CARDS["4090"], 2)
    assert two.plans[0].seconds == pytest.approx(as_is.seconds / 2)
    fast = plans_for(config, CARDS["h100"])
    assert fast.plans[0].seconds == pytest.approx(as_is.seconds * CARDS["4090"].half / CARDS["h100"].half)
    step, evaluation = operations(
        config, weigh(config, Checkpoint(bare), Precision(torch.bfloat16, torch.bfloat16))
    )
    assert as_is.seconds == pytest.approx(step / (ATTAINED * 165.2e12))
    assert as_is.hours * 3600 == pytest.approx(3 * as_is.seconds + 2 * evaluation / (ATTAINED * 165.2e12))
    monkeypatch.setattr(cards, "WAYS", cards.WAYS[:1])
    full = plans_for(
        made(bare, prompts, lora={"rank": 4, "alpha": 8, "targets": ["ff.net.2"]}), CARDS["4090"]
    ).plans
    assert full[0].seconds == pytest.approx(as_is.seconds * 2)  # float32, at half the rate
    assert full[1].changes == ("machine.dtype=bfloat16",)


def report(*plans: Plan, gib: float = 24, processes: int = 1) -> CardPlans:
    card = replace(CARDS["4090"], gib=gib)
    found = cards.Trained(10**6, 12 * 10**6, 12 * 10**6, 4 * 10**6, 8 * 10**6, "LoRA, 3 slots")
    return CardPlans(
        "align",
        "some/model",
        card,
        processes,
        "bfloat16",
        {"vae": PartSize(10, 20)},
        found,
        plans,
        ("A note.",),
    )


def plan(peak: float, gib: float, seconds: float, *changes: str) -> Plan:
    return Plan(changes, int(peak * 2**30), peak <= gib - 1, False, 4, 2, seconds, seconds)


def test_the_words_say_what_to_type() -> None:
    base = "machine.base=nf4"
    as_is = report(plan(9, 24, 5))
    assert list(as_is.lines("mine.yaml"))[-1] == "It fits. Type: pixrl align mine.yaml"
    changed = report(plan(30, 24, 5), plan(20, 24, 7, base), processes=2)
    *_, last = changed.lines("mine.yaml")
    assert last == f"It fits so. Type: pixrl align mine.yaml --processes 2 --set {base}"
    faster = report(plan(9, 24, 5, "machine.offload=parts"), plan(20, 24, 3))
    assert list(faster.lines("m"))[-1] == "Faster, 3 s a step: pixrl align m"
    none = report(plan(30, 24, 5), plan(40.2, 24, 5, base), plan(30.2, 24, 5, base), gib=24)
    *_, last = none.lines("mine.yaml")
    assert last.startswith("No plan fits 24 GiB. The smallest needs a card of 31 GiB (5090, a100-40, l40s,")
    assert last.endswith("pixrl align mine.yaml; or take a smaller resolution or model.")
    assert none.chosen is None
    table = [line for line in none.lines("m") if "as the recipe says" in line or base in line]
    assert [line.split()[0] for line in table] == ["-", "-", "-"]


def test_cards_are_named_or_sized() -> None:
    assert parse_card("H100").half == 989e12
    sized = parse_card("24")
    assert (sized.gib, sized.half) == (24, CARDS["3090"].half)
    assert "as fast as a 3090" in sized.source
    assert sized.free == 23 * 2**30 == 24 * 2**30 - RESERVED
    assert parse_card("25").half == CARDS["5090"].half
    assert parse_card("500").half == CARDS["h200"].half
    with pytest.raises(InputError, match=r"no card '4900' in the table|a card has 1 to 1024 GiB"):
        parse_card("4900")
    with pytest.raises(
        InputError, match=r"no card 'a100-08'.*Did you mean 'a100-80'\?.*a size in GiB: --gpu 24"
    ):
        parse_card("a100-08")
    for size in ("0", "-3", "nan", "inf"):
        with pytest.raises(InputError, match=r"a card has 1 to 1024 GiB. Type, for example: --gpu 24"):
            parse_card(size)


def test_the_command_line(
    sd3_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "WAYS", ())
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"kind": "align", **recipe(sd3_folder, prompts)}))
    (tmp_path / "mine.yaml").write_text(file.read_text())
    mine = str(tmp_path / "mine.yaml")
    result = CliRunner().invoke(cli.app, ["doctor", mine, "--gpu", "4090", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["fits"]
    assert found["card"]["half"] == 165.2e12
    assert found["chosen"] == found["plans"][0]
    with pytest.raises(CheckpointError, match="does not exist"):
        api.plan_card({**recipe(tmp_path / "nowhere", prompts)}, "24")
