"""GRPO on flow models: the clipped surrogate at every random step of a rollout, and a KL to the reference.

Liu et al. 2025, Flow-GRPO (its KL and its stochastic step), and Xue et al. 2025, DanceGRPO (group advantages of several
rewards): what tells them apart is `sampling.noise`, `advantage.scale` and `loss.kl_form`, not the loss.
Equation numbers are those of Customized-GRPO, which restates both.

| paper                        | here                                                                      |
|------------------------------|---------------------------------------------------------------------------|
| pi(a_t | s_t) (Eq. 6)        | one random step, a Gaussian: `StepPlan.random_step`                       |
| the SDE (Eq. 13)             | `equations.flow_sde_step`, `dance_step`, `cps_step`, by `sampling.noise`  |
| pi_old                       | the slot that samples were drawn with, `sampling_slot`                    |
| rho (Eq. 7)                  | exp(log_prob - `Transition.log_prob_B`), at every random step             |
| min(rho A, clip(rho) A) (Eq. 7) | `equations.clipped_surrogate`, negated into a loss                     |
| epsilon (Eq. 7)              | `GRPOSettings.clip`                                                       |
| A_i (Eq. 8)                  | `advantages.GroupAdvantage`, `equations.group_advantages`                 |
| beta                         | `GRPOSettings.kl`                                                         |
| KL(pi, pi_ref)               | `equations.gaussian_kl` of the two means of a random step                 |

Deviations:

1. `Transition.log_prob_B` is conditioned on the prompt itself (c_0), as the update is: a ratio between c_0 and a
   variant's c_k(t) would not be 1 before the first update.
2. Where no KL is asked for, the distance to the reference is still measured on the first rows, for the log.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pixrl.algorithms.loss import Loss, LossSettings, Rollouts, Terms, velocity_of
from pixrl.algorithms.sampling import RolloutSettings, StepNoise, random_steps
from pixrl.equations import clipped_surrogate, gaussian_kl
from pixrl.models.base import FlowPolicy
from pixrl.models.slots import Slot

RATIO_LIMIT = 0.01
"""The largest deviation from 1 of a ratio that is not clipped: its rounding scales a gradient by as much."""


class KLForm(StrEnum):
    """The published form that a KL weight belongs to (`equations.gaussian_kl`)."""

    FLOW_GRPO = "flow_grpo"
    """The KL without sqrt(-dt) in the deviation, to which Flow-GRPO's weight of 0.04 belongs."""
    EXACT = "exact"


class GRPOSettings(LossSettings):
    """The settings of GRPO's loss."""

    kind: Literal["clipped"] = "clipped"
    clip: float | None = Field(None, gt=0, lt=1)
    """Half width of the trusted ratios, such as 1e-4: log-densities are means over pixels, hence the small numbers. It
    belongs to several updates a step: before the first one every ratio is 1, and clipping would act on rounding alone.
    """
    kl: float = Field(0.0, ge=0)
    """Weight of the distance to the reference policy."""
    kl_form: KLForm | None = None
    """Form of the KL; none: flow_grpo."""

    @model_validator(mode="after")
    def _no_form_without_kl(self) -> "GRPOSettings":
        if self.kl == 0 and self.kl_form is not None:
            raise ValueError("kl_form has no effect with kl: 0; remove it, or give kl a weight")
        return self

    def check_sampling(self, sampling: RolloutSettings) -> None:
        if sampling.noise is StepNoise.NONE:
            raise ValueError(
                "loss: clipped needs rollouts with a density: set sampling.noise to flow_sde, dance or cps"
            )

    def check_updates(self, updates: int) -> None:
        """Raise ValueError for a clip range that would have no effect, or that is missing."""
        if updates == 1 and self.clip is not None:
            raise ValueError(
                "loss.clip has no effect with optimizer.updates: 1, where every ratio is 1: remove it, or set "
                "optimizer.updates to 2 or more"
            )
        if updates > 1 and self.clip is None:
            raise ValueError(
                f"loss: clipped with optimizer.updates: {updates} needs the range of ratios that it trusts: set "
                "loss.clip, such as 1e-4"
            )

    def trained_levels(self, sampling: RolloutSettings) -> int:
        return len(random_steps(sampling, seed=0, step=0))  # as many in every training step

    def passes_beside(self) -> int:
        return int(self.kl > 0)

    def describe(self, *, shows_references: bool) -> str:
        ratios = "on-policy ratio, not clipped" if self.clip is None else f"clipped at ±{self.clip:g}"
        return f"{ratios}, KL {self.kl:g}"


class GRPOLoss(Loss):
    """GRPO's loss at every random step: max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)) + kl KL(pi, pi_ref), Eq. 7."""

    sampling_slot = Slot.CURRENT
    Settings = GRPOSettings
    on_policy_measure = "largest |ratio - 1| before the first update"
    is_always_on_policy = True
    settings: GRPOSettings

    def __init__(self, settings: GRPOSettings) -> None:
        super().__init__(settings)
        self.clip = math.inf if settings.clip is None else settings.clip

    @property
    def on_policy_limit(self) -> float:
        return RATIO_LIMIT if self.settings.clip is None else self.settings.clip

    def parts(self, rollouts: Rollouts) -> int:
        return len(rollouts.transitions)

    def steps(self, rollouts: Rollouts, rows: Sequence[int], part: int) -> list[int]:
        return [rollouts.transitions[part].number] * len(rows)

    def terms(
        self,
        policy: FlowPolicy,
        rollouts: Rollouts,
        rows: Sequence[int],
        advantage_B: Tensor,
        part: int,
        with_kl: bool,
    ) -> Terms:
        index = list(rows)
        transition = rollouts.transitions[part]
        plan, number = rollouts.plan, transition.number
        x, next_x = transition.x_B[index], transition.next_B[index]
        old_log_prob = transition.log_prob_B[index]
        sigma_B = x.new_full((len(x),), plan.schedule.sigmas[number])
        condition = rollouts.conditioning(index)
        step = plan.random_step(x, policy.velocity(x, sigma_B, condition), number, next_x=next_x)
        loss_B = clipped_surrogate(step.log_prob, old_log_prob, advantage_B.to(x.device), self.clip)
        ratio_B = (step.log_prob.detach() - old_log_prob).exp()
        figures = {"ratio": ratio_B}
        if self.settings.clip is not None:
            figures["clip_share"] = ((ratio_B - 1).abs() > self.clip).float()
        if with_kl or self.settings.kl > 0:
            velocity = velocity_of(Slot.REFERENCE, policy, x, sigma_B, condition)
            reference = plan.random_step(x, velocity, number, next_x=next_x).mean
            if self.settings.kl_form is KLForm.EXACT:
                kl_B = gaussian_kl(step.mean, reference, step.std)
            else:
                dt_B = x.new_full((len(x),), plan.dt(number))
                kl_B = gaussian_kl(step.mean, reference, step.std, form="flow_grpo", dt=dt_B)
            loss_B = loss_B + self.settings.kl * kl_B if self.settings.kl > 0 else loss_B
            figures["kl"] = kl_B.detach()
        return Terms(loss_B, figures)

    def deviation(self, policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int]) -> float:
        none_B = torch.zeros(len(rows))
        ratios = [
            self.terms(policy, rollouts, rows, none_B, part, with_kl=False).figures["ratio"]
            for part in range(self.parts(rollouts))
        ]
        return (torch.stack(ratios) - 1).abs().max().item()
