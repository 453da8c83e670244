"""What rmler, ppo and grpo share: rolling a policy out over a batch, and the clipped update.

The transition of the fusion MDP depends on the action alone (s_{t+1} = fuse(a_t), always from the sources), so a
batch of actions can be drawn one after the other before any picture exists, and all its pictures rendered at once.
"""

from abc import abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pixrl.algorithms.fusion.base import Feedback, FusionTask, Proposal, Sampler
from pixrl.algorithms.fusion.policy import CompactPolicy, FusionPolicy, PaperPolicy
from pixrl.config import Count, Settings
from pixrl.equations import clipped_surrogate, fuse
from pixrl.types import sample_seed

_INIT = -2
"""Epoch of the seed that initializes networks; steps are 0 and up."""


class PolicyKind(StrEnum):
    """Which network proposes the coefficients."""

    COMPACT = "compact"
    PAPER = "paper"


Defaults = dict[PolicyKind, dict[str, Any]]

DEFAULTS: Defaults = {
    PolicyKind.COMPACT: {"lr": 0.07, "epochs": 8, "hidden": 32, "groups": 4, "std": 0.3, "balance_std": 0.5},
    PolicyKind.PAPER: {"lr": 3e-6, "epochs": 1, "hidden": 4096},
}
"""Chosen by measurement on the toy world (docs/log.md)."""


