"""The reward interface, and the one of rewards whose gradient reaches the picture.

All that is known of one reward is in its class: what it is made with, what it reads and needs (`pixrl doctor` asks),
and how it scores.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, get_args

from torch import Tensor

from pixrl.errors import CheckpointError, Failure
from pixrl.types import RewardBatch, Scores

Options = Mapping[str, object]
"""A reward's options, those that were left out by their defaults."""
NO_MODEL = "./no-model"
"""A reference that no reward can load."""


class Form(StrEnum):
    """How a model is read."""

    MODEL = "model"
    """A transformers folder with its weights, or one file of weights."""
    FILES = "files"
    """Published files: the first one by its path, or all of them in a folder."""
    WORDS = "words"
    """Config, tokenizer or preprocessing, without weights: any of the files."""


@dataclass(frozen=True)
class Read:
    """How a reward reads the model that one of its options names; for `pixrl doctor`, which looks for it."""

    form: Form = Form.MODEL
    files: Sequence[str] = ("config.json",)
    """What they are called."""
    usual: object = None
    """What is read where the option is left out; None: nothing."""
    beside: bool = False
    """Whether the files then lie beside the model's, which published ones do not."""
    alone: bool = False
    """Whether one file of weights will do for a MODEL."""
    kinds: Sequence[str] = ()
    """The model types of transformers that will do; none: any."""
    advice: str = ""
    """What else to give."""

    def named(self, options: Options, option: str) -> object:
        """What the option names, or what is read in its place; None: nothing is."""
        given = options.get(option)
        return self.usual if given is None else given


class Reward(ABC):
    """Scores pictures, higher is better. A sample that cannot be scored gets nan and a reason, never 0."""

    name: str
    provenance: Mapping[str, str] = {}
    """What its scores come from: id, checksum, revision and licence of the weights, and how pictures reach them."""
    examples: ClassVar[Mapping[str, object]] = {}
    """Option that it cannot do without -> a value, for messages."""
    licences: ClassVar[Mapping[str, str]] = {}
    """Hub id -> licence of published weights, or of the code that they come with where they state none."""
    runs_functions: ClassVar[bool] = False
    """It executes functions of yours that its options name. `pixrl doctor` reads their files and never runs them."""
    key_option: ClassVar[str | None] = None
    """Its option that names the environment variable of a key; None: it takes no key."""
    keeps_time: ClassVar[bool] = False
    """It bounds its own time, for it may wait long for a service that is gone: a `RewardSet` does not cut it off."""

    @classmethod
    def lacks(cls, prompt: str, metadata: Mapping[str, object], options: Mapping[str, object]) -> str | None:
        """Why no picture of a prompt can be scored, by the prompt and what is known of it; None where nothing is.

        Asked before anything is loaded: `options` are what the reward will be made with.
        """
        return None

    @classmethod
    def lacks_package(cls, metadata: Sequence[Mapping[str, object]]) -> str | None:
        """Which optional package it needs for prompts of this metadata; None where nothing is missing.

        Returns:
            The end of a sentence that begins with the reward's name.
        """
        return None

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        """Option that names a model -> how it is read: what `pixrl doctor` looks for.

        Unless a reward says so itself, every parameter of the type `str | Path` names a transformers folder or a file.

        Raises:
            ConfigError: an option is none of its choices.
            CheckpointError: what one model says of another cannot be read.
        """
        return dict.fromkeys(path_options(cls), Read(alone=True))

    @classmethod
    def examine(cls, options: Options) -> None:
        """Raises what making it with these options would raise, but loads no model.

        It is made with a reference to nothing in place of each model: so it refuses options and services that it
        cannot use, and then its first missing model, before it would load anything.
        """
        reads = cls.reads(options).items()
        nothing = {option: NO_MODEL for option, read in reads if read.named(options, option) is not None}
        place = {"device": "cpu", "dtype": "float32"}
        make: Callable[..., Reward] = cls
        with suppress(CheckpointError):
            make(**{**options, **{key: place[key] for key in place if key in options}, **nothing})

    @classmethod
    def notes(cls, options: Options, *, announced: bool) -> Iterator[str]:
        """What is worth knowing before it is made, each the end of a sentence that begins with the reward's name.

        `announced`: what it prints itself when it is made is left out.
        """
        yield from ()

    @abstractmethod
    def score(self, batch: RewardBatch) -> Scores:
        """One float a sample. Scores do not depend on how a set is cut into batches."""

    def rehearse(self, batch: RewardBatch) -> Scores | Failure:
        """`score`, of a synthetic batch before a run: a failure where it can score nothing whatever is shown."""
        return self.score(batch)


class DifferentiableReward(Reward):
    """A reward that can also be differentiated by the picture, for direct reward back-propagation.

    Its own parameters are frozen: the gradient goes to the pictures alone.
    """

    @abstractmethod
    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        """Scores [B], float32 on the pictures' device, with a graph back to the pictures.

        They are what `score` gives, but for the rounding to 8 bits, through which no gradient passes: pictures are
        resized, cropped and normalized as tensors, within about one grey level of `score`'s. A sample that `score`
        fails is nan here: leave it out before averaging (`scores[scores.isfinite()]`), or its nan spreads.

        Args:
            images_BCHW: float [B, 3, H, W] in [0, 1]; values outside are clamped and get no gradient.
            prompts: one a picture.
            metadata: one mapping a picture, as in `RewardBatch`; empty where the reward reads none.
        """


def path_options(kind: type[Reward]) -> list[str]:
    """The parameters of a class whose type allows a `Path`: they name a folder, a file or a hub id."""
    parameters = inspect.signature(kind).parameters.values()
    # a type is a text in a module that puts off evaluating types
    return [
        one.name
        for one in parameters
        if Path in get_args(one.annotation)
        or one.annotation is Path
        or (isinstance(one.annotation, str) and "Path" in one.annotation)
    ]
