"""Direct reward back-propagation: the gradient of the reward itself, through the last K sampling steps.

Clark et al. 2024, Directly Fine-Tuning Diffusion Models on Differentiable Rewards, the variant DRaFT-K. ReFL (Xu et al.
2023, with ImageReward) and AlignProp (Prabhudesai et al. 2023) differ in which steps the gradient passes.

| paper               | here                                                                                  |
|---------------------|---------------------------------------------------------------------------------------|
| r(x_0, c)           | `DifferentiableReward.differentiable_scores` of the decoded picture                   |
| K                   | `DraftSettings.last`; K = T is full DRaFT                                             |
| stop-gradient of x_K | the latents before the last K steps, kept when the pictures were drawn               |
| theta               | the slot `current`                                                                    |

Deviations:

1. Pictures are drawn once, without gradients, and scored for the log; the last K steps are then taken again. With more
   than one optimizer step a training step, the later ones start from latents of the weights before the first.
2. The gradient is taken in two halves that give the same as one: of the rewards by x_0, whose graph is then freed, and
   of x_0 by the weights. Decoder and reward models never share memory with the transformer's activations.
3. With K > 1 each step is computed again in the backward pass (gradient checkpointing), so memory does not grow with K.
4. Several rewards are added as they are, times their weights: there is no group to normalize them in. Give them weights
   that make their scales alike.
5. `kl` adds NFT's distance to the reference on those steps, against the reward hacking that this method is known for.
6. The flow schedules of diffusers end with a step from a noise level of 0.001 (more with a shift), through which
   next to nothing is learned. The paper's K = 1 is K = 2 there; steps that span less than `LEAST_SPAN` are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pixrl import rewards as rewards_table
from pixrl.algorithms.advantages import AdvantageEstimator, AdvantageSettings, EstimatorSettings
from pixrl.algorithms.exploration import Variants
from pixrl.algorithms.loss import Advantages, Loss, LossSettings, Rollouts, Terms
from pixrl.algorithms.sampling import Drawn, ODESolver, RolloutSettings, Samples, Solver, StepNoise, StepPlan
from pixrl.errors import ConfigError, InputError
from pixrl.models.base import Conditioning, FlowPolicy
from pixrl.models.slots import Slot
from pixrl.rewards.base import DifferentiableReward
from pixrl.rewards.settings import RewardSetting

LEAST_SPAN = 0.02
"""The least noise level that the last K steps may begin at."""


class DraftSettings(LossSettings):
    """The settings of direct reward back-propagation."""

    kind: Literal["draft"] = "draft"
    last: int = Field(2, ge=1, le=1000)
    """K: sampling steps that the gradient passes, counted from the picture; see deviation 6 for 1."""
    kl: float = Field(0.0, ge=0)
    """Weight of the mean of (v - v_ref)^2 over these steps."""
    compares_samples: ClassVar[bool] = False
    through_decoder: ClassVar[bool] = True

    def check_sampling(self, sampling: RolloutSettings) -> None:
        if self.last > sampling.steps:
            raise ValueError(f"loss.last is {self.last}, but there are only {sampling.steps} sampling steps")
        if sampling.noise is not StepNoise.NONE:
            raise ValueError("loss: draft differentiates steps that are not random: remove sampling.noise")
        if sampling.solver is not Solver.EULER:
            raise ValueError(
                f"loss: draft takes the last steps again, which {sampling.solver.value} cannot without the steps "
                "before: set sampling.solver to euler"
            )

    def check_advantage(self, advantage: EstimatorSettings) -> None:
        if advantage != AdvantageSettings():
            raise ValueError(
                "advantage has no effect with loss: draft, which follows the rewards' own gradient: remove it"
            )

    def check_rewards(self, rewards: Sequence[RewardSetting]) -> None:
        """Raise ValueError where a trained reward has no gradient."""
        trained = [one for one in rewards if not one.held_out]
        others = [one for one in trained if not rewards_table.is_differentiable(one.reward)]
        if others:
            possible = [name for name in rewards_table.REWARDS if rewards_table.is_differentiable(name)]
            raise ValueError(
                f"loss: draft needs the gradient of every trained reward, and {others[0].name!r} ({others[0].reward}) "
                f"has none. Set held_out: true on it, or train on one of {', '.join(possible)}"
            )

    def trained_levels(self, sampling: RolloutSettings) -> int:
        return self.last

    def passes_beside(self) -> int:
        return int(self.kl > 0) + (self.last > 1)  # what is taken again in the backward pass

    def describe(self, *, shows_references: bool) -> str:
        return f"the rewards' own gradient through the last {self.last} sampling step(s), KL {self.kl:g}"

    def describe_advantage(self, advantage: EstimatorSettings) -> str:
        return "none: the rewards' gradient is followed"


@dataclass(frozen=True)
class Move:
    """One of the last K sampling steps, with gradients."""

    number: int
    before: Tensor
    velocity: Tensor
    after: Tensor


class DRaFTLoss(Loss):
    """DRaFT-K's loss: -sum_r w_r r(decode(x_0), prompt) + kl mean (v - v_ref)^2.

    Args:
        settings: K and the KL weight.
        rewards: what can be differentiated, by name; those with a weight are.
    """

    sampling_slot = Slot.CURRENT
    Settings = DraftSettings
    settings: DraftSettings

    def __init__(self, settings: DraftSettings, rewards: Mapping[str, DifferentiableReward]) -> None:
        super().__init__(settings)
        self.rewards = rewards

    @classmethod
    def make(cls, settings: DraftSettings, rewards: Mapping[str, DifferentiableReward]) -> Self:
        return cls(settings, rewards)

    def draw(
        self, policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, micro_batch: int
    ) -> Drawn:
        """Draw the pictures, and keep the latents before their last K steps.

        Raises:
            InputError: these steps span next to nothing.
        """
        start = plan.schedule.steps - self.settings.last
        span = plan.schedule.sigmas[start]
        if span < LEAST_SPAN:
            raise InputError(
                f"loss.last: the last {self.settings.last} of {plan.schedule.steps} steps begin at the noise level "
                f"{span:.2g}, where nothing is left to change: raise it to {self.settings.last + 1} or more."
            )
        kept = replace(plan, kept=frozenset({start}))
        return super().draw(policy, variants, samples, kept, micro_batch)

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        estimator: AdvantageEstimator,
        steps: int,
    ) -> Advantages:
        """Return 1 for every sample that all trained rewards could score, and the rewards' weights for `terms`."""
        refuse_others(weights, self.rewards)
        failed_PS = torch.stack([rewards[name].isnan() for name in weights]).any(dim=0)
        counts_PS = torch.where(failed_PS, torch.nan, 1.0)
        return Advantages(counts_PS.expand(steps, -1, -1), weights=weights)

    def parts(self, rollouts: Rollouts) -> int:
        return 1

    def steps(self, rollouts: Rollouts, rows: Sequence[int], part: int) -> list[int]:
        return [rollouts.schedule.steps - 1] * len(rows)

    def terms(
        self,
        policy: FlowPolicy,
        rollouts: Rollouts,
        rows: Sequence[int],
        advantage_B: Tensor,
        part: int,
        with_kl: bool,
    ) -> Terms:
        condition = rollouts.conditioning(rows)
        moves = list(self._last_moves(policy, rollouts, rows, condition))
        x0 = moves[-1].after
        leaf = x0.detach().requires_grad_()
        prompts, metadata = rollouts.samples.prompts, rollouts.samples.metadata
        asked, known = [prompts[row] for row in rows], [metadata[row] for row in rows]
        with torch.enable_grad(), policy.decoder_present():
            images = policy.decode(leaf)
            score_B = torch.stack(
                [
                    weight * self.rewards[name].differentiable_scores(images, asked, known)
                    for name, weight in rollouts.weights.items()
                ]
            ).sum(dim=0)
            scored_B = score_B.isfinite()
            (slope,) = torch.autograd.grad(score_B[scored_B].sum(), leaf)
        # a picture without a score teaches nothing, and may have left nan in its own row
        score_B = torch.where(scored_B, score_B.detach(), 0.0)
        slope = torch.where(scored_B.view(-1, *[1] * (slope.ndim - 1)), slope, 0.0)
        # the value is -score, the gradient that of -score through x0
        path_B = (slope * x0).flatten(1).sum(dim=1)
        loss_B = -score_B - (path_B - path_B.detach())
        figures = {}
        if with_kl or self.settings.kl > 0:
            distances = []
            for move in moves:  # from the reference's velocity at the same latents
                x = move.before.detach()
                sigma_B = x.new_full((len(x),), rollouts.schedule.sigmas[move.number])
                with torch.no_grad(), policy.slot(Slot.REFERENCE):
                    reference = policy.velocity(x, sigma_B, condition)
                distances.append((move.velocity - reference).square().flatten(1).mean(dim=1))
            kl_B = torch.stack(distances).mean(dim=0)
            loss_B = loss_B + self.settings.kl * kl_B if self.settings.kl > 0 else loss_B
            figures["kl"] = kl_B.detach()
        return Terms(loss_B, figures)

    def deviation(self, policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int]) -> float:
        """Compare the last steps' mean velocity with that of sampling, of samples drawn under the prompt itself."""
        own = [row for row in rows if int(rollouts.samples.variant_B[row]) == 0]
        if not own:
            return 0.0
        *_, last = self._last_moves(policy, rollouts, own, rollouts.conditioning(own))
        span = rollouts.schedule.sigmas[rollouts.transitions[0].number]
        return ((last.after.detach() - rollouts.x0_B[own]).abs().max() / span).item()

    def _last_moves(
        self, policy: FlowPolicy, rollouts: Rollouts, rows: Sequence[int], condition: Conditioning
    ) -> Iterator[Move]:
        """Take the last K steps from where sampling was, with gradients."""
        start = rollouts.transitions[0]
        x = start.x_B[list(rows)]
        solver, sigmas = ODESolver(rollouts.plan), rollouts.schedule.sigmas

        def velocity_at(x: Tensor, number: int) -> Tensor:
            return policy.velocity(x, x.new_full((len(x),), sigmas[number]), condition)

        for number in range(start.number, rollouts.schedule.steps):
            if self.settings.last > 1:
                velocity = checkpoint(velocity_at, x, number, use_reentrant=False, preserve_rng_state=False)
            else:
                velocity = velocity_at(x, number)
            after = solver.step(x, velocity, number)
            yield Move(number, x, velocity, after)
            x = after


def refuse_others(trained: Mapping[str, float], rewards: Mapping[str, DifferentiableReward]) -> None:
    """Raise ConfigError where a trained reward has no gradient."""
    others = [name for name in trained if name not in rewards]
    if others:
        listed = ", ".join(rewards) or "none"
        raise ConfigError(
            f"loss: draft needs the gradient of every trained reward, and {others[0]!r} has none; of this run's "
            f"rewards, {listed} have one. Set held_out: true on {others[0]!r}, or take another loss."
        )
