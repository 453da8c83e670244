"""From several rewards to one advantage a sample and step.

Rewards stay apart until here: each is normalized within its groups first, then they are weighted and added, so that a
reward with large numbers does not drown the others. A sample that failed in any trained reward is left out of every
statistic, and its advantage is nan here: the update drops it.

Customized-GRPO's two parts, each of which works alone and with every loss:

| paper                              | here                                                            |
|------------------------------------|-----------------------------------------------------------------|
| SARS, S and alpha (Eqs. 10, 11)    | `SynergySettings`, added once a sample                          |
| TDW, w_id(t), w_prompt(t) (Eq. 12) | `TimeSettings`, looked up by the true step, 0 the noisiest      |
| naive linear, w_id : w_prompt      | neither; the rewards' own weights                               |

Deviations:

1. More than two rewards: the synergy is the mean over all pairs of rewards of Eq. 11's signed term, each pair with its
   own sign rule. Two rewards are one pair, so that is Eq. 11 itself. Several subjects in a picture are several identity
   rewards, which must then agree with each other and with the prompt.
2. With time weights a reward's own weight is its share among those of its role (identity, or prompt), so that the two
   roles' weights add up to 1 at every step, as in the paper.
3. The clamp is on what comes out, not on each reward's own advantage.
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
from pixrl.equations import group_advantages, prompt_weight, shape_advantage
from pixrl.equations.shaping import PUBLISHED_STEPS
from pixrl.errors import RunError

FLAT = 1e-6
"""Below this standard deviation a group counts as one without a signal."""


class Scale(StrEnum):
    """Whose standard deviation divides a reward's advantage."""

    GROUP = "group"
    GLOBAL = "global"
    """Of all rewards of the step."""
    NONE = "none"


class SynergyKind(StrEnum):
    """How far two advantages agree (`equations.synergy`)."""

    TANH = "tanh"
    """The paper's."""
    MIN = "min"
    MAX = "max"
    HARMONIC = "harmonic"


class SynergySettings(Settings):
    """SARS: rewards that agree count more, rewards that conflict count against a sample."""

    kind: SynergyKind = SynergyKind.TANH
    alpha: float = Field(0.5, gt=0)
    """Strength."""
    recenter: bool = False
    """Subtract each group's mean, which the synergy moves away from 0."""


class TimeSettings(Settings):
    """TDW: rewards of the prompt count more in early steps, rewards of the identity in late ones."""

    identity: tuple[str, ...] = Field(min_length=1)
    """Rewards that judge the identity; the others judge the prompt."""
    w_max: float = Field(0.7, ge=0, le=1)
    """The prompt's weight at first; the identity's is 1 minus it."""
    w_min: float = Field(0.3, ge=0, le=1)
    """And in the end."""
    start: float = Field(6.0, ge=0)
    """First step of the transition; this and the next three are given for 25 steps and scale with their number."""
    end: float = Field(22.0, ge=0)
    """First step of the last phase."""
    steepness: float = Field(0.8, gt=0)
    """Of the transition, a step."""
    center: float = Field(14.0, ge=0)
    """Midpoint of the transition."""
    inverted: bool = False
    """The other way round: the paper's ablation."""

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
        """Weight of the prompt's rewards at each of `steps` steps [T]."""
        return prompt_weight(
            torch.arange(float(steps)), steps, self.w_max, self.w_min, self.start, self.end,
            self.steepness * PUBLISHED_STEPS / steps, self.center, self.inverted,
        )  # fmt: skip


class AdvantageSettings(Settings):
    """How rewards become advantages."""

    scale: Scale = Scale.GROUP
    clamp: float | None = Field(5.0, gt=0)
    """Largest magnitude; none: no limit."""
    eps: float = Field(1e-4, ge=0)
    """Added to the standard deviation."""
    skip_flat: bool = False
    """Leave groups whose samples all scored alike out of the update: they cost as much as others and teach nothing."""
    synergy: SynergySettings | None = None
    """Customized-GRPO's SARS; none: rewards are only weighted and added."""
    time: TimeSettings | None = None
    """Customized-GRPO's TDW; none: the same weights at every step."""

    @model_validator(mode="after")
    def _no_eps_without_scale(self) -> "AdvantageSettings":
        if self.scale is Scale.NONE and self.eps != 1e-4:
            raise ValueError("eps has no effect with scale: none: remove it")
        return self

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """ValueError where synergy or time weights cannot work with these trained rewards (name -> weight)."""
        if self.synergy is not None and len(weights) < 2:
            raise ValueError(
                f"advantage.synergy needs two trained rewards or more, and only {', '.join(weights)} is trained: "
                "take held_out off another, or set advantage.synergy to null"
            )
        if self.time is None:
            return
        unknown = [name for name in self.time.identity if name not in weights]
        if unknown:
            raise ValueError(
                f"advantage.time.identity names {unknown[0]!r}, which is not trained on; trained are "
                f"{', '.join(weights)}"
            )
        roles = [set(self.time.identity), set(weights) - set(self.time.identity)]
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


def advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: AdvantageSettings, steps: int = 1
) -> Tensor:
    """Advantages [T, P, S] of all groups at every step of the schedule; nan marks a sample to leave out.

    Without time weights all steps are equal. Look them up by a sample's true step, never by its place in an update.

    Args:
        rewards: name -> rewards [P, S], nan where scoring failed. Names without a weight are not trained on.
        weights: name -> weight of the trained rewards.
        settings: scale, synergy, time weights and clamp.
        steps: T, of the schedule.

    Raises:
        RunError: a trained reward has no scores.

    Source: Customized-GRPO Eqs. 8, 10 to 12.
    """
    parts, failed_PS = normalized(rewards, weights, settings)
    weights_T = _weights_by_step(weights, settings, steps)
    total_TPS = torch.zeros(steps, *failed_PS.shape)
    for name, part_PS in parts.items():
        total_TPS += weights_T[name][:, None, None] * part_PS
    if settings.synergy is not None:
        total_TPS += settings.synergy.alpha * _pairwise_synergy(parts, settings.synergy.kind)
        if settings.synergy.recenter:
            known_TPS = total_TPS.masked_fill(failed_PS, torch.nan)
            total_TPS = total_TPS - known_TPS.nanmean(dim=2, keepdim=True)
    if settings.clamp is not None:
        total_TPS = total_TPS.clamp(-settings.clamp, settings.clamp)
    return total_TPS.masked_fill(failed_PS, torch.nan)


def normalized(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: AdvantageSettings
) -> tuple[dict[str, Tensor], Tensor]:
    """Each trained reward normalized within its groups [P, S], 0 where a sample failed; and which failed."""
    trained = _trained(rewards, weights)
    failed_PS = torch.stack([rewards_PS.isnan() for rewards_PS in trained.values()]).any(dim=0)
    return {
        name: group_advantages(
            rewards_PS.masked_fill(failed_PS, torch.nan), settings.scale.value, settings.eps
        )
        for name, rewards_PS in trained.items()
    }, failed_PS


def _weights_by_step(
    weights: Mapping[str, float], settings: AdvantageSettings, steps: int
) -> dict[str, Tensor]:
    """Each trained reward's weight at every step [T]."""
    if settings.time is None:
        return {name: torch.full((steps,), weight) for name, weight in weights.items()}
    prompt_T = settings.time.prompt_weights(steps)
    identity = settings.time.identity
    whole = {
        role: sum(weight for name, weight in weights.items() if (name in identity) is role)
        for role in (True, False)
    }
    return {
        name: weight / whole[name in identity] * (1 - prompt_T if name in identity else prompt_T)
        for name, weight in weights.items()
    }


def _pairwise_synergy(parts: Mapping[str, Tensor], kind: SynergyKind) -> Tensor:
    """The mean over all pairs of rewards of S, or of -S where both advantages are bad, [P, S]."""
    terms = [
        shape_advantage(one, other, 0.0, 0.0, 1.0, kind.value)
        for one, other in combinations(parts.values(), 2)
    ]
    return torch.stack(terms).mean(dim=0)


def conflict_metrics(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: AdvantageSettings
) -> dict[str, float]:
    """How trained rewards go together, as means over their pairs; nothing for one reward.

    `conflict_share`: samples whose two advantages have opposite signs. Independent rewards conflict in half of them,
    so `reward_correlation` stands beside it.
    """
    parts, failed_PS = normalized(rewards, weights, settings)
    pairs = [(one[~failed_PS], other[~failed_PS]) for one, other in combinations(parts.values(), 2)]
    if not pairs:
        return {}
    shares = [(one * other < 0).float().mean() for one, other in pairs]
    correlations = [_correlation(one, other) for one, other in pairs]
    return {
        "conflict_share": torch.stack(shares).mean().item(),
        "reward_correlation": torch.stack(correlations).mean().item(),
    }


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's, of advantages that are centred in their groups; nan where one of them is flat."""
    scale = one.square().sum().sqrt() * other.square().sum().sqrt()
    return (one * other).sum() / scale if scale > 0 else torch.tensor(torch.nan)


def reward_metrics(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """What the log says of a step's rewards [P, S]: means, spreads, failures."""
    figures: dict[str, float] = {}
    for name, rewards_PS in rewards.items():
        known = rewards_PS[~rewards_PS.isnan()]
        figures[f"reward/{name}/mean"] = known.mean().item() if len(known) else torch.nan
        figures[f"reward/{name}/std"] = known.std(correction=0).item() if len(known) else torch.nan
    total_PS = torch.stack([weights[name] * one for name, one in _trained(rewards, weights).items()]).sum(
        dim=0
    )
    std_P = group_std(total_PS)
    known_P = std_P[~std_P.isnan()]
    figures["group_std"] = known_P.mean().item() if len(known_P) else torch.nan
    figures["zero_std_share"] = (known_P <= FLAT).float().mean().item() if len(known_P) else torch.nan
    figures["failed_share"] = total_PS.isnan().float().mean().item()
    return figures


def group_std(rewards_PS: Tensor) -> Tensor:
    """Each group's population standard deviation over the samples that were scored [P]; nan where none was."""
    known_PS = ~rewards_PS.isnan()
    count_P = known_PS.sum(dim=1)
    values_PS = torch.where(known_PS, rewards_PS, 0.0)
    mean_P = values_PS.sum(dim=1) / count_P
    squares_PS = torch.where(known_PS, (rewards_PS - mean_P[:, None]) ** 2, 0.0)
    return (squares_PS.sum(dim=1) / count_P).sqrt()


def _trained(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    missing = [name for name in weights if name not in rewards]
    if missing or not weights:
        raise RunError(
            f"No scores of the reward {missing[0]!r}."
            if missing
            else "No reward is trained on in this step: give one a weight."
        )
    return {name: rewards[name] for name in weights}
