"""From several rewards to one advantage a sample.

Rewards stay apart until here: each is normalized within its groups first, then they are weighted and added, so that a
reward with large numbers does not drown the others. A sample that failed in any trained reward is left out of every
statistic, and its advantage is nan here: the update drops it.
"""

from collections.abc import Mapping
from enum import StrEnum

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pixrl.config import Settings
from pixrl.equations import group_advantages
from pixrl.errors import RunError

FLAT = 1e-6
"""Below this standard deviation a group counts as one without a signal."""


class Scale(StrEnum):
    """Whose standard deviation divides a reward's advantage."""

    GROUP = "group"
    GLOBAL = "global"
    """Of all rewards of the step."""
    NONE = "none"


class AdvantageSettings(Settings):
    """How rewards become advantages."""

    scale: Scale = Scale.GROUP
    clamp: float | None = Field(5.0, gt=0)
    """Largest magnitude; none: no limit."""
    eps: float = Field(1e-4, ge=0)
    """Added to the standard deviation."""

    @model_validator(mode="after")
    def _no_eps_without_scale(self) -> "AdvantageSettings":
        if self.scale is Scale.NONE and self.eps != 1e-4:
            raise ValueError("eps has no effect with scale: none: remove it")
        return self


def combine(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: AdvantageSettings
) -> Tensor:
    """Advantages [P, S] of all groups; nan marks a sample to leave out.

    Args:
        rewards: name -> rewards [P, S], nan where scoring failed. Names without a weight are not trained on.
        weights: name -> weight of the trained rewards.
        settings: scale and clamp.

    Raises:
        RunError: a trained reward has no scores.
    """
    trained = _trained(rewards, weights)
    failed_PS = torch.stack([rewards_PS.isnan() for rewards_PS in trained.values()]).any(dim=0)
    total_PS = torch.zeros(failed_PS.shape)
    for name, rewards_PS in trained.items():
        known_PS = rewards_PS.masked_fill(failed_PS, torch.nan)
        total_PS += weights[name] * group_advantages(known_PS, settings.scale.value, settings.eps)
    if settings.clamp is not None:
        total_PS = total_PS.clamp(-settings.clamp, settings.clamp)
    return total_PS.masked_fill(failed_PS, torch.nan)


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
