"""Policy-gradient controls for RMLer: PPO with a critic (the paper's Table 1), and GRPO.

Both draw from the same policies as RMLer. PPO has rates of its own: with RMLer's it did worse (docs/log.md).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pixrl.algorithms.fusion.base import Feedback, FusionTask, Proposal
from pixrl.algorithms.fusion.policy import linear
from pixrl.algorithms.fusion.policy_gradient import (
    DEFAULTS,
    Defaults,
    PolicyKind,
    PolicySampler,
    PolicySettings,
    module_tensors,
    restore_module,
)
from pixrl.equations import group_advantages
from pixrl.types import sample_seed

_CRITIC = -3


class PPOSettings(PolicySettings):
    """PPO's own settings; gamma and lam are those of RMLer's released, unused, GAE."""

    defaults: ClassVar[Defaults] = DEFAULTS | {
        PolicyKind.COMPACT: {
            "lr": 0.05, "epochs": 4, "hidden": 32, "groups": 16, "std": 0.7, "balance_std": 0.3,
        }
    }  # fmt: skip

    gamma: float = Field(0.99, ge=0, le=1)
    """Discount of later rewards; 0 makes it a contextual bandit."""
    lam: float = Field(0.95, ge=0, le=1)
    """Generalized advantage estimation's lambda."""
    value_lr: float = Field(0.01, gt=0)
    """The critic's learning rate."""


class PPO(PolicySampler[PPOSettings]):
    """Standard PPO: a critic V(s), generalized advantage estimation along the batch's trajectory, standardized."""

    settings_type = PPOSettings

    def __init__(self, task: FusionTask, settings: PPOSettings) -> None:
        super().__init__(task, settings)
        generator = torch.Generator().manual_seed(sample_seed(task.seed, _CRITIC, 0, 0))
        self.center_D = task.features_ND.mean(dim=0)
        self.spread = (task.features_ND - self.center_D).square().mean().sqrt().clamp_min(1e-6)
        self.critic = nn.Sequential(linear(task.columns, 64, generator), nn.Tanh(), linear(64, 1, generator))
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=settings.value_lr)

    def value(self, states_BD: Tensor) -> Tensor:
        """V(s), [B]."""
        values_B: Tensor = self.critic((states_BD - self.center_D) / self.spread)[:, 0]
        return values_B

    def advantages(self, proposal: Proposal, feedback: Feedback) -> Tensor:
        advantages_B = self.estimate(proposal, feedback.rewards_B)[0]
        return group_advantages(advantages_B.masked_fill(feedback.rewards_B.isnan(), torch.nan)[None])[0]

    @torch.no_grad()
    def estimate(self, proposal: Proposal, rewards_B: Tensor) -> tuple[Tensor, Tensor]:
        """Generalized advantages and the returns that the critic should predict, [B] each.

        A failed picture takes the mean reward here, so that its neighbours' estimates stand; it is not trained on.
        """
        filled_B = rewards_B.nan_to_num(float(rewards_B.nanmean()))
        values_B = self.value(proposal.trace["states_BD"])
        next_B = torch.cat((values_B[1:], self.value(proposal.trace["next_D"][None])))
        advantages_B = torch.zeros_like(filled_B)
        running = torch.zeros(())
        for t in reversed(range(len(filled_B))):
            delta = filled_B[t] + self.settings.gamma * next_B[t] - values_B[t]
            running = delta + self.settings.gamma * self.settings.lam * running
            advantages_B[t] = running
        return advantages_B, advantages_B + values_B

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        scored_B = ~feedback.rewards_B.isnan()
        if int(scored_B.sum()) < 2:
            return super().tell(proposal, feedback)
        returns_B = self.estimate(proposal, feedback.rewards_B)[1]
        figures = super().tell(proposal, feedback)
        for _ in range(self.settings.epochs):
            loss = (self.value(proposal.trace["states_BD"]) - returns_B)[scored_B].square().mean()
            self.critic_optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.critic_optimizer.step()
        return figures | {"value_loss": float(loss.detach())}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | module_tensors("critic", self.critic, self.critic_optimizer)

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        super().restore(tensors, state)
        restore_module("critic", self.critic, self.critic_optimizer, tensors)


class GRPOSettings(PolicySettings):
    """GRPO's own settings."""

    kl: float = Field(0.01, ge=0)
    """Weight of the KL divergence to the first policy."""


class GRPO(PolicySampler[GRPOSettings]):
    """One state, s_0, for all; a group is a batch, or the pictures of one noise; KL to the first policy."""

    settings_type = GRPOSettings

    def __init__(self, task: FusionTask, settings: GRPOSettings) -> None:
        super().__init__(task, settings)
        with torch.no_grad():
            self.first = self.policy.gaussian(self.state_D[None])

    def transition(self, coefficients_ND: Tensor) -> Tensor:
        return self.state_D

    def advantages(self, proposal: Proposal, feedback: Feedback) -> Tensor:
        advantages_PG = group_advantages(feedback.by_noise())
        return advantages_PG.sum(dim=0)

    def penalty(self, states_BD: Tensor) -> Tensor | None:
        if self.settings.kl == 0:
            return None
        mean_BX, log_std_BX = self.policy.gaussian(states_BD)
        first_mean_X, first_log_std_X = self.first
        variance_ratio_BX = (2 * (log_std_BX - first_log_std_X)).exp()
        distance_BX = ((mean_BX - first_mean_X) * (-first_log_std_X).exp()) ** 2
        kl_BX = 0.5 * (variance_ratio_BX + distance_BX - 1) - (log_std_BX - first_log_std_X)
        return self.settings.kl * kl_BX.sum(dim=1)
