"""What an update minimizes: the clipped surrogate of GRPO, or DiffusionNFT's contrast of good and bad samples.

A loss is cut into `parts` (random steps, or noise levels), each of which can be evaluated for any rows of a step's
rollouts, so that memory never decides what is learned. It also says which pictures it learns from (`draw`: the samples
of a slot) and what it takes from their scores (`judge`: advantages), where the baselines `sft.py` and `rpo.py` differ.

| paper                       | here                                                       |
|-----------------------------|------------------------------------------------------------|
| pi_old, v_old               | the slot that samples were drawn with: `sampling_slot`     |
| epsilon                     | `ClippedSettings.clip`                                     |
| beta of Flow-GRPO           | `ClippedSettings.kl`                                       |
| beta of DiffusionNFT        | `NFTSettings.beta`; its KL weight is `NFTSettings.kl`      |
| Z_c                         | `NFTSettings.certain`                                      |

Deviations:

1. `Transition.log_prob_B` is conditioned on the prompt itself (c_0), as the update is: a ratio between c_0 and a
   variant's c_k(t) would not be 1 before the first update.
2. Where no KL is asked for, the distance to the reference is still measured on the first rows, for the log.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pixrl.algorithms.advantages import AdvantageSettings, advantages
from pixrl.algorithms.base import Drawn, Rollouts, Samples, Use, fresh_noise, roll_out
from pixrl.algorithms.exploration import Variants
from pixrl.algorithms.sampling import StepPlan
from pixrl.config import Settings
from pixrl.equations import (
    clipped_surrogate,
    gaussian_kl,
    interpolate,
    nft_loss,
    old_policy_decay,
    optimality,
)
from pixrl.models.base import Conditioning, FlowPolicy
from pixrl.models.slots import Slot
from pixrl.types import sample_seed

NFT_SCALE = 5.0
"""The released trainer scales its loss by 5 / beta; the KL weight of 1e-4 belongs to that scale."""


class KLForm(StrEnum):
    """Which published form a KL weight belongs to (`equations.gaussian_kl`)."""

    FLOW_GRPO = "flow_grpo"
    """Without sqrt(-dt) in the deviation: the form of Flow-GRPO's 0.04."""
    EXACT = "exact"


class OldPolicy(StrEnum):
    """How the sampling policy of NFT follows the trained one after each step: old <- d old + (1 - d) current."""

    FOLLOW = "follow"
    """d = 0: the published kind 0."""
    SLOW = "slow"
    """d = min(0.001 step, 0.5): kind 1."""
    LATE = "late"
    """d = 0 up to step 75, then min(0.0075 (step - 75), 0.999): kind 2."""
    CONSTANT = "constant"
    """d = `old_decay`."""


_KINDS = {OldPolicy.FOLLOW: 0, OldPolicy.SLOW: 1, OldPolicy.LATE: 2}


class ClippedSettings(Settings):
    """GRPO's loss."""

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
    def _no_form_without_kl(self) -> "ClippedSettings":
        if self.kl == 0 and self.kl_form is not None:
            raise ValueError("kl_form has no effect with kl: 0; remove it, or give kl a weight")
        return self


class NFTSettings(Settings):
    """DiffusionNFT's loss."""

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


@dataclass(frozen=True)
class Terms:
    """A loss of some rows at one part, and figures of the same rows for the log."""

    loss_B: Tensor
    """To minimize, [B]."""
    figures: Mapping[str, Tensor]
    """Name -> [B], without gradients."""


@dataclass(frozen=True)
class Judgement:
    """What the scores of a step's samples say to a loss."""

    advantage_TPS: Tensor
    """At every step of the schedule; nan leaves a sample out."""
    rival_PS: Tensor | None = None
    """Place in its group of the sample that each one was preferred to, for losses of pairs."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """What each reward counts, for losses that differentiate the rewards themselves."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """For the log."""


class Loss(ABC):
    """What is minimized over a step's rollouts."""

    sampling_slot: Slot

    def draw(
        self, policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, micro_batch: int
    ) -> Drawn:
        """The pictures that a training step learns from: those of `sampling_slot`."""
        with policy.slot(self.sampling_slot):
            return roll_out(policy, variants, samples, plan, micro_batch)

    def judge(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        settings: AdvantageSettings,
        steps: int,
    ) -> "Judgement":
        """What is learned of the scores of all processes' samples [P, S], reward by reward."""
        table = advantages(rewards, weights, settings, steps)
        return Judgement(table, figures={"advantage_mean": table.nanmean().item()})

    @abstractmethod
    def steps(self, rollouts: Rollouts, rows: Sequence[int], part: int) -> list[int]:
        """The true step, 0 the noisiest, that each of some rows is trained at in a part."""

    @abstractmethod
    def parts(self, rollouts: Rollouts) -> int:
        """How many terms each sample has."""

    @abstractmethod
    def terms(
        self,
        policy: FlowPolicy,
        rollouts: Rollouts,
        rows: Sequence[int],
        advantage_B: Tensor,
        part: int,
        with_kl: bool,
    ) -> Terms:
        """The loss of some rows [B], with gradients to the slot `current`, which is active.

        With `with_kl` the figures hold `kl`, the distance to the reference.
        """

    @abstractmethod
    def deviation(self, policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int]) -> float:
        """How far the first update is from on-policy on some rows: 0 but for rounding.

        Computed as the update does, with gradients, since that may take other kernels than sampling did.
        """

    def old_decay(self, step: int) -> float | None:
        """How much of the old policy stays after a step; None where this loss has no old policy."""
        return None


