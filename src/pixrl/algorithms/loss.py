"""What all losses share: a step's rollouts, what their scores say, and a term for each sample and part.

A loss is cut into `parts` (random steps, or noise levels), each of which can be evaluated for any rows of a step's
rollouts, so that memory never decides what is learned. It also says which pictures it learns from (`draw`: the samples
of a slot) and what it takes from their scores (`advantages`), where the baselines `sft.py` and `rpo.py` differ.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pixrl.algorithms.advantages import AdvantageEstimator, AdvantageSettings, EstimatorSettings
from pixrl.algorithms.exploration import Variants
from pixrl.algorithms.sampling import (
    Drawn,
    RolloutSettings,
    Samples,
    Schedule,
    StepNoise,
    StepPlan,
    Transition,
    Use,
    fresh_noise,
    roll_out,
)
from pixrl.config import Settings
from pixrl.equations import interpolate
from pixrl.models.base import Conditioning, FlowPolicy
from pixrl.models.slots import Slot
from pixrl.rewards.base import DifferentiableReward
from pixrl.rewards.settings import RewardSetting
from pixrl.types import sample_seed

VELOCITY_LIMIT = 0.02
"""Largest relative difference of the trained velocity from the sampling one that leaves a signal."""


@dataclass(frozen=True)
class Spending:
    """What a loss spends on the pictures of a run, for comparisons at equal budgets."""

    source: str
    """Where the pictures come from, in words."""
    scores: int
    """The number of pictures whose scores say what is learned."""
    gradient_terms: int
    """The number of pictures times noise levels that a gradient passes."""


class LossSettings(Settings):
    """The settings of a loss, and what is known of it before a model is there: what it fits, and its words.

    A loss of your own has a class `Settings` derived from this one.
    """

    kind: str
    learns_from_scores: ClassVar[bool] = True
    """False: rewards are only logged."""
    draws_its_own: ClassVar[bool] = True
    """Whether the pictures of training show the model in training; where they do not, their rewards, group std and
    conflicts say nothing of what is learned."""
    needs_targets: ClassVar[bool] = False
    """Whether every prompt of training must come with a picture that shows how it should be."""
    needs_pairs: ClassVar[bool] = False
    """Whether every prompt of training must come with two pictures, of which one was preferred."""
    compares_samples: ClassVar[bool] = True
    """Whether a group of one sample teaches nothing."""
    through_decoder: ClassVar[bool] = False
    """Whether the gradient passes the decoder, which takes memory."""

    def check_sampling(self, sampling: RolloutSettings) -> None:
        """Raise a ValueError where the loss cannot learn from rollouts that are sampled so."""

    def check_advantage(self, advantage: EstimatorSettings) -> None:
        """Raise a ValueError for settings of advantages that the loss would not read."""

    def check_updates(self, updates: int) -> None:
        """Raise a ValueError for settings that do not fit this number of optimizer steps a training step."""

    def check_group(self, size: int) -> None:
        """Raise a ValueError where the loss cannot learn from groups of this size, above 1."""

    def check_references(self, *, are_as_pictures: bool) -> None:
        """Raise a ConfigError where the loss cannot learn with the model's reference pictures.

        `are_as_pictures`: each is laid out on a square as large as the pictures that are drawn.
        """

    def check_rewards(self, rewards: Sequence[RewardSetting]) -> None:
        """Raise a ValueError where the loss cannot learn from these rewards. No model is loaded."""

    def trained_levels(self, sampling: RolloutSettings) -> int:
        """Return the number of noise levels that each picture is trained at."""
        return sampling.steps

    def spending(self, images: int, groups: int, sampling: RolloutSettings) -> Spending:
        """Return what a run of so many pictures in so many groups spends."""
        return Spending("drawn by the model", images, images * self.trained_levels(sampling))

    def passes_beside(self) -> int:
        """Return how many passes without a gradient each term takes beside the trained one: of the old policy, say."""
        return 0

    def describe(self, *, shows_references: bool) -> str:
        """Return the loss in a line, for the report; `shows_references`: the model is given reference pictures."""
        given = [f"{name} {value}" for name, value in self.model_dump(exclude={"kind"}, mode="json").items()]
        return ", ".join([self.kind, *given])

    def describe_advantage(self, advantage: EstimatorSettings) -> str:
        """Return what becomes of the advantages, in a line."""
        return advantage.describe()

    def describe_pictures(self, *, shows_references: bool) -> str:
        """Return a sentence on whose pictures training scored where the trained model did not draw them; else ""."""
        return ""


class GivenSettings(LossSettings):
    """The settings of a loss whose pictures come with the prompts: nothing is drawn, and no score is learned from."""

    learns_from_scores: ClassVar[bool] = False
    draws_its_own: ClassVar[bool] = False

    def check_sampling(self, sampling: RolloutSettings) -> None:
        if sampling.noise is not StepNoise.NONE:
            raise ValueError(
                f"sampling.noise has no effect with loss: {self.kind}, which draws nothing: remove it"
            )

    def check_advantage(self, advantage: EstimatorSettings) -> None:
        if advantage != AdvantageSettings():
            raise ValueError(
                f"advantage has no effect with loss: {self.kind}, which learns from no score: remove it"
            )

    def describe_advantage(self, advantage: EstimatorSettings) -> str:
        return "none: no score is learned from"


@dataclass(frozen=True)
class Rollouts:
    """A training step's pictures on this process, and how they came about."""

    step: int
    samples: Samples
    plan: StepPlan
    anchor: Conditioning
    """c_0, one row for each prompt of this process."""
    images_BCHW: Tensor
    x0_B: Tensor
    """Clean latents, [B, C, h, w]."""
    transitions: tuple[Transition, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    rival_B: Tensor | None = None
    """Row of the picture that each one was preferred to, int64 [B]; where a loss learns from pairs."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """What each reward counts; where a loss differentiates the rewards themselves."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def schedule(self) -> Schedule:
        """The noise levels that the pictures were drawn on, and that the loss is taken at."""
        return self.plan.schedule

    def conditioning(self, rows: Sequence[int]) -> Conditioning:
        """Return what an update is conditioned on: c_0, the unperturbed prompts, of some samples."""
        return self.anchor[self.samples.prompt_B[list(rows)]]

    def with_advantages(self, advantages: "Advantages") -> "Rollouts":
        """Add what a loss wants to know besides advantages: rewards' weights; rivals as rows of this process."""
        if advantages.rival_PS is None:
            return replace(self, weights=advantages.weights)
        own_PS = advantages.rival_PS[[group.place for group in self.samples.groups]]
        first_P = torch.arange(len(self.samples.groups)) * self.samples.per_group
        rival_B = (own_PS + first_P[:, None]).flatten()
        return replace(self, weights=advantages.weights, rival_B=rival_B)


@dataclass(frozen=True)
class Terms:
    """The loss of some rows at one part, and figures of the same rows for the log."""

    loss_B: Tensor
    """What is minimized, [B], with a graph to the slot `current`."""
    figures: Mapping[str, Tensor]
    """Name -> [B], without gradients."""


@dataclass(frozen=True)
class Advantages:
    """What the scores of a step's samples say to a loss."""

    advantage_TPS: Tensor
    """The advantage at every step of the schedule; nan leaves a sample out."""
    rival_PS: Tensor | None = None
    """Place in its group of the sample that each one was preferred to, for losses of pairs."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """What each reward counts, for losses that differentiate the rewards themselves."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Figures for the log."""


class Loss(ABC):
    """What is minimized over a step's rollouts, and which policy draws them."""

    Settings: ClassVar[type[LossSettings]]
    """Its settings; their `kind` is how a recipe names it."""
    sampling_slot: Slot
    """The slot whose pictures are learned from: the paper's pi_old."""
    on_policy_measure: ClassVar[str] = "|v - v_old| / |v_old| before the first update"
    """What `deviation` measures, in words."""
    is_always_on_policy: ClassVar[bool] = False
    """Whether the first update of every step begins on-policy; False: only that of a run, before slots part."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @classmethod
    def make(cls, settings: Any, rewards: Mapping[str, DifferentiableReward]) -> Self:
        """Return the loss of these settings; `rewards`: name -> what it may differentiate."""
        return cls(settings)

    @property
    def on_policy_limit(self) -> float:
        """The largest `deviation` that leaves a signal."""
        return VELOCITY_LIMIT

    def draw(
        self, policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, micro_batch: int
    ) -> Drawn:
        """Draw the pictures that a training step learns from, with `sampling_slot`."""
        with policy.slot(self.sampling_slot):
            return roll_out(policy, variants, samples, plan, micro_batch)

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        estimator: AdvantageEstimator,
        steps: int,
    ) -> "Advantages":
        """Return what the scores of all processes' samples [P, S], reward by reward, say to this loss."""
        table = estimator(rewards, weights, steps)
        return Advantages(table, figures={"advantage_mean": table.nanmean().item()})

    @abstractmethod
    def steps(self, rollouts: Rollouts, rows: Sequence[int], part: int) -> list[int]:
        """Return the true step, 0 the noisiest, that each of some rows is trained at in a part."""

    @abstractmethod
    def parts(self, rollouts: Rollouts) -> int:
        """Return how many terms each sample has."""

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
        """Return the loss of some rows [B], with gradients to the slot `current`, which is active.

        With `with_kl` the figures hold `kl`, the distance to the reference.
        """

    @abstractmethod
    def deviation(self, policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int]) -> float:
        """Return how far the first update is from on-policy on some rows: 0 but for rounding.

        Computed as the update does, with gradients, since that may take other kernels than sampling did.
        """

    def old_decay(self, step: int) -> float | None:
        """Return how much of the old policy stays after a step; None where this loss has no old policy."""
        return None

    @classmethod
    def has_old_policy(cls) -> bool:
        """Return whether the loss reads the slot `old`."""
        return cls.sampling_slot is Slot.OLD or cls.old_decay is not Loss.old_decay


