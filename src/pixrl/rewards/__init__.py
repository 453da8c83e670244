"""The rewards, which score pictures: `load("clip_text", model="toy:clip")` makes one by its name.

Importing this package imports no torch.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixrl.errors import ConfigError, did_you_mean
from pixrl.hub import full_path
from pixrl.plugins import Registry

if TYPE_CHECKING:
    from pixrl.rewards.base import Reward

__all__ = ["REGISTRY", "REWARDS", "load"]

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
    "votes": "pixrl.rewards.votes.reward:VotesReward",
    "vqascore": "pixrl.rewards.zoo.vqascore:VQAScoreReward",
}
"""The built-in rewards: name -> "module:Class"."""


REGISTRY = Registry("reward", "pixrl.rewards", REWARDS)
"""Every reward that a recipe can name: `REWARDS`, entry points of installed packages, and the user's own classes."""


def load(name: str, **options: object) -> "Reward":
    """Make a reward by its name.

    Args:
        name: a name of `REWARDS`, or that of a plug-in (see `pixrl.plugins`).
        options: the parameters of the reward's class.

    Raises:
        InputError: there is no reward of that name.
        ConfigError: the reward has no such option, or one that it needs is missing.
        CheckpointError: a model it needs is missing or half written.
    """
    checked_options(name, options)
    make: Any = kind_of(name)
    reward: Reward = make(**options)
    if name not in REWARDS:
        from pixrl.rewards.weights import describe_function

        # with the checksum of a plug-in's file in its provenance, a resume refuses a changed one
        code = describe_function(type(reward), name)
        reward.provenance = {**reward.provenance, "code": code["model"]} if reward.provenance else code
    return reward


def checked_options(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Return a reward's options with the defaults filled in. Loads torch, but no model.

    Raises:
        InputError: there is no reward of that name.
        ConfigError: the reward has no such option, or one that it needs is missing.
    """
    kind = kind_of(name)
    parameters = inspect.signature(kind).parameters
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
        example = (
            f", for example {missing[0]}: {kind.examples[missing[0]]}" if missing[0] in kind.examples else "."
        )
        raise ConfigError(f"The reward {name!r} needs the option {missing[0]!r}{example}")
    return {key: p.default for key, p in parameters.items() if key not in options} | dict(options)


def takes(name: str, option: str) -> bool:
    """Return whether the reward has the option."""
    return option in inspect.signature(kind_of(name)).parameters


def with_full_paths(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Return a reward's options with local files and folders made absolute. Loads torch, but no model."""
    from pixrl.rewards.base import path_options

    places = path_options(kind_of(name))
    found = dict(options)
    for key, value in options.items():
        if isinstance(value, str):
            file, colon, function = value.rpartition(":")
            if colon and file.endswith(".py"):
                found[key] = f"{full_path(file)}:{function}"
            elif key in places:
                found[key] = full_path(value)
    return found


def is_differentiable(name: str) -> bool:
    """Return whether a reward has a gradient with respect to the picture. Loads torch, but no model."""
    from pixrl.rewards.base import DifferentiableReward

    return issubclass(kind_of(name), DifferentiableReward)


def kind_of(name: str) -> "type[Reward]":
    """Return the class of a reward. Loads torch, but no model.

    Raises:
        InputError: there is no reward of that name.
        ConfigError: a plug-in cannot be imported, or is no `Reward`.
    """
    from pixrl.rewards.base import Reward

    kind = REGISTRY.find(name)
    if not (isinstance(kind, type) and issubclass(kind, Reward)):
        raise ConfigError(f"{name} is {kind!r}, which is no class that extends pixrl.rewards.base.Reward.")
    return kind
