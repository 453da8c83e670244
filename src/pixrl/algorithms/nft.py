"""DiffusionNFT: the contrast of an implicit good and an implicit bad policy, by flow matching on noised samples.

Zheng et al. 2025, DiffusionNFT: Online Diffusion Reinforcement with Forward Process. It needs no densities: samples
come from any solver, and are trained on at noise levels of the forward process. Equation numbers are those of E2PO,
whose section 3.2 restates it.

| paper                       | here                                                                |
|-----------------------------|---------------------------------------------------------------------|
| x_t (Eq. 1)                 | `loss.noised`: the sample at time t with fresh noise                |
| r(x_0, c), Z_c (Eq. 3)      | `equations.optimality` of the advantage; `NFTSettings.certain`      |
| L = r L+ + (1 - r) L- (Eqs. 4, 7) | `equations.nft_loss`                                          |
| v+, v-, beta (Eqs. 5, 6)    | `equations.implicit_velocities`; `NFTSettings.beta`                 |
| v_old                       | the slot `old`, which samples are drawn with: `sampling_slot`       |
| eta_i, old <- current       | `old_decay`, `OldPolicy`                                            |
| KL to v_ref                 | mean (v - v_ref)^2, weighted by `NFTSettings.kl`                    |

Deviations:

1. Where no KL is asked for, the distance to the reference is still measured on the first rows, for the log.
2. Noise levels are drawn from the schedule that pictures are drawn on, in an order of each sample's own.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from pixrl.algorithms.loss import (
    LossSettings,
    NoisedLoss,
    Rollouts,
    Terms,
    noise_levels,
    noised,
    require_levels,
    velocity_of,
)
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.equations import nft_loss, old_policy_decay, optimality
from pixrl.models.base import FlowPolicy
from pixrl.models.slots import Slot

NFT_SCALE = 5.0
"""The released trainer scales its loss by 5 / beta; the KL weight of 1e-4 belongs to that scale."""


class OldPolicy(StrEnum):
    """The schedule of d, by which NFT's old policy follows the trained one: old <- d old + (1 - d) current."""

    FOLLOW = "follow"
    """The old policy is the trained one, d = 0: the published kind 0."""
    SLOW = "slow"
    """The old policy lags ever more, d = min(0.001 step, 0.5): the published kind 1."""
    LATE = "late"
    """It lags from step 75 on, d = min(0.0075 (step - 75), 0.999), 0 before: the published kind 2."""
    CONSTANT = "constant"
    """It lags alike at every step, d = `old_decay`."""


_KINDS = {OldPolicy.FOLLOW: 0, OldPolicy.SLOW: 1, OldPolicy.LATE: 2}


class NFTSettings(LossSettings):
    """The settings of DiffusionNFT's loss."""

    kind: Literal["nft"] = "nft"
    beta: float = Field(1.0, gt=0)
    """How far the implicit good and bad policies lie from the old one."""
    kl: float = Field(1e-4, ge=0)
    """Weight of the mean of (v - v_ref)^2."""
    timesteps: int = Field(9, ge=1, le=1000)
    """Noise levels of the schedule that each sample is trained at, drawn without putting back."""
    levels: tuple[int, int] | None = None
    """Draw them from these steps alone, the first and the one after the last, counted from 0, the noisiest; none: all.
    A picture's layout is decided in early ones."""
    certain: float = Field(5.0, gt=0)
    """The advantage that counts as certainly good."""
    old_policy: OldPolicy = OldPolicy.SLOW
    old_decay: float | None = Field(None, ge=0, lt=1)
    """d of `old_policy: constant`."""

    @model_validator(mode="after")
    def _decay_where_constant(self) -> "NFTSettings":
        constant = self.old_policy is OldPolicy.CONSTANT
        if constant != (self.old_decay is not None):
            raise ValueError(
                "old_policy: constant needs old_decay" if constant else
                f"old_decay has no effect with old_policy: {self.old_policy.value}; remove it, or say constant"
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _levels_suffice(self) -> "NFTSettings":
        if self.levels is not None and not 0 <= self.levels[0] <= self.levels[1] - self.timesteps:
            first, end = self.levels
            raise ValueError(
                f"levels: [{first}, {end}] has not the {self.timesteps} noise levels that timesteps draws of it: "
                "count steps from 0, and end after the last one, such as [0, 5]"
            )
        return self

    def check_sampling(self, sampling: RolloutSettings) -> None:
        require_levels(self.timesteps, sampling)
        if self.levels is not None and self.levels[1] > sampling.steps:
            raise ValueError(
                f"loss.levels ends at {self.levels[1]}, but {sampling.steps} sampling steps have only as many "
                "noise levels"
            )

    def trained_levels(self, sampling: RolloutSettings) -> int:
        return self.timesteps

    def passes_beside(self) -> int:
        return 1 + (self.kl > 0)

    def describe(self, *, shows_references: bool) -> str:
        old = self.old_policy.value + ("" if self.old_decay is None else f" {self.old_decay:g}")
        among = self.levels
        levels = f"noise levels a sample: {self.timesteps}" + (
            "" if among is None else f" of steps {among[0]} to {among[1] - 1}"
        )
        return f"nft, beta {self.beta:g}, KL {self.kl:g}, {levels}, old policy {old}"


class NFTLoss(NoisedLoss):
    """DiffusionNFT's loss: 5 / beta (r L+ + (1 - r) L-) + kl mean((v - v_ref)^2), Eqs. 3 to 7.

    Each sample is noised anew at `timesteps` noise levels, in an order of its own.
    """

    sampling_slot = Slot.OLD
    Settings = NFTSettings
    settings: NFTSettings

    def steps(self, rollouts: Rollouts, rows: Sequence[int], part: int) -> list[int]:
        return noise_levels(rollouts, rows, part, self.settings.levels)

    def old_decay(self, step: int) -> float:
        if self.settings.old_decay is not None:
            return self.settings.old_decay
        return old_policy_decay(step, _KINDS[self.settings.old_policy])

    def terms(
        self,
        policy: FlowPolicy,
        rollouts: Rollouts,
        rows: Sequence[int],
        advantage_B: Tensor,
        part: int,
        with_kl: bool,
    ) -> Terms:
        x_t, t_B, x0, _ = noised(policy, rollouts, rows, part, self.settings.levels)
        condition = rollouts.conditioning(rows)
        with policy.quick_backward():  # all by the same kernels: rounding must not look like a distance
            velocity = policy.velocity(x_t, t_B, condition)
            old = velocity_of(Slot.OLD, policy, x_t, t_B, condition)
            held = with_kl or self.settings.kl > 0
            reference = velocity_of(Slot.REFERENCE, policy, x_t, t_B, condition) if held else None
        good_B = optimality(advantage_B.to(x_t.device), self.settings.certain)
        loss_B = (
            nft_loss(x_t, t_B, x0, velocity, old, good_B, self.settings.beta) * NFT_SCALE / self.settings.beta
        )
        figures = {"old_distance": (velocity.detach() - old).square().flatten(1).mean(dim=1)}
        if reference is not None:
            kl_B = (velocity - reference).square().flatten(1).mean(dim=1)
            loss_B = loss_B + self.settings.kl * kl_B
            figures["kl"] = kl_B.detach()
        return Terms(loss_B, figures)
