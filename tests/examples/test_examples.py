"""The examples are what they say: short, of public parts alone, and equal to what the commands do."""

import ast
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import pixrl
from examples import customized_grpo_loop, e2po_loop, fuse_loop
from pixrl import models
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.slots import LoraSlots
from tests.tolerance import agree_after_adam, rounding

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples").glob("*.py"))
TERMS = 2**14
"""More than any sum on the way to a gradient has: tokens times columns of the toy models."""
E2PO: dict[str, Any] = {
    "model": "toy:sd3",
    "prompts": {"source": "toy:geneval"},
    "rewards": [
        {"name": "geneval", "options": {"segmenter": "toy:segmenter", "clip": "toy:clip", "graded": True}}
    ],
    "exploration": {
        "kind": "perturbed", "noises": 2, "variants": 4, "encoders": "both", "target": 0.6, "margin": 0.03,
        "weighted": "anchor", "norm": "relative", "max_norm": 1.0, "steps": 100, "lr": 4e-3, "prompts_at_once": 4,
    },
    "sampling": {"steps": 8},
    "advantage": {"scale": "global", "skip_flat": True},
    "loss": {
        "kind": "nft", "beta": 1.0, "kl": 0.0, "timesteps": 2, "levels": [0, 4], "old_policy": "constant",
        "old_decay": 0.3,
    },
}  # fmt: skip
CUSTOMIZED: dict[str, Any] = {
    "model": "toy:flux",
    "prompts": {"source": "toy:subjects"},
    "rewards": [
        {
            "name": "identity", "kind": "dino_seg",
            "options": {"model": "toy:identity", "segmenter": "toy:segmenter", "mask": "both", "references": "all"},
        },
        {"name": "preference", "options": {"model": "toy:preference"}},
    ],
    "exploration": {"kind": "noise", "noises": 4},
    "sampling": {"steps": 8, "noise": "flow_sde"},
    "advantage": {
        "scale": "group", "clamp": 5.0, "synergy": {"kind": "tanh", "alpha": 0.5},
        "time": {"identity": ["identity"], "w_max": 0.7, "w_min": 0.3, "start": 6, "end": 22},
    },
    "loss": {"kind": "clipped"},
}  # fmt: skip
COMMON: dict[str, Any] = {
    "steps": 1,
    "seed": 0,
    "optimizer": {"lr": 2e-3},
    "lora": {"rank": 16, "alpha": 32},
    "evaluation": {"prompts": 1, "per_prompt": 1},
    "machine": {"dtype": "float32", "device": "cpu"},
}


def recipe(method: dict[str, Any]) -> dict[str, Any]:
    return {**COMMON, **method, "prompts": {**method["prompts"], "per_step": 4}}


def current(slots: LoraSlots) -> dict[str, Tensor]:
    return {name: x for name, x in slots.state().items() if name.startswith("current/")}


@pytest.mark.parametrize(
    ("example", "job", "method", "names"),
    [
        (e2po_loop, pixrl.align, E2PO, ["geneval"]),
        (customized_grpo_loop, pixrl.personalize, CUSTOMIZED, ["identity", "preference"]),
    ],
    ids=["e2po", "customized"],
)
def test_the_first_update_is_that_of_the_command(
    example: Any, job: Any, method: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    policy = models.load(method["model"], device="cpu", dtype="float32")
    assert isinstance(policy, FlowPipelinePolicy)
    start = current(policy.attach_lora(rank=16, alpha=32, seed=0))
    training = example.train()
    slots, mean = next(training)
    first = current(slots)
    done = job(recipe(method), out=tmp_path / "run")
    saved = safetensors.torch.load_file(
        next((tmp_path / "run").glob("checkpoints/step-000001/*.safetensors"))
    )
    assert agree_after_adam(first, {name: saved[f"slots/{name}"] for name in first}, start, TERMS)
    reward = sum(done.metrics[0][f"reward/{name}/mean"] for name in names)
    assert abs(mean - reward) <= rounding(torch.float32, TERMS, scale=abs(reward))
    slots, mean = next(training)
    assert mean == mean, "the second step scores pictures too"
    assert any(not torch.equal(x, first[name]) for name, x in current(slots).items())


def test_a_fusion_draws_and_scores_what_the_command_does(tmp_path: Path) -> None:
    images_BCHW, rewards_B = fuse_loop.fuse(["owl", "snail"], budget=32)
    same = {"mixing": "columns", "pool": 0, "noise": "image", "device": "cpu"}
    done = pixrl.fuse(["owl", "snail"], budget=32, out=tmp_path / "run", **same)
    theirs_B = torch.tensor([scores["reward"] for scores in done.scores])
    assert images_BCHW.shape == (32, 3, 128, 128)
    # the balance multiplies the similarities' rounding by alpha; the second batch follows from the first one's update
    within = rounding(torch.float32, TERMS, scale=fuse_loop.ALPHA)
    assert (rewards_B - theirs_B).abs().max() <= 10 * within, (rewards_B - theirs_B).abs().max()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_example_is_short_and_of_public_parts(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (300 if file.name == "e2po_loop.py" else 129)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").rpartition(".")[2].startswith("_")
            assert not any(alias.name.startswith("_") for alias in node.names)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), f"{file.name}:{node.lineno} uses {node.attr}"