class ClippedSurrogate(Loss):
    """max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)) + kl KL at every random step."""

    sampling_slot = Slot.CURRENT

    def __init__(self, settings: ClippedSettings) -> None:
        self.settings = settings
        self.clip = math.inf if settings.clip is None else settings.clip

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
            with torch.no_grad(), policy.slot(Slot.REFERENCE):
                velocity = policy.velocity(x, sigma_B, condition)
                reference = plan.random_step(x, velocity, number, next_x=next_x).mean
            kl_B = self._kl(step.mean, reference, step.std, x.new_full((len(x),), plan.dt(number)))
            loss_B = loss_B + self.settings.kl * kl_B if self.settings.kl > 0 else loss_B
            figures["kl"] = kl_B.detach()
        return Terms(loss_B, figures)

    def _kl(self, mean: Tensor, reference: Tensor, std: Tensor, dt_B: Tensor) -> Tensor:
        if self.settings.kl_form is KLForm.EXACT:
            return gaussian_kl(mean, reference, std)
        return gaussian_kl(mean, reference, std, form="flow_grpo", dt=dt_B)

    def deviation(self, policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int]) -> float:
        none_B = torch.zeros(len(rows))
        ratios = [
            self.terms(policy, rollouts, rows, none_B, part, with_kl=False).figures["ratio"]
            for part in range(self.parts(rollouts))
        ]
        return (torch.stack(ratios) - 1).abs().max().item()


class NegativeAware(Loss):
    """5 / beta (r L+ + (1 - r) L-) + kl mean((v - v_ref)^2) at shuffled noise levels, fresh noise at each."""

    sampling_slot = Slot.OLD

    def __init__(self, settings: NFTSettings) -> None:
        self.settings = settings

    def parts(self, rollouts: Rollouts) -> int:
        return self.settings.timesteps

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
            old = _velocity_of(Slot.OLD, policy, x_t, t_B, condition)
            held = with_kl or self.settings.kl > 0
            reference = _velocity_of(Slot.REFERENCE, policy, x_t, t_B, condition) if held else None
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

    def deviation(self, policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int]) -> float:
        return velocity_deviation(policy, rollouts, rows, Slot.OLD)


def velocity_deviation(policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int], slot: Slot) -> float:
    """How far the trained velocity is from a slot's on some rows: the norm of their difference over the slot's norm.

    Not the largest difference: with kernels that differ between training and sampling (torch.compile in bfloat16) some
    element of thousands is always far off.
    """
    x_t, t_B, _, _ = noised(policy, rollouts, rows, 0)
    condition = rollouts.conditioning(rows)
    with policy.quick_backward():
        current = policy.velocity(x_t, t_B, condition).detach()
        other = _velocity_of(slot, policy, x_t, t_B, condition)
    return float((current - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))


@torch.no_grad()
def _velocity_of(slot: Slot, policy: FlowPolicy, x_t: Tensor, t_B: Tensor, condition: Conditioning) -> Tensor:
    """The velocity of another slot than the trained one, without a graph."""
    with policy.slot(slot):
        return policy.velocity(x_t, t_B, condition)


def noise_levels(
    rollouts: Rollouts, rows: Sequence[int], part: int, among: tuple[int, int] | None = None
) -> list[int]:
    """The step whose noise level each of some rows has in a part: an order of its own for each sample.

    Out of all steps, or `among` some: the first and the one after the last.
    """
    first, end = among or (0, rollouts.schedule.steps)
    return [first + _shuffled(rollouts.samples.streams[row], end - first)[part] for row in rows]


def noised(
    policy: FlowPolicy,
    rollouts: Rollouts,
    rows: Sequence[int],
    part: int,
    among: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t [B], x0 and the noise of some rows: noise levels in an order, and fresh noises, of each sample's own."""
    index = list(rows)
    x0 = rollouts.x0_B[index]
    levels = rollouts.schedule.sigmas
    t_B = x0.new_tensor([levels[step] for step in noise_levels(rollouts, rows, part, among)])
    noise = fresh_noise(policy, [rollouts.samples.streams[row] for row in index], Use.FRESH, part)
    return interpolate(x0, noise, t_B), t_B, x0, noise


def _shuffled(stream: int, count: int) -> list[int]:
    drawer = torch.Generator().manual_seed(sample_seed(stream, Use.ORDER, 0, 0))
    order: list[int] = torch.randperm(count, generator=drawer).tolist()
    return order
