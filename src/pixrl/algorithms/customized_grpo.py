"""Customized-GRPO: GRPO for personalization, with SARS (synergy-aware shaping) and TDW (time-aware dynamic weighting).

Customized-GRPO, section 3. The method is GRPO's loss (`grpo.py`, Eqs. 6 to 8) with both shapings of the advantage, on a
model that is conditioned on reference pictures (pixrl personalize):

    A = w_id(t) A_id + w_prompt(t) A_prompt + alpha S    where A_id > 0 or A_prompt > 0, else - alpha S    (Eq. 11)
    S = tanh(A_id A_prompt)                                                                                (Eq. 10)
    w_prompt(t) falls from w_max to w_min along a sigmoid, w_id(t) = 1 - w_prompt(t)                       (Eq. 12)

Each shaping works alone, and with every loss that learns from advantages. `advantages.GroupAdvantage` adds it all up.

| paper                              | here                                                            |
|------------------------------------|-----------------------------------------------------------------|
| A_id, A_prompt (Eq. 8)             | `advantages.normalized`, each reward within its groups          |
| naive weighting (Eq. 9)            | neither shaping; the rewards' own weights                       |
| SARS, S and alpha (Eqs. 10, 11)    | `SynergySettings`, `pairwise_synergy`, added once a sample      |
| TDW, w_id(t), w_prompt(t) (Eq. 12) | `TimeSettings`, looked up by the true step, 0 the noisiest      |

Deviations:

1. More than two rewards: the synergy is the mean over all pairs of rewards of Eq. 11's signed term, each pair with its
   own sign rule. Two rewards are one pair, so that is Eq. 11 itself. Several subjects in a picture are several identity
   rewards, which must then agree with each other and with the prompt.
2. With time weights a reward's own weight is its share among those of its role (identity, or prompt), so that the two
   roles' weights add up to 1 at every step, as in the paper.
3. The clamp is on what comes out (`AdvantageSettings.clamp`), not on each reward's own advantage.
4. Eq. 11 takes away alpha S where both advantages are bad. With min, max and harmonic S is negative there, so by the
   letter a sample that is bad in both gains; with tanh it never does. That is kept: it is what the paper ablates.
"""

from collections.abc import Mapping
from enum import StrEnum
from itertools import combinations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pixrl.config import Settings
from pixrl.equations import prompt_weight, shape_advantage
from pixrl.equations.shaping import PUBLISHED_STEPS


class SynergyKind(StrEnum):
    """The measure S of how far two advantages agree (Eq. 10, `equations.synergy`)."""

    TANH = "tanh"
    """The paper's own measure, tanh(A_id A_prompt)."""
    MIN = "min"
    MAX = "max"
    HARMONIC = "harmonic"


class SynergySettings(Settings):
    """The settings of SARS: rewards that agree count more, rewards that conflict count against a sample (Eq. 11)."""

    kind: SynergyKind = SynergyKind.TANH
    alpha: float = Field(0.5, gt=0)
    """Strength of the synergy."""
    recenter: bool = False
    """Subtract each group's mean, which the synergy moves away from 0."""

    def describe(self) -> str:
        """Return the settings in a few words, for the report."""
        recentred = ", recentred" if self.recenter else ""
        return f"synergy {self.kind.value} with alpha {self.alpha:g}{recentred}"

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """Raise ValueError for a single trained reward, which has nothing to agree with."""
        if len(weights) < 2:
            raise ValueError(
                f"advantage.synergy needs two trained rewards or more, and only {', '.join(weights)} is trained: "
                "take held_out off another, or set advantage.synergy to null"
            )


class TimeSettings(Settings):
    """The settings of TDW: the prompt's rewards count more in early steps, the identity's in late ones (Eq. 12)."""

    identity: tuple[str, ...] = Field(min_length=1)
    """Names of the rewards that judge the identity; the others judge the prompt."""
    w_max: float = Field(0.7, ge=0, le=1)
    """The prompt's weight at first; the identity's is 1 minus it."""
    w_min: float = Field(0.3, ge=0, le=1)
    """The prompt's weight at last."""
    start: float = Field(6.0, ge=0)
    """First step of the transition; this and the next three are given for 25 steps and scale with their number."""
    end: float = Field(22.0, ge=0)
    """First step of the last phase."""
    steepness: float = Field(0.8, gt=0)
    """lambda, the steepness of the transition for each step."""
    center: float = Field(14.0, ge=0)
    """t_c, the midpoint of the transition."""
    inverted: bool = False
    """Let the prompt's weight rise instead of fall: the paper's ablation."""

    @model_validator(mode="after")
    def _in_order(self) -> "TimeSettings":
        if self.w_min > self.w_max:
            raise ValueError(
                f"w_min {self.w_min:g} is above w_max {self.w_max:g}; swap them, or set inverted: true"
            )
        if self.start > self.end:
            raise ValueError(f"the transition starts at {self.start:g} and ends before, at {self.end:g}")
        return self

    def prompt_weights(self, steps: int) -> Tensor:
        """Return w_prompt(t) at each of `steps` steps [T] (Eq. 12)."""
        return prompt_weight(
            torch.arange(float(steps)), steps, self.w_max, self.w_min, self.start, self.end,
            self.steepness * PUBLISHED_STEPS / steps, self.center, self.inverted,
        )  # fmt: skip

    def describe(self) -> str:
        """Return the settings in a few words, for the report."""
        first, last = (self.w_min, self.w_max) if self.inverted else (self.w_max, self.w_min)
        return f"weight of the prompt from {first:g} to {last:g} over the steps"

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """Raise ValueError where the roles do not fit the trained rewards (name -> weight)."""
        unknown = [name for name in self.identity if name not in weights]
        if unknown:
            raise ValueError(
                f"advantage.time.identity names {unknown[0]!r}, which is not trained on; trained are "
                f"{', '.join(weights)}"
            )
        roles = [set(self.identity), set(weights) - set(self.identity)]
        if not roles[1]:
            raise ValueError(
                "advantage.time.identity names every trained reward, so that none is left to judge the prompt"
            )
        for role in roles:
            (first, *others) = sorted(role)
            if not others and weights[first] != 1.0:
                raise ValueError(
                    f"the weight of {first!r} would have no effect: with advantage.time it is alone in its role, "
                    "whose weight the step decides. Take it out, or set advantage.time to null"
                )

    def weights_by_step(self, weights: Mapping[str, float], steps: int) -> dict[str, Tensor]:
        """Return each trained reward's weight at every step [T]: its role's weight times its share in the role."""
        prompt_T = self.prompt_weights(steps)
        identity = self.identity
        whole = {
            role: sum(weight for name, weight in weights.items() if (name in identity) is role)
            for role in (True, False)
        }
        return {
            name: weight / whole[name in identity] * (1 - prompt_T if name in identity else prompt_T)
            for name, weight in weights.items()
        }


def pairwise_synergy(parts: Mapping[str, Tensor], kind: SynergyKind) -> Tensor:
    """Return Eq. 11's signed synergy [P, S]: S, or -S where both advantages are bad; a mean over pairs of rewards."""
    # with both weights 0 and alpha 1, Eq. 11 is its last term alone: so the sign rule stands in one place
    terms = [
        shape_advantage(one, other, 0.0, 0.0, 1.0, kind.value)
        for one, other in combinations(parts.values(), 2)
    ]
    return torch.stack(terms).mean(dim=0)
