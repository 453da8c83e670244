"""Diffusion-DPO: learning from pairs of pictures on disk, of which one was preferred, without a reward.

Wallace et al. 2023 (Diffusion-DPO), on flow models by the error of their velocity as in Flow-DPO (Liu et al. 2025,
VideoReward). The pairs are votes (`pixrl vote`), or any other comparisons of two pictures of one prompt.

| paper              | here                                                                             |
|--------------------|----------------------------------------------------------------------------------|
| c, x_0^w, x_0^l    | the prompt, and metadata["winner"] and ["loser"], one pair a prompt              |
| p_ref              | the slot `reference`: the model before training                                  |
| x_t^w, x_t^l       | `x_2t`, winners then losers, each [B] of one noise and level                     |
| eps - eps_theta    | v - (noise - x0), the velocity's error                                           |
| beta T omega       | beta / 2                                                                         |

Deviations:

1. t is drawn from the noise levels of the schedule that pictures are drawn on, `timesteps` of them a pair, instead of
   one from all 1000; every level counts the same (Flow-DPO's constant beta).
2. Winner and loser share noise and level, as the released code has them and the formula does not; less variance.
3. Errors are means over pixels, not sums; beta belongs to that, as in the released code (2000 to 5000 on Stable
   Diffusion).
4. The model trained is a LoRA on the frozen reference, not a second copy of all weights.
5. A group is one pair, laid out `noises` / 2 times with other noises, so that a step takes as many gradient terms as
   the pictures of its groups.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pixrl.algorithms.advantages import AdvantageEstimator
from pixrl.algorithms.exploration import Variants
from pixrl.algorithms.loss import (
    Advantages,
    GivenSettings,
    NoisedLoss,
    Rollouts,
    Spending,
    Terms,
    noised,
    require_levels,
)
from pixrl.algorithms.sampling import Drawn, RolloutSettings, Samples, StepPlan
from pixrl.data.preferences import LOSER, WINNER
from pixrl.equations import dpo_loss, interpolate
from pixrl.errors import InputError
from pixrl.models.base import Conditioning, FlowPolicy, ImageEncoder, on_canvas
from pixrl.models.slots import Slot


class DPOSettings(GivenSettings):
    """The settings of Diffusion-DPO: pairs on disk."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(2000.0, gt=0)
    """How sharply winner is told from loser; of errors that are means over pixels."""
    timesteps: int = Field(1, ge=1, le=1000)
    """Noise levels of the schedule that each pair is trained at, drawn without putting back."""
    needs_pairs: ClassVar[bool] = True

    def check_sampling(self, sampling: RolloutSettings) -> None:
        require_levels(self.timesteps, sampling)
        super().check_sampling(sampling)

    def check_group(self, size: int) -> None:
        if size % 2:
            raise ValueError(
                f"exploration.noises is {size}, but loss: dpo lays out winner and loser beside each other: give an "
                "even number, 2 for each pair once"
            )

    def trained_levels(self, sampling: RolloutSettings) -> int:
        return self.timesteps

    def spending(self, images: int, groups: int, sampling: RolloutSettings) -> Spending:
        source = f"{groups} pairs, each with {images // groups // 2} noises; none drawn"
        return Spending(source, 0, images * self.timesteps)

    def passes_beside(self) -> int:
        return 1

    def describe(self, *, shows_references: bool) -> str:
        return f"dpo: pairs on disk, beta {self.beta:g}, noise levels a pair: {self.timesteps}"

    def describe_pictures(self, *, shows_references: bool) -> str:
        return "The pictures of training prompts are the pairs' own: they do not improve with training."


