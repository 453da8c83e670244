"""SFT: supervised flow matching on target pictures, the baseline that learns from no reward.

Lipman et al. 2023 (flow matching); Customized-GRPO's Eq. 4 and the row SFT of its Table 2. The same prompts and
reference pictures as the other methods, and a picture for each of them that shows how it should be.

| paper         | here                                                                          |
|---------------|-------------------------------------------------------------------------------|
| x_0           | the latents of metadata["target"], one picture a prompt                       |
| x_1, t        | fresh noise and a level of the schedule, keyed by each sample's own stream    |
| v = x_1 - x_0 | the target of `velocity`                                                      |

Deviations:

1. A group's samples are one target with G noises, so that SFT takes as many gradient terms as the others do.
2. t is drawn from the noise levels of the schedule that pictures are drawn on, not from a continuous density.
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
from pixrl.errors import InputError
from pixrl.models.base import FlowPolicy, ReferencePolicy, on_canvas
from pixrl.models.slots import Slot

TARGET = "target"
"""The key in a prompt's metadata of the picture [3, H, W] that it should give with its references."""


class SFTSettings(GivenSettings):
    """The settings of supervised flow matching."""

    kind: Literal["sft"] = "sft"
    timesteps: int = Field(9, ge=1, le=1000)
    """Noise levels of the schedule that each sample is trained at, drawn without putting back."""
    needs_targets: ClassVar[bool] = True

    def check_sampling(self, sampling: RolloutSettings) -> None:
        require_levels(self.timesteps, sampling)
        super().check_sampling(sampling)

    def trained_levels(self, sampling: RolloutSettings) -> int:
        return self.timesteps

    def spending(self, images: int, groups: int, sampling: RolloutSettings) -> Spending:
        source = f"{groups} targets, each with {images // groups} noises; none drawn"
        return Spending(source, 0, images * self.timesteps)

    def describe(self, *, shows_references: bool) -> str:
        return f"supervised flow matching on target pictures, noise levels a sample: {self.timesteps}"

    def describe_pictures(self, *, shows_references: bool) -> str:
        return "The pictures of training prompts are the targets, which nobody drew."


class SFTLoss(NoisedLoss):
    """The loss of flow matching on target pictures: mean (v - (noise - x0))^2; rewards are only logged."""

    sampling_slot = Slot.REFERENCE
    Settings = SFTSettings
    settings: SFTSettings

    @torch.no_grad()
    def draw(
        self, policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, micro_batch: int
    ) -> Drawn:
        """Return the target pictures in place of samples, and their latents.

        Raises:
            InputError: a prompt has no target picture, or the model's pictures cannot be encoded.
        """
        if not isinstance(policy, ReferencePolicy):
            raise InputError(
                f"{policy.name} ({type(policy).__name__}) cannot encode target pictures: give a FLUX model."
            )
        size = (policy.settings.width, policy.settings.height)
        if not len(samples):
            return torch.zeros(0, 3, *size[::-1]), policy.initial_noise([0])[:0], ()
        targets = [on_canvas(target_of(group.metadata, group.prompt), *size) for group in samples.groups]
        images_BCHW = torch.stack(targets)[samples.prompt_B]
        return images_BCHW, policy.encode_images(images_BCHW), ()

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        estimator: AdvantageEstimator,
        steps: int,
    ) -> Advantages:
        """Return an advantage of 1 for every sample, also where a reward failed: no score is learned from."""
        first_PS = next(iter(rewards.values()))
        return Advantages(torch.ones(steps, *first_PS.shape))

    def terms(
        self,
        policy: FlowPolicy,
        rollouts: Rollouts,
        rows: Sequence[int],
        advantage_B: Tensor,
        part: int,
        with_kl: bool,
    ) -> Terms:
        x_t, t_B, x0, noise = noised(policy, rollouts, rows, part)
        condition = rollouts.conditioning(rows)
        velocity = policy.velocity(x_t, t_B, condition)
        loss_B = (velocity - (noise - x0)).square().flatten(1).mean(dim=1)
        figures = {}
        if with_kl:
            with torch.no_grad(), policy.slot(Slot.REFERENCE):
                reference = policy.velocity(x_t, t_B, condition)
            figures["kl"] = (velocity.detach() - reference).square().flatten(1).mean(dim=1)
        return Terms(loss_B, figures)


def target_of(metadata: Mapping[str, object], prompt: str) -> Tensor:
    """Return the target picture of one prompt. Raises InputError where there is none."""
    target = metadata.get(TARGET)
    if not isinstance(target, Tensor):
        raise InputError(
            f"sft needs a target picture for every prompt, and {prompt!r} has none. Sources with targets are "
            'toy:subjects and UNO\'s lists with "image_tgt_path"; the other methods need none.'
        )
    return target
