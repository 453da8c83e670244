"""RPO: preference pairs by the harmonic mean of rewards, learned with DPO and a similarity loss.

Miao et al. 2024 (Reward Preference Optimization), as Customized-GRPO replicates it (its appendix A.2): the frozen base
draws candidates from the prompt alone, the harmonic mean of identity and prompt reward says which won, and the tuning
combines DPO's loss with a similarity loss that keeps the identity.

| paper                         | here                                                                             |
|-------------------------------|----------------------------------------------------------------------------------|
| frozen base                   | the slot `reference`, which also is DPO's reference policy                       |
| lambda-harmonic reward        | sum w / sum (w / s), s in (0, 1) for each reward; w are the rewards' own weights |
| y_w, y_l                      | best and worst of a group                                                        |
| DPO (Rafailov et al. 2023)    | -log sigmoid(-beta / 2 (d_w - d_l)), d = |v - u|^2 - |v_ref - u|^2, u = noise - x0 |
| similarity loss               | flow matching on the first reference itself, asked for as "a photo of a CLASS"   |

Deviations:

1. RPO's two rewards are cosines of one model; ours have scales of their own. Each is normalized in its group and put
   into (0, 1) by the logistic function first, since a harmonic mean needs positive numbers of one scale.
2. Pairs are drawn anew each step instead of once beforehand: the base is frozen, so their distribution is the same.
3. DPO on pairs of pictures is that of dpo.py, with its deviations 1 to 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pixrl.algorithms.advantages import (
    FLAT,
    AdvantageEstimator,
    AdvantageSettings,
    EstimatorSettings,
    normalized,
)
from pixrl.algorithms.dpo import preference_terms, velocity_error
from pixrl.algorithms.exploration import Group, Variants
from pixrl.algorithms.loss import (
    Advantages,
    LossSettings,
    NoisedLoss,
    Rollouts,
    Spending,
    Terms,
    noised,
    require_levels,
)
from pixrl.algorithms.sampling import Drawn, RolloutSettings, Samples, StepPlan, roll_out
from pixrl.equations import interpolate
from pixrl.errors import ConfigError, InputError
from pixrl.models.base import FlowPolicy
from pixrl.models.slots import Slot

AS_PICTURES = (
    "rpo's similarity loss needs references as large as the pictures: leave references.side and references.shape out "
    "and draw squares, or set loss.similarity to 0."
)


class RPOSettings(LossSettings):
    """The settings of RPO: preference pairs from the frozen base."""

    kind: Literal["rpo"] = "rpo"
    beta: float = Field(100.0, gt=0)
    """How sharply DPO tells winner from loser; of errors that are means over pixels."""
    similarity: float = Field(1.0, ge=0)
    """Weight of the similarity loss."""
    timesteps: int = Field(9, ge=1, le=1000)
    """Noise levels of the schedule that each pair is trained at, drawn without putting back."""
    shown: bool = False
    """Whether candidates are drawn with the reference pictures; the paper's are drawn from the prompt alone."""
    draws_its_own: ClassVar[bool] = False

    def check_sampling(self, sampling: RolloutSettings) -> None:
        require_levels(self.timesteps, sampling)

    def check_advantage(self, advantage: EstimatorSettings) -> None:
        if not isinstance(advantage, AdvantageSettings):
            raise ValueError(
                f"advantage.kind: {advantage.kind} has no effect with loss: rpo, which ranks by the harmonic mean: "
                "remove it"
            )
        given, usual = advantage.__dict__, AdvantageSettings().__dict__
        for name in ("synergy", "time", "clamp", "skip_flat"):
            if given[name] != usual[name]:
                raise ValueError(
                    f"advantage.{name} has no effect with loss: rpo, which ranks by the harmonic mean: remove it"
                )

    def check_references(self, *, are_as_pictures: bool) -> None:
        if self.similarity and not are_as_pictures:
            raise ConfigError(AS_PICTURES)

    def trained_levels(self, sampling: RolloutSettings) -> int:
        return self.timesteps

    def spending(self, images: int, groups: int, sampling: RolloutSettings) -> Spending:
        pictures = groups * (2 if self.similarity == 0 else 3)  # winner, loser, and the reference itself
        return Spending("drawn by the frozen base", images, pictures * self.timesteps)

    def passes_beside(self) -> int:
        return 1

    def describe(self, *, shows_references: bool) -> str:
        return (
            f"rpo: best against worst of a group of {self._candidates(shows_references)}, by the harmonic mean, beta "
            f"{self.beta:g}, similarity loss {self.similarity:g}, noise levels a pair: {self.timesteps}"
        )

    def describe_advantage(self, advantage: EstimatorSettings) -> str:
        return f"{advantage.normalization.describe_scale()}, only to rank a group's samples"

    def describe_pictures(self, *, shows_references: bool) -> str:
        candidates = self._candidates(shows_references)
        return f"The pictures of training prompts are {candidates}: they do not improve with training."

    def _candidates(self, shows_references: bool) -> str:
        how = f", with{'' if self.shown else 'out'} references" if shows_references else ""
        return f"candidates drawn by the frozen base{how}"