class NoisedLoss(Loss):
    """A loss of samples that are noised anew at `settings.timesteps` noise levels, in an order of each sample's own."""

    def parts(self, rollouts: Rollouts) -> int:
        return int(self.settings.timesteps)

    def steps(self, rollouts: Rollouts, rows: Sequence[int], part: int) -> list[int]:
        return noise_levels(rollouts, rows, part)

    def deviation(self, policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int]) -> float:
        return velocity_deviation(policy, rollouts, rows, self.sampling_slot)


def require_levels(timesteps: int, sampling: RolloutSettings) -> None:
    """Raise a ValueError where the schedule has fewer noise levels than a loss is trained at."""
    if timesteps > sampling.steps:
        raise ValueError(
            f"loss.timesteps is {timesteps}, but {sampling.steps} sampling steps have only as many noise levels"
        )


def velocity_deviation(policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int], slot: Slot) -> float:
    """Return how far the trained velocity is from a slot's on some rows: |v - v_slot| / |v_slot|.

    Not the largest difference: with kernels that differ between training and sampling (torch.compile in bfloat16) some
    element of thousands is always far off.
    """
    x_t, t_B, _, _ = noised(policy, rollouts, rows, 0)
    condition = rollouts.conditioning(rows)
    with policy.quick_backward():
        current = policy.velocity(x_t, t_B, condition).detach()
        other = velocity_of(slot, policy, x_t, t_B, condition)
    return float((current - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))


