"""What a run changed on the prompts of its evaluation: every figure before and after, and how much of it is chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pixrl.metrics.intervals import Interval, bootstrap
from pixrl.report import describe as words
from pixrl.runs.config import AlignConfig
from pixrl.runs.folder import RunFolder
from pixrl.runs.log import sample_scores
from pixrl.runs.record import base_and_last

FALL = 0.005
"""A reward that fell by less, as a share of its size before, is not pointed out."""
KEPT = 0.8
"""Diversity below this share of the base's is pointed out."""


@dataclass(frozen=True)
class Change:
    """One figure of the evaluation's prompts, before and after."""

    name: str
    role: str
    before: float
    after: float
    interval: Interval | None = None
    """95 % of the gain over prompts; None: not known."""

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def is_decided(self) -> bool:
        """Whether another choice of such prompts would leave the direction as it is, as far as is known."""
        return self.interval is None or self.interval.excludes_zero

    @property
    def fell(self) -> bool:
        return self.is_decided and self.gain < -FALL * abs(self.before)

    @property
    def css(self) -> str:
        """A colour for what is known to have moved."""
        if self.interval is None or not self.interval.excludes_zero:
            return ""
        return "up" if self.gain > 0 else "down"

    def gain_text(self) -> str:
        """Such as `+0.030 [0.012, 0.049]`."""
        if math.isnan(self.gain):
            return "–"
        bounds = "" if self.interval is None else f" [{self.interval.low:+.3f}, {self.interval.high:+.3f}]"
        return f"{self.gain:+.3f}{bounds}"


def changes_of(folder: RunFolder, config: AlignConfig) -> list[Change]:
    """Every reward and the diversity of the base and at the last evaluation; empty where there are not both."""
    evaluated = base_and_last(folder)
    if not evaluated:
        return []
    first, last = evaluated
    chances = _chances(folder, (first["step"], last["step"]), config.evaluation.per_prompt)
    roles = {setting.name: words.role_of(config, setting) for setting in config.rewards}
    found = [
        Change(
            name,
            role,
            _number(first.get(f"{name}/mean")),
            _number(last.get(f"{name}/mean")),
            chances.get(name),
        )
        for name, role in roles.items()
    ]
    if "diversity" in last:
        found.append(Change("diversity", "spread", _number(first["diversity"]), _number(last["diversity"])))
    return found


def _chances(folder: RunFolder, steps: tuple[int, int], per_prompt: int) -> dict[str, Interval]:
    """Reward -> the interval of its gain over prompts, from the same noise before and after."""
    before, after = (sample_scores(folder, step) for step in steps)
    both = [name for name in before if len(before[name]) == len(after.get(name, ()))]
    found = {name: _by_prompt(before[name], after[name], per_prompt) for name in both}
    return {name: bootstrap(gains) for name, gains in found.items() if len(gains) > 1}


def _by_prompt(before: Sequence[float | None], after: Sequence[float | None], per_prompt: int) -> list[float]:
    """Each prompt's mean gain over its pictures that have both scores; prompts without one are left out."""
    gains = [
        math.nan if old is None or new is None else new - old for old, new in zip(before, after, strict=True)
    ]
    groups = [gains[at : at + per_prompt] for at in range(0, len(gains), per_prompt)]
    known = [[gain for gain in group if not math.isnan(gain)] for group in groups]
    return [sum(group) / len(group) for group in known if group]


def warnings(changes: Sequence[Change]) -> list[str]:
    """What a person should look at before trusting the run: signs of reward hacking."""
    risen = [c for c in changes if c.role == words.TRAINED and c.is_decided and c.gain > 0]
    found = [
        f"{c.name}, which was never trained on, fell from {c.before:.3f} to {c.after:.3f} ({_chance(c)}), while "
        f"{' and '.join(r.name for r in risen)} rose. Look at the pictures before you trust the gain."
        for c in changes
        if risen and c.role == words.HELD_OUT and c.fell
    ]
    found += [
        f"Diversity is {c.after / c.before:.2f} of the base's: the pictures of a prompt grow alike."
        for c in changes
        if c.role == "spread" and c.before > 0 and c.after < KEPT * c.before
    ]
    return found


def _chance(change: Change) -> str:
    if change.interval is None:
        return "how much of it is chance is not known"
    return f"{change.gain_text()} over {change.interval.count} prompts"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
