"""What the tests of align share: groups, methods, scores."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixrl.algorithms import make_loss
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.e2po import PerturbationSettings, PerturbedEmbeddings
from pixrl.algorithms.exploration import Exploration, Group, NoiseOnly
from pixrl.algorithms.grpo import GRPOSettings
from pixrl.algorithms.loss import LossSettings
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.algorithms.trainer import Aligner, Method, MicroBatches, OptimizerSettings
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.runs import checkpoint
from pixrl.types import Scores

JUDGE = Path(__file__).with_name("judge.py")
PROMPTS = ("a red owl", "two blue snails", "a cat")


def groups(count: int = 2, epoch: int = 0) -> list[Group]:
    return [Group(place, epoch, place, PROMPTS[place]) for place in range(count)]


def perturbed(variants: int = 2) -> PerturbedEmbeddings:
    return PerturbedEmbeddings(PerturbationSettings(variants=variants, steps=3))


CLIPPED = GRPOSettings(clip=0.01)
NFT = NFTSettings(timesteps=3)
SDE = RolloutSettings(steps=4, noise="flow_sde")
ODE = RolloutSettings(steps=4, solver="dpm")


def aligner(
    policy: FlowPipelinePolicy,
    loss: LossSettings = CLIPPED,
    sampling: RolloutSettings = SDE,
    *,
    exploration: Exploration | None = None,
    advantage: AdvantageSettings | None = None,
    micro: tuple[int, int] = (4, 4),
    noises: int = 3,
    seed: int = 0,
    **optimizer: Any,
) -> Aligner:
    assert policy.lora is not None
    method = Method(
        exploration or NoiseOnly(),
        sampling,
        GroupAdvantage(advantage or AdvantageSettings()),
        make_loss(loss),
        OptimizerSettings(**{"lr": 1e-3, **optimizer}),
        noises,
    )
    return Aligner(policy, policy.lora, method, MicroBatches(*micro), seed=seed)


def scored(values: Tensor | Sequence[float], name: str = "r") -> dict[str, Scores]:
    values_B = torch.as_tensor(values, dtype=torch.float32)
    reasons = tuple("broken" if value != value else None for value in values_B.tolist())
    return {name: Scores(values_B, reasons, provenance={"model": "test"})}


def weights_of(policy: FlowPipelinePolicy) -> dict[str, Tensor]:
    assert policy.lora is not None
    return policy.lora.state()


def same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=0, atol=atol) for name in one
    )


def recipe(model: Path, prompt_file: Path, **changes: Any) -> dict[str, Any]:
    """A run of seconds: three NFT steps on a tiny model."""
    base: dict[str, Any] = {
        "model": str(model),
        "steps": 3,
        "prompts": {"source": str(prompt_file), "per_step": 2},
        "rewards": [{"name": "python", "options": {"function": f"{JUDGE}:brightness"}}],
        "exploration": {"kind": "noise", "noises": 3},
        "sampling": {"steps": 4, "solver": "dpm"},
        "loss": {"kind": "nft", "timesteps": 2, "old_policy": "constant", "old_decay": 0.3},
        "optimizer": {"lr": 1e-3},
        "lora": {"rank": 4, "alpha": 8},
        "evaluation": {"prompts": 2, "per_prompt": 2},
        "machine": {"device": "cpu", "dtype": "float32"},
        "output": {"checkpoint_every": 1},
    }
    return deepcopy(
        base | changes
    )  # the tables of methods below are shared: a test may change what it was given


GRPO: dict[str, Any] = {
    "sampling": {"steps": 4, "noise": "flow_sde"},
    "loss": {"kind": "clipped", "clip": 1e-3, "kl": 0.04},
    "optimizer": {"lr": 1e-3, "updates": 2},
}
E2PO: dict[str, Any] = {"exploration": {"kind": "perturbed", "noises": 2, "variants": 2, "steps": 3}}


def with_reward(function: str) -> dict[str, Any]:
    return {"rewards": [{"name": "python", "options": {"function": f"{JUDGE}:{function}"}}]}


def final(run: Path) -> dict[str, Tensor]:
    """The last checkpoint's tensors."""
    found = checkpoint.latest(run)
    assert found is not None
    return checkpoint.load(found)[0]