class DPOLoss(NoisedLoss):
    """The loss of Diffusion-DPO on pairs of pictures; rewards are only logged."""

    sampling_slot = Slot.REFERENCE
    Settings = DPOSettings
    settings: DPOSettings

    @torch.no_grad()
    def draw(
        self, policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, micro_batch: int
    ) -> Drawn:
        """Return winner and loser by turns in place of samples, and their latents.

        Raises:
            InputError: a prompt has no pair, or the model's pictures cannot be encoded.
        """
        if not isinstance(policy, ImageEncoder):
            raise InputError(
                f"{policy.name} ({type(policy).__name__}) cannot encode pictures of a pair: give an SD3 or FLUX model."
            )
        size = (policy.settings.width, policy.settings.height)
        if not len(samples):
            return torch.zeros(0, 3, *size[::-1]), policy.initial_noise([0])[:0], ()
        pairs = [
            [on_canvas(picture, *size) for picture in pair_of(group.metadata, group.prompt)]
            for group in samples.groups
        ]
        images_BCHW = torch.stack([pair[place % 2] for pair in pairs for place in range(samples.per_group)])
        return images_BCHW, policy.encode_images(images_BCHW), ()

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        estimator: AdvantageEstimator,
        steps: int,
    ) -> Advantages:
        """Return 1 for every winner, with the loser behind it as its rival, and nan for every loser."""
        first_PS = next(iter(rewards.values()))
        advantage_PS = torch.ones(first_PS.shape)
        advantage_PS[:, 1::2] = torch.nan
        place_S = torch.arange(first_PS.shape[1])
        return Advantages(advantage_PS.expand(steps, -1, -1), (place_S | 1).expand(first_PS.shape))

    def terms(
        self,
        policy: FlowPolicy,
        rollouts: Rollouts,
        rows: Sequence[int],
        advantage_B: Tensor,
        part: int,
        with_kl: bool,
    ) -> Terms:
        noisy = noised(policy, rollouts, rows, part)
        return preference_terms(policy, rollouts, rows, noisy, self.settings.beta, with_kl)


def preference_terms(
    policy: FlowPolicy,
    rollouts: Rollouts,
    rows: Sequence[int],
    noisy: tuple[Tensor, Tensor, Tensor, Tensor],
    beta: float,
    with_kl: bool,
) -> Terms:
    """Return DPO's loss of some winners against their rivals; `noisy`: what `noised` gives of the winners."""
    assert rollouts.rival_B is not None
    x_t, t_B, x0, noise = noisy
    lost = rollouts.x0_B[rollouts.rival_B[list(rows)]]
    condition = rollouts.conditioning(rows)
    both = Conditioning.cat([condition, condition])
    x_2t = torch.cat([x_t, interpolate(lost, noise, t_B)])
    wanted = torch.cat([noise - x0, noise - lost])
    velocity = policy.velocity(x_2t, torch.cat([t_B, t_B]), both)
    with torch.no_grad(), policy.slot(Slot.REFERENCE):
        reference = policy.velocity(x_2t, torch.cat([t_B, t_B]), both)
    won_B, lost_B = velocity_error(velocity, wanted).chunk(2)
    won_ref_B, lost_ref_B = velocity_error(reference, wanted).chunk(2)
    loss_B, margin_B = dpo_loss(won_B, lost_B, won_ref_B, lost_ref_B, beta)
    figures = {"pair_accuracy": (margin_B.detach() > 0).float()}
    if with_kl:
        figures["kl"] = velocity_error(velocity.detach(), reference).chunk(2)[0]
    return Terms(loss_B, figures)


def velocity_error(velocity: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared difference of each row, [B]."""
    return (velocity - wanted).square().flatten(1).mean(dim=1)


def pair_of(metadata: Mapping[str, object], prompt: str) -> tuple[Tensor, Tensor]:
    """Return winner and loser of one prompt. Raises InputError where there is none."""
    winner, loser = metadata.get(WINNER), metadata.get(LOSER)
    if not (isinstance(winner, Tensor) and isinstance(loser, Tensor)):
        raise InputError(
            f"dpo needs a pair of pictures for every prompt, and {prompt!r} has none. Give a file of pairs: "
            "prompts.source=pairs.jsonl (docs/align.md)."
        )
    return winner, loser