class PolicySettings(Settings):
    """A policy and how it is updated. What is not given takes the policy's own default."""

    defaults: ClassVar[Defaults] = DEFAULTS

    policy: PolicyKind = PolicyKind.COMPACT
    lr: float = Field(gt=0)
    """Adam's learning rate."""
    epochs: Count
    """Passes over a batch; the clip takes effect from the second on."""
    clip: float = Field(0.2, gt=0)
    """Half width of the trusted probability ratios."""
    hidden: int = Field(ge=1, le=65536)
    """Width of the hidden layers."""
    groups: int | None = Field(None, ge=1)
    """compact: groups of columns that share a coefficient."""
    std: float | None = Field(None, gt=0)
    """compact: first standard deviation of a group's offset."""
    balance_std: float | None = Field(None, gt=0)
    """compact: first standard deviation of the balance."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("policy", PolicyKind.COMPACT) not in list(PolicyKind):
            return given
        kind = PolicyKind(given.get("policy", PolicyKind.COMPACT))
        without_effect = [
            name
            for name in ("groups", "std", "balance_std")
            if kind is PolicyKind.PAPER and given.get(name) is not None
        ]
        if without_effect:
            raise ValueError(f"{' and '.join(without_effect)} would have no effect with policy 'paper'")
        return {**cls.defaults[kind], **given}


PolicySettingsT = TypeVar("PolicySettingsT", bound=PolicySettings)


class PolicySampler(Sampler[PolicySettingsT]):
    """Draws coefficients from a policy and improves it after every batch."""

    settings_type = PolicySettings

    def __init__(self, task: FusionTask, settings: PolicySettingsT) -> None:
        super().__init__(task, settings)
        self.policy = _build(task, settings)
        self.optimizer = torch.optim.Adam(self.policy.parameter_groups(settings.lr))
        self.state_D = task.features_ND.mean(dim=0)
        """s_t: the fused embedding that the last action made; at first the mean of the sources."""

    def ask(self, count: int, step: int) -> Proposal:
        noise_BX = torch.randn(count, self.policy.action_size, generator=self.task.generator(step))
        states, coefficients, actions = [], [], []
        state_D = self.state_D
        with torch.no_grad():
            for noise_X in noise_BX:
                action_BX = self.policy.draw(state_D[None], noise_X[None])
                coefficients_ND = self.policy.coefficients(action_BX)[0]
                states.append(state_D)
                actions.append(action_BX[0])
                coefficients.append(coefficients_ND)
                state_D = self.transition(coefficients_ND)
            states_BD, actions_BX = torch.stack(states), torch.stack(actions)
            log_prob_B = self.policy.log_prob(states_BD, actions_BX)
        trace = {
            "states_BD": states_BD,
            "actions_BX": actions_BX,
            "log_prob_B": log_prob_B,
            "next_D": state_D,
        }
        return Proposal(torch.stack(coefficients), trace)

    def transition(self, coefficients_ND: Tensor) -> Tensor:
        """s_{t+1}: the sources, mixed anew."""
        return fuse(self.task.features_ND[:, None], coefficients_ND)[0]

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        scored_B = ~feedback.rewards_B.isnan()
        self.state_D = proposal.trace["next_D"]
        if int(scored_B.sum()) < 2:
            return {}
        return self.improve(proposal, self.advantages(proposal, feedback), scored_B)

    @abstractmethod
    def advantages(self, proposal: Proposal, feedback: Feedback) -> Tensor:
        """How much better each action was than expected, [B]; 0 where scoring failed."""

    def penalty(self, states_BD: Tensor) -> Tensor | None:
        """A further term of the loss, [B]."""
        return None

    def improve(self, proposal: Proposal, advantages_B: Tensor, scored_B: Tensor) -> dict[str, float]:
        """Several epochs of the clipped surrogate over one batch, failed samples left out."""
        states_BD, actions_BX, old_B = (proposal.trace[k] for k in ("states_BD", "actions_BX", "log_prob_B"))
        figures: dict[str, float] = {}
        for epoch in range(self.settings.epochs):
            log_prob_B = self.policy.log_prob(states_BD, actions_BX)
            loss_B = clipped_surrogate(log_prob_B, old_B, advantages_B, self.settings.clip)
            penalty_B = self.penalty(states_BD)
            if penalty_B is not None:
                loss_B = loss_B + penalty_B
            self.optimizer.zero_grad()
            torch.autograd.backward(loss_B[scored_B].mean())
            grad_norm = nn.utils.get_total_norm(
                p.grad for p in self.policy.parameters() if p.grad is not None
            )
            self.optimizer.step()
            ratio_B = (log_prob_B.detach() - old_B).exp()[scored_B]
            if epoch == 0:
                figures["ratio_first"] = float(ratio_B.mean())
            figures["ratio_mean"] = float(ratio_B.mean())
            figures["clipped_share"] = float(((ratio_B - 1).abs() > self.settings.clip).float().mean())
            figures["grad_norm"] = float(grad_norm)
        with torch.no_grad():
            figures["policy_std"] = float(self.policy.gaussian(states_BD)[1].exp().mean())
        return figures

    def tensors(self) -> dict[str, Tensor]:
        return {"state_D": self.state_D} | module_tensors("policy", self.policy, self.optimizer)

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.state_D = tensors["state_D"]
        restore_module("policy", self.policy, self.optimizer, tensors)


def _build(task: FusionTask, settings: PolicySettings) -> FusionPolicy:
    seed = sample_seed(task.seed, _INIT, 0, 0)
    if settings.policy is PolicyKind.PAPER:
        return PaperPolicy(task, hidden=settings.hidden, seed=seed)
    assert settings.groups is not None and settings.std is not None and settings.balance_std is not None
    return CompactPolicy(
        task,
        groups=settings.groups,
        hidden=settings.hidden,
        std=settings.std,
        balance_std=settings.balance_std,
        seed=seed,
    )


def module_tensors(name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A module's parameters and its optimizer's moments under flat names."""
    found = {f"{name}/{key}": value for key, value in module.state_dict().items()}
    for row, moments in optimizer.state_dict()["state"].items():
        found |= {f"{name}.optimizer/{row}/{key}": value for key, value in moments.items()}
    return found


def restore_module(
    name: str, module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `module_tensors`."""
    prefix = f"{name}/"
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{name}.optimizer/"):
            _, row, moment = key.split("/")
            moments.setdefault(int(row), {})[moment] = value
    if moments:
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
