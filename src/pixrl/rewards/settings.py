"""The rewards of a run with their weights and stages. Loads no torch."""

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
from pixrl.workers import LOCAL


def name_of(function: Callable[..., object]) -> str:
    """Return the qualified name of a function, or of the class of another callable."""
    named = function if isinstance(function, FunctionType | BuiltinFunctionType | type) else type(function)
    return named.__qualname__


def import_path(function: Callable[..., object]) -> str:
    """Return where a function was defined, `my_module:f` or `path/to/script.py:f`, as `pixrl resume` imports it."""
    name = str(function.__module__)
    main = vars(sys.modules[name]).get("__file__") if name == "__main__" else None
    return f"{name if main is None else main}:{name_of(function)}"


def is_importable(function: Callable[..., object]) -> bool:
    """Return whether a function's import path leads back to it; a lambda's or a nested function's does not."""
    module = sys.modules.get(str(function.__module__))
    return module is not None and vars(module).get(name_of(function)) is function


class ClusterShare(Settings):
    """What a reward takes of a Ray cluster, on which it scores beside the run (extra `ray`)."""

    ray: str = LOCAL
    """The cluster's address: local (this machine alone), auto (the one that it belongs to), or host:port."""
    cpus: float = Field(1.0, ge=0)
    """CPUs, and so threads; may be a fraction."""
    gpus: float | None = Field(None, ge=0)
    """GPUs; may be a fraction. None: 1 where the cluster has any."""


class RewardSetting(Settings):
    """The settings of one reward of a run."""

    name: str = Field(min_length=1)
    """The name in logs and weights; also which reward it is, unless `kind` says so."""
    kind: str | None = None
    """The reward, where the name is another one (two CLIPs, say): a built-in, or a plug-in `path/to/file.py:Name`."""
    weight: float = 1.0
    """The share in the advantage, after this reward's own normalization. Stages replace it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The parameters of the reward's class, such as `model: toy:clip`."""
    on: ClusterShare | None = Field(None, exclude_if=lambda on: on is None)
    """Where it scores: `ray`, or `{ray: ADDRESS, cpus: 1, gpus: 0.5}`; none: in the run's own process."""
    held_out: bool = False
    """Whether the reward is only logged, never trained on."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Accept a function in place of a reward (`rewards=[f]` in Python); name a plug-in after its class."""
        if callable(given):
            name = name_of(given).rpartition(".")[2]
            return {"name": name.strip("<>"), "kind": "python", "options": {"function": given}}
        path = given.get("name") if isinstance(given, Mapping) else None
        if isinstance(path, str) and is_path(path) and given.get("kind") is None:
            return {**given, "name": path.rpartition(":")[2], "kind": path}
        return given

    @field_validator("on", mode="before")
    @classmethod
    def _on_ray(cls, given: object) -> object:
        return {} if given == "ray" else given

    @field_serializer("options", when_used="json")
    def _with_paths(self, options: dict[str, Any]) -> dict[str, Any]:
        """Write functions as their import paths into recipe.yaml."""
        return {key: import_path(value) if callable(value) else value for key, value in options.items()}

    @property
    def reward(self) -> str:
        """The reward's name in `pixrl.rewards.REGISTRY`: a built-in's, or the path of a plug-in."""
        return self.name if self.kind is None else self.kind

    def with_full_paths(self) -> "RewardSetting":
        """Return the same setting with files and folders made absolute. Loads torch, but no model."""
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
    """The weights of a range of steps: from the end of the stage before (or 0) to `until`."""

    until: int | None = Field(default=None, gt=0)
    """The first step after the stage; null in the last stage, which has no end."""
    weights: dict[str, float]
    """Reward -> weight; a reward that is not named, or has 0, is only logged in this stage."""

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
    """Refuse rewards and stages that contradict each other or would have no effect. Nothing is loaded.

    Raises:
        ConfigError: says which setting, and what to type instead.
    """
    if not settings:
        raise ConfigError("No reward is given. Type, for example: rewards: [{name: geneval, options: {...}}]")
    before: set[str] = set()
    for setting in settings:
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
        before.add(name)
        if setting.weight != 1.0 and (setting.held_out or stages):
            why = "held out, so never trained on" if setting.held_out else "weighted by the stages"
            raise ConfigError(f"The weight of {name!r} would have no effect: it is {why}. Take it out.")
    trained = [setting.name for setting in settings if not setting.held_out]
    if not trained:
        raise ConfigError(
            f"Every reward is held out ({', '.join(s.name for s in settings)}), so nothing would be trained. "
            "Take `held_out: true` off at least one."
        )
    if stages:
        _check_stages(stages, [setting.name for setting in settings], trained)


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


def _check_stages(stages: Sequence[Stage], names: Sequence[str], trained: Sequence[str]) -> None:
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
    for number, stage in enumerate(stages, 1):
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
    idle = [name for name in trained if not any(stage.weights.get(name) for stage in stages)]
    if idle:
        raise ConfigError(
            f"No stage trains on {idle[0]!r}. Name it in a stage's weights, or set `held_out: true` to only log it."
        )
