"""From several rewards to one advantage a sample and step.

Rewards stay apart until here: each is normalized within its groups first, then they are weighted and added, so that a
reward with large numbers does not drown the others. A sample that failed in any trained reward is left out of every
statistic, and its advantage is nan here: the update drops it.

Customized-GRPO's two parts, SARS and TDW (`customized_grpo.py`), are settings of it: each works alone, and with every
loss that learns from advantages. The clamp is on what comes out, not on each reward's own advantage.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pixrl.algorithms.customized_grpo import SynergySettings, TimeSettings, pairwise_synergy
from pixrl.config import Settings
from pixrl.equations import group_advantages
from pixrl.errors import RunError

FLAT = 1e-6
"""The standard deviation below which a group counts as one without a signal."""


class AdvantageScale(StrEnum):
    """The set of rewards whose standard deviation divides a reward's advantage."""

    GROUP = "group"
    GLOBAL = "global"
    """The standard deviation of all rewards of the step, prompts' means included (Flow-GRPO)."""
    NONE = "none"


class EstimatorSettings(Settings):
    """The settings of an advantage estimator, and what is known of it before there are scores.

    An estimator of your own has a class `Settings` derived from this one.
    """

    kind: str

    @property
    def normalization(self) -> "AdvantageSettings":
        """The settings by which rewards are put on one scale where the log compares them."""
        return AdvantageSettings()

    @property
    def leaves_flat_out(self) -> bool:
        """Whether groups whose samples all have the same advantage cost no update."""
        return False

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """Raise ValueError where these trained rewards (name -> weight) do not fit."""

    def describe(self) -> str:
        """Return the settings in a line, for the report."""
        given = self.model_dump(exclude={"kind"}, mode="json").items()
        return ", ".join([self.kind, *(f"{name} {value}" for name, value in given)])


class AdvantageSettings(EstimatorSettings):
    """The settings of group advantages (Customized-GRPO Eq. 8), with SARS and TDW where they are set."""

    kind: Literal["group"] = Field("group", exclude=True)

    scale: AdvantageScale = AdvantageScale.GROUP
    clamp: float | None = Field(5.0, gt=0)
    """Largest magnitude of an advantage; none: no limit."""
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
        if self.scale is AdvantageScale.NONE and self.eps != 1e-4:
            raise ValueError("eps has no effect with scale: none: remove it")
        return self

    @property
    def normalization(self) -> "AdvantageSettings":
        return self

    @property
    def leaves_flat_out(self) -> bool:
        return self.skip_flat

    def describe_scale(self) -> str:
        """Return whose deviation divides, for the report."""
        return (
            "not divided"
            if self.scale is AdvantageScale.NONE
            else f"divided by the {self.scale.value} deviation"
        )

    def describe(self) -> str:
        parts = [part.describe() for part in (self.synergy, self.time) if part is not None]
        limit = "" if self.clamp is None else f", at most ±{self.clamp:g}"
        return ", ".join([self.describe_scale(), *parts]) + limit

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """Raise ValueError where synergy or time weights cannot work with these trained rewards (name -> weight)."""
        if self.synergy is not None:
            self.synergy.check_rewards(weights)
        if self.time is not None:
            self.time.check_rewards(weights)


class AdvantageEstimator(ABC):
    """An advantage estimator: it makes a step's advantages of the scores."""

    Settings: ClassVar[type[EstimatorSettings]]
    """The class of its settings; their `kind` is how a recipe names it."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def __call__(self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], steps: int) -> Tensor:
        """Return the advantages [T, P, S] of all groups at every step of the schedule; nan leaves a sample out.

        Args:
            rewards: name -> rewards [P, S], nan where scoring failed.
            weights: name -> weight of the trained rewards.
            steps: T, of the schedule.
        """


class GroupAdvantage(AdvantageEstimator):
    """Group advantages: each reward normalized within its groups, then weighted and added, with SARS and TDW if set."""

    Settings = AdvantageSettings
    settings: AdvantageSettings

    def __call__(self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], steps: int) -> Tensor:
        """Return the advantages [T, P, S] of all groups at every step of the schedule; nan leaves a sample out.

        Without time weights all steps are equal. Look advantages up by a sample's true step, never by its place in an
        update.

        Args:
            rewards: name -> rewards [P, S], nan where scoring failed. Names without a weight are not trained on.
            weights: name -> weight of the trained rewards.
            steps: T, of the schedule.

        Raises:
            RunError: a trained reward has no scores.

        Source: Customized-GRPO Eq. 8 (each reward's own advantage), Eqs. 10 and 11 (SARS), Eq. 12 (TDW).
        """
        settings = self.settings
        parts, failed_PS = normalized(rewards, weights, settings)
        if settings.time is None:
            weights_T = {name: torch.full((steps,), weight) for name, weight in weights.items()}
        else:
            weights_T = settings.time.weights_by_step(weights, steps)
        total_TPS = torch.zeros(steps, *failed_PS.shape)
        for name, part_PS in parts.items():
            total_TPS += weights_T[name][:, None, None] * part_PS
        if settings.synergy is not None:
            total_TPS += settings.synergy.alpha * pairwise_synergy(parts, settings.synergy.kind)
            if settings.synergy.recenter:
                known_TPS = total_TPS.masked_fill(failed_PS, torch.nan)
                total_TPS = total_TPS - known_TPS.nanmean(dim=2, keepdim=True)
        if settings.clamp is not None:
            total_TPS = total_TPS.clamp(-settings.clamp, settings.clamp)
        return total_TPS.masked_fill(failed_PS, torch.nan)


def normalized(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: AdvantageSettings
) -> tuple[dict[str, Tensor], Tensor]:
    """Return each trained reward normalized within its groups [P, S], 0 where a sample failed; and which failed."""
    trained = _trained(rewards, weights)
    failed_PS = torch.stack([rewards_PS.isnan() for rewards_PS in trained.values()]).any(dim=0)
    return {
        name: group_advantages(
            rewards_PS.masked_fill(failed_PS, torch.nan), settings.scale.value, settings.eps
        )
        for name, rewards_PS in trained.items()
    }, failed_PS


def conflict_metrics(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: EstimatorSettings
) -> dict[str, float]:
    """Return how far trained rewards agree, as means over their pairs; nothing for one reward.

    `conflict_share`: samples whose two advantages have opposite signs. Independent rewards conflict in half of them,
    so `reward_correlation` stands beside it.
    """
    parts, failed_PS = normalized(rewards, weights, settings.normalization)
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
    """Return the log's figures of a step's rewards [P, S]: means, standard deviations, shares of failures."""
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
    """Return each group's population standard deviation over the samples that were scored [P]; nan where none was."""
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