@torch.no_grad()
def velocity_of(slot: Slot, policy: FlowPolicy, x_t: Tensor, t_B: Tensor, condition: Conditioning) -> Tensor:
    """Return the velocity of another slot than the trained one, without a graph."""
    with policy.slot(slot), policy.folded():
        return policy.velocity(x_t, t_B, condition)


def noise_levels(
    rollouts: Rollouts, rows: Sequence[int], part: int, among: tuple[int, int] | None = None
) -> list[int]:
    """Return the step whose noise level each of some rows is trained at in a part, in an order of each sample's own.

    `among`: the first step to draw from and the one after the last; None: all.
    """
    first, end = among or (0, rollouts.schedule.steps)
    levels = []
    for row in rows:
        drawer = torch.Generator().manual_seed(sample_seed(rollouts.samples.streams[row], Use.ORDER, 0, 0))
        levels.append(first + int(torch.randperm(end - first, generator=drawer)[part]))
    return levels


def noised(
    policy: FlowPolicy,
    rollouts: Rollouts,
    rows: Sequence[int],
    part: int,
    among: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_t = (1 - t) x0 + t noise of some rows, t [B], x0 and the noise.

    Each sample has an order of noise levels (`noise_levels`), and a fresh noise for each part, of its own.
    """
    index = list(rows)
    x0 = rollouts.x0_B[index]
    levels = rollouts.schedule.sigmas
    t_B = x0.new_tensor([levels[step] for step in noise_levels(rollouts, rows, part, among)])
    noise = fresh_noise(policy, [rollouts.samples.streams[row] for row in index], Use.FRESH, part)
    return interpolate(x0, noise, t_B), t_B, x0, noise