class RPOLoss(NoisedLoss):
    """RPO's loss: DPO on the best and the worst of a group by the harmonic mean of rewards, and the similarity loss."""

    sampling_slot = Slot.REFERENCE
    Settings = RPOSettings
    settings: RPOSettings

    def draw(
        self, policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, micro_batch: int
    ) -> Drawn:
        """Draw candidates of the frozen base, by default from the prompts alone."""
        shown = (
            variants
            if self.settings.shown
            else replace(variants, anchor=replace(variants.anchor, references=()))
        )
        with policy.slot(self.sampling_slot):
            return roll_out(policy, shown, samples, plan, micro_batch)

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        estimator: AdvantageEstimator,
        steps: int,
    ) -> Advantages:
        """Return 1 for the winner of each group, nan for the others; none in a group without a difference."""
        score_PS = harmonic_scores(rewards, weights, estimator.settings.normalization)
        winner_P = score_PS.nan_to_num(-torch.inf).argmax(dim=1)
        loser_P = score_PS.nan_to_num(torch.inf).argmin(dim=1)
        places = torch.arange(len(score_PS))
        differs_P = score_PS[places, winner_P] - score_PS[places, loser_P] > FLAT
        advantage_PS = torch.full_like(score_PS, torch.nan)
        advantage_PS[places[differs_P], winner_P[differs_P]] = 1.0
        rival_PS = loser_P[:, None].expand_as(score_PS)
        figures = {"pair_share": differs_P.float().mean().item()}
        return Advantages(advantage_PS.expand(steps, -1, -1), rival_PS, figures=figures)

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
        terms = preference_terms(policy, rollouts, rows, noisy, self.settings.beta, with_kl)
        if self.settings.similarity == 0:
            return terms
        # the similarity loss: flow matching's on the first reference of each row, under the class prompt
        conditioning, (_, t_B, _, noise) = rollouts.conditioning(rows), noisy
        if not conditioning.references:
            raise InputError("rpo's similarity loss needs reference pictures: set loss.similarity to 0.")
        x0 = conditioning.references[0]
        if conditioning.sizes_BN2 is not None or x0.shape[1:] != noise.shape[1:]:
            raise InputError(AS_PICTURES)
        groups = rollouts.samples.groups
        asked = [class_prompt(groups[row]) for row in rollouts.samples.prompt_B[list(rows)].tolist()]
        with policy.text_present():
            condition = replace(policy.encode(asked), references=conditioning.references)
        velocity = policy.velocity(interpolate(x0, noise, t_B), t_B, condition)
        similarity_B = velocity_error(velocity, noise - x0)
        return Terms(
            terms.loss_B + self.settings.similarity * similarity_B,
            {**terms.figures, "similarity_loss": similarity_B.detach()},
        )


def harmonic_scores(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: AdvantageSettings
) -> Tensor:
    """Return the weighted harmonic mean [P, S] of the trained rewards, each in (0, 1); nan where one failed.

    Source: Miao et al. 2024, the lambda-harmonic reward.
    """
    parts, failed_PS = normalized(rewards, weights, settings)
    inverse_PS = torch.stack([weights[name] / part_PS.sigmoid() for name, part_PS in parts.items()]).sum(
        dim=0
    )
    return (sum(weights.values()) / inverse_PS).masked_fill(failed_PS, torch.nan)


def class_prompt(group: Group) -> str:
    """Return the similarity loss's prompt: the class of what the first reference shows, alone.

    Raises:
        InputError: no class word is known; asked for by the whole prompt, the reference would be learned by heart.
    """
    several = group.metadata.get("subjects")
    first = several[0] if isinstance(several, Sequence) and several else group.metadata
    word = first.get("class")
    if not isinstance(word, str):
        raise InputError(
            f"rpo's similarity loss asks for the class alone, and the subject of {group.prompt!r} has no class word. "
            'Give one: a folder\'s class.txt, or "classes" in a UNO list; or set loss.similarity to 0.'
        )
    return f"a photo of {'an' if word[0].lower() in 'aeiou' else 'a'} {word}"
