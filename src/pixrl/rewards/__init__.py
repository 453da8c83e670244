"""Rewards: what scores pictures. `load("clip_text", model="toy:clip")` gives one by name.

Importing this package imports no torch.
"""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pixrl.errors import ConfigError, InputError, did_you_mean
from pixrl.hub import full_path

if TYPE_CHECKING:
    from pixrl.rewards.base import Reward

__all__ = ["REWARDS", "load"]

REWARDS = {
    "aesthetic": "pixrl.rewards.aesthetic:AestheticReward",
    "blip_vqa": "pixrl.rewards.zoo.blip_vqa:BlipVQAReward",
    "clip_i": "pixrl.rewards.clip:ClipIReward",
    "clip_image": "pixrl.rewards.clip:ClipImageReward",
    "clip_t": "pixrl.rewards.clip:ClipTReward",
    "clip_text": "pixrl.rewards.clip:ClipTextReward",
    "dino": "pixrl.rewards.dino:DinoReward",
    "dino_seg": "pixrl.rewards.dino:DinoSegReward",
    "geneval": "pixrl.rewards.geneval:GenEvalReward",
    "hpsv2": "pixrl.rewards.zoo.hpsv2:HPSv2Reward",
    "hpsv3": "pixrl.rewards.zoo.hpsv3:HPSv3Reward",
    "image_reward": "pixrl.rewards.zoo.image_reward:ImageReward",
    "judge": "pixrl.rewards.judge:JudgeReward",
    "ocr": "pixrl.rewards.zoo.ocr:OcrReward",
    "preference": "pixrl.rewards.preference:PreferenceReward",
    "python": "pixrl.rewards.python:PythonReward",
    "remote": "pixrl.rewards.remote:RemoteReward",
    "vqascore": "pixrl.rewards.zoo.vqascore:VQAScoreReward",
}
"""Name -> class."""
_EXAMPLES = {
    "base_url": "http://127.0.0.1:8000/v1",
    "function": "my_module:f",
    "head": "sac+logos+ava1-l14-linearMSE.pth",
    "reward": "geneval",
    "url": "http://127.0.0.1:8765",
}
"""Of options that a reward cannot do without."""


def load(name: str, **options: object) -> "Reward":
    """A reward by name; the options are its class's parameters.

    Raises:
        InputError: there is no reward of that name.
        ConfigError: the reward has no such option, or one that it needs is missing.
        CheckpointError: a model it needs is missing or half written.
    """
    checked_options(name, options)
    reward: Reward = _class_of(name)(**options)
    return reward


def checked_options(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """The options of a reward, those left out by their defaults. Loads torch, but no model.

    Raises:
        InputError: there is no reward of that name.
        ConfigError: the reward has no such option, or one that it needs is missing.
    """
    if name not in REWARDS:
        raise InputError(
            f"Unknown reward {name!r}.{did_you_mean(name, REWARDS)} There are {', '.join(REWARDS)}."
        )
    make = _class_of(name)
    parameters = inspect.signature(make).parameters
    for option in options:
        if option not in parameters:
            raise ConfigError(
                f"The reward {name!r} has no option {option!r}.{did_you_mean(option, parameters)} "
                f"It has {', '.join(parameters)}."
            )
    missing = [
        key for key, p in parameters.items() if p.default is inspect.Parameter.empty and key not in options
    ]
    if missing:
        example = _EXAMPLES.get(missing[0], "toy:clip")
        raise ConfigError(
            f"The reward {name!r} needs the option {missing[0]!r}, for example {missing[0]}: {example}"
        )
    return {key: p.default for key, p in parameters.items() if key not in options} | dict(options)


def takes(name: str, option: str) -> bool:
    """Whether a reward of the table has such an option."""
    return option in inspect.signature(_class_of(name)).parameters


def with_full_paths(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """A reward's options, those that name files or folders of this disk by their whole paths. Loads torch, no model."""
    parameters = inspect.signature(_class_of(name)).parameters
    return {
        key: _full(value, Path in get_args(parameters[key].annotation))
        if isinstance(value, str) and key in parameters
        else value
        for key, value in options.items()
    }


def _full(value: str, is_reference: bool) -> str:
    """`value` may also be a function of a file, `path/to/file.py:f`."""
    file, colon, function = value.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{full_path(file)}:{function}"
    return full_path(value) if is_reference else value


def is_differentiable(name: str) -> bool:
    """Whether a reward of the table has a gradient by the picture. Loads torch, but no model."""
    from pixrl.rewards.base import DifferentiableReward

    return issubclass(kind_of(name), DifferentiableReward)


def kind_of(name: str) -> "type[Reward]":
    """The class of a reward of the table. Loads torch, but no model."""
    kind: type[Reward] = _class_of(name)
    return kind


def _class_of(name: str) -> Any:
    module, _, class_name = REWARDS[name].partition(":")
    return importlib.import_module(module).__dict__[class_name]
