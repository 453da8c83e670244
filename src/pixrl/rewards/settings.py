"""Which rewards a run has, how much each counts, and when. Loads no torch."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import BuiltinFunctionType, FunctionType
from typing import Any

from pydantic import Field, field_serializer, field_validator, model_validator

from pixrl import rewards
from pixrl.config import Settings
from pixrl.errors import ConfigError, InputError, did_you_mean
from pixrl.plugins import full_path, is_path
from pixrl.text import require_text


def name_of(function: Callable[..., object]) -> str:
    """What a function, or whatever else can be called, is called: its own name, or that of its class."""
    named = function if isinstance(function, FunctionType | BuiltinFunctionType | type) else type(function)
    return named.__qualname__


def import_path(function: Callable[..., object]) -> str:
    """Where a function was defined, `my_module:f`, or `path/to/script.py:f`: what `pixrl resume` would import."""
    name = str(function.__module__)
    main = vars(sys.modules[name]).get("__file__") if name == "__main__" else None
    return f"{name if main is None else main}:{name_of(function)}"


def is_importable(function: Callable[..., object]) -> bool:
    """Whether its import path leads to it again: not of one that was made within another, nor of a lambda."""
    module = sys.modules.get(str(function.__module__))
    return module is not None and vars(module).get(name_of(function)) is function


class RewardSetting(Settings):
    """One reward of a run."""

    name: str = Field(min_length=1)
    """What logs and weights call it; also which reward it is, unless `kind` says so."""
    kind: str | None = None
    """Which reward, where the name is another one (two CLIPs, say), or a class of yours: `path/to/file.py:Name`."""
    weight: float = 1.0
    """Its share in the advantage, after its own normalization. Stages replace it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The options of the reward's class, such as `model: toy:clip`."""
    held_out: bool = False
    """Only logged, never trained on."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A function in place of a reward, in Python (`rewards=[f]`); a class of yours is called by its own name."""
        if callable(given):
            name = name_of(given).rpartition(".")[2]
            return {"name": name.strip("<>"), "kind": "python", "options": {"function": given}}
        path = given.get("name") if isinstance(given, Mapping) else None
        if isinstance(path, str) and is_path(path) and given.get("kind") is None:
            return {**given, "name": path.rpartition(":")[2], "kind": path}
        return given

    @field_serializer("options", when_used="json")
    def _with_paths(self, options: dict[str, Any]) -> dict[str, Any]:
        """Functions by their import paths, as recipe.yaml keeps them."""
        return {key: import_path(value) if callable(value) else value for key, value in options.items()}

    @property
    def reward(self) -> str:
        """Which reward it is: a name of the table, or the path of a class of yours."""
        return self.name if self.kind is None else self.kind

    def with_full_paths(self) -> "RewardSetting":
        """The same with files and folders by their whole paths. Loads torch, but no model."""
        kind = None if self.kind is None else full_path(self.kind)
        options = rewards.with_full_paths(self.reward, self.options)
        return self.model_copy(update={"kind": kind, "options": options})

    @field_validator("name")
    @classmethod
    def _is_text(cls, name: str) -> str:
        return require_text(name, f"the name {name!r}")

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"a weight is a finite number above 0, got {weight:g}. "
                "A reward that is only logged has no weight and `held_out: true`."
            )
        return weight


class Stage(Settings):
    """The weights of some steps: those from the end of the stage before (or 0) to `until`."""

    until: int | None = Field(default=None, gt=0)
    """The first step that no longer belongs to it; null in the last stage, which has no end."""
    weights: dict[str, float]
    """Reward -> weight; what is not named, or has 0, is only logged in this stage."""

    @field_validator("weights")
    @classmethod
    def _count(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {name!r} is a finite number from 0 up, got {weight:g}.")
        if not any(weights.values()):
            raise ValueError(
                "every weight is 0, so nothing would be trained. Give one reward a weight above 0."
            )
        return weights


def check_rewards(settings: Sequence[RewardSetting], stages: Sequence[Stage]) -> None:
    """Refuses rewards and stages that contradict each other or would have no effect. Nothing is loaded.

    Raises:
        ConfigError: says which setting, and what to type instead.
    """
    if not settings:
        raise ConfigError("No reward is given. Type, for example: rewards: [{name: geneval, options: {...}}]")
    for position, setting in enumerate(settings):
        _check_setting(setting, {other.name for other in settings[:position]}, staged=bool(stages))
    trained = [setting.name for setting in settings if not setting.held_out]
    if not trained:
        raise ConfigError(
            f"Every reward is held out ({', '.join(s.name for s in settings)}), so nothing would be trained. "
            "Take `held_out: true` off at least one."
        )
    _check_ends(stages)
    for number, stage in enumerate(stages, 1):
        _check_names(number, stage, settings, trained)
    idle = [name for name in trained if stages and not any(stage.weights.get(name) for stage in stages)]
    if idle:
        raise ConfigError(
            f"No stage trains on {idle[0]!r}. Name it in a stage's weights, or set `held_out: true` to only log it."
        )


def weights_by_stage(
    settings: Sequence[RewardSetting], stages: Sequence[Stage]
) -> list[tuple[int | None, Mapping[str, float]]]:
    """Return each stage's end and its trained rewards' weights above 0, in the order of the settings.

    The last stage, or the only one where none are given, has no end.
    """
    if not stages:
        return [(None, {setting.name: setting.weight for setting in settings if not setting.held_out})]
    return [
        (stage.until, {s.name: stage.weights[s.name] for s in settings if stage.weights.get(s.name)})
        for stage in stages
    ]


def _check_setting(setting: RewardSetting, before: set[str], *, staged: bool) -> None:
    name = setting.name
    try:
        rewards.REGISTRY.require(setting.reward)
    except InputError as error:
        raise ConfigError(str(error)) from None
    if name in before:
        raise ConfigError(
            f"Two rewards are called {name!r}. Give one another name and say which it is: "
            f"{{name: {name}_2, kind: {setting.reward}, ...}}"
        )
    if setting.weight != 1.0 and (setting.held_out or staged):
        why = "held out, so never trained on" if setting.held_out else "weighted by the stages"
        raise ConfigError(f"The weight of {name!r} would have no effect: it is {why}. Take it out.")


def _check_ends(stages: Sequence[Stage]) -> None:
    if not stages:
        return
    for number, (stage, after) in enumerate(pairwise(stages), 1):
        if stage.until is None:
            raise ConfigError(
                f"Stage {number} has no end, so stage {number + 1} would never begin. Give stage {number} an `until`."
            )
        if after.until is not None and after.until <= stage.until:
            raise ConfigError(
                f"Stages {number} and {number + 1} overlap: one ends at step {stage.until}, the next at "
                f"{after.until}. Each `until` must be above the one before."
            )
    if stages[-1].until is not None:
        raise ConfigError(
            f"The last stage ends at step {stages[-1].until}, and no weights are given after it. "
            "Leave its `until` out."
        )


def _check_names(
    number: int, stage: Stage, settings: Sequence[RewardSetting], trained: Sequence[str]
) -> None:
    names = [setting.name for setting in settings]
    for name in stage.weights:
        if name not in names:
            raise ConfigError(
                f"Stage {number} gives a weight to {name!r}, which is not among the rewards."
                f"{did_you_mean(name, names)} There are {', '.join(names)}."
            )
        if name not in trained:
            raise ConfigError(
                f"Stage {number} gives a weight to {name!r}, which is held out. "
                "Take it out of the stage, or take `held_out: true` off it."
            )
