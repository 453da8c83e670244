"""The interfaces of rewards, and of differentiable rewards, whose gradient reaches the picture.

A reward's class holds all that is known of it: its options, the files and packages it needs (`pixrl doctor` asks), and
how it scores.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, get_args

from torch import Tensor

from pixrl.errors import CheckpointError, Failure
from pixrl.types import RewardBatch, Scores

Options = Mapping[str, object]
"""A reward's options, with the defaults filled in."""
NO_MODEL = "./no-model"
"""A model reference that no reward can load."""


class Form(StrEnum):
    """The kind of files that a model reference stands for."""

    MODEL = "model"
    """A transformers folder with its weights, or one file of weights."""
    FILES = "files"
    """Published files: the path of the first one, or a folder or hub id that holds all of them."""
    WORDS = "words"
    """Config, tokenizer or preprocessing without weights: any of the files."""


@dataclass(frozen=True)
class Read:
    """The description of a model that one of a reward's options names, by which `pixrl doctor` looks for it."""

    form: Form = Form.MODEL
    files: Sequence[str] = ("config.json",)
    """The names of the files."""
    usual: object = None
    """The reference that is read where the option is left out; None: nothing is read."""
    beside: bool = False
    """Whether the files are looked for beside the model's where the option is left out; published ones lack them."""
    alone: bool = False
    """Whether one file of weights will do for a `Form.MODEL`."""
    kinds: Sequence[str] = ()
    """The accepted `model_type`s of transformers; empty: any."""
    advice: str = ""
    """The hint in the message about a missing model: what else to give."""

    def named(self, options: Options, option: str) -> object:
        """Return the reference that the option gives, or `usual` where it is left out; None: nothing is read."""
        given = options.get(option)
        return self.usual if given is None else given


class Reward(ABC):
    """The interface of a reward: it scores pictures, higher is better.

    A sample that cannot be scored gets nan and a reason, never 0.
    """

    name: str
    provenance: Mapping[str, str] = {}
    """The source of the scores: id, checksum, revision and licence of the weights, and the preprocessing."""
    examples: ClassVar[Mapping[str, object]] = {}
    """Example values of the required options, for messages."""
    licences: ClassVar[Mapping[str, str]] = {}
    """Hub id -> licence of published weights, or of the code that they come with where they state none."""
    runs_functions: ClassVar[bool] = False
    """Whether it executes the user's functions that its options name. `pixrl doctor` reads their files only."""
    key_option: ClassVar[str | None] = None
    """The option that names the environment variable of an API key; None: the reward takes no key."""
    keeps_time: ClassVar[bool] = False
    """Whether it bounds its own time, as one that waits for a lost service does: a `RewardSet` never cuts it off."""

    @classmethod
    def lacks(cls, prompt: str, metadata: Mapping[str, object], options: Mapping[str, object]) -> str | None:
        """Return why no picture of a prompt can be scored, judged by the prompt and its metadata; None where one can.

        It is asked before anything is loaded; `options` are those that the reward will be made with.
        """
        return None

    @classmethod
    def lacks_package(cls, metadata: Sequence[Mapping[str, object]]) -> str | None:
        """Return which optional package prompts with this metadata need; None where nothing is missing.

        Returns:
            The end of a sentence that begins with the reward's name.
        """
        return None

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        """Return the options that name a model, with how it is read: this is what `pixrl doctor` looks for.

        By default, every parameter of the type `str | Path` names a transformers folder or a file of weights.

        Raises:
            ConfigError: an option is none of its choices.
            CheckpointError: a model's config, which names another model, cannot be read.
        """
        return dict.fromkeys(path_options(cls), Read(alone=True))

    @classmethod
    def examine(cls, options: Options) -> None:
        """Raise what making the reward with these options would raise, but load no model.

        The reward is made with `NO_MODEL` in place of each model: it refuses options and services that it cannot use
        before it comes to the first model, which is missing.
        """
        reads = cls.reads(options).items()
        nothing = {option: NO_MODEL for option, read in reads if read.named(options, option) is not None}
        place = {"device": "cpu", "dtype": "float32"}
        make: Callable[..., Reward] = cls
        with suppress(CheckpointError):
            make(**{**options, **{key: place[key] for key in place if key in options}, **nothing})

    @classmethod
    def notes(cls, options: Options, *, announced: bool) -> Iterator[str]:
        """Yield what is worth knowing before the reward is made: ends of sentences that begin with its name.

        Args:
            options: those that the reward will be made with.
            announced: whether to leave out what the reward prints when it is made.
        """
        yield from ()

    @abstractmethod
    def score(self, batch: RewardBatch) -> Scores:
        """Score a batch: one float per sample, whatever batches a set of samples is divided into."""

    def expect(self, batch: RewardBatch) -> None:
        """Be given pictures as soon as they are drawn, before `score` is asked for them with the others of their step.

        A reward that scores elsewhere begins; others wait to be asked.
        """
        return None

    def reference_problem(self, metadata: Mapping[str, object]) -> str | None:
        """Return why no picture can be judged by a sample's references, or None; most rewards look at none."""
        return None

    def unused_references(self, metadata: Mapping[str, object]) -> list[int]:
        """Return which of a sample's references, counted from 1, it leaves out."""
        return []

    def rehearse(self, batch: RewardBatch) -> Scores | Failure:
        """Score a synthetic batch before a run; return a failure where the reward can score no picture at all."""
        return self.score(batch)


class ComparingReward(Reward):
    """A reward that compares the pictures of a training step's group, and says nothing of a picture alone.

    Its `score` is given batches with `origins`. Evaluations, where there are no groups, leave it out.
    """

    @abstractmethod
    def problem(self, others: Collection[str], processes: int) -> str | None:
        """Return why a run cannot have the reward; None where it can.

        Args:
            others: the names of the recipe's other rewards.
            processes: the number of processes of the run.

        Returns:
            The end of a sentence that begins with the reward's name, and what to type.
        """

    @abstractmethod
    def attend(self, folder: Path, others: Mapping[str, Reward], say: Callable[[str], None]) -> None:
        """Be told of the run before its first step: its folder, its other rewards, and how to speak to the user."""

    @abstractmethod
    def leave(self) -> None:
        """Be told that the run has ended."""


class DifferentiableReward(Reward):
    """A reward that is differentiable with respect to the picture, for direct reward back-propagation.

    Its own parameters are frozen: the gradient goes to the pictures alone.
    """

    @abstractmethod
    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        """Return scores [B], float32 on the pictures' device, with a graph back to the pictures.

        They equal those of `score` but for its rounding to 8 bits, through which no gradient passes: pictures are
        resized, cropped and normalized as tensors, within about one grey level of `score`'s. A sample that `score`
        fails is nan here: leave it out before averaging (`scores[scores.isfinite()]`), or its nan spreads.

        Args:
            images_BCHW: float [B, 3, H, W] in [0, 1]; values outside are clamped and get no gradient.
            prompts: one per picture.
            metadata: one mapping per picture, as in `RewardBatch`; empty where the reward reads none.
        """


def path_options(kind: type[Reward]) -> list[str]:
    """Return the parameters of a class whose type allows a `Path`: they name a folder, a file or a hub id."""
    parameters = inspect.signature(kind).parameters.values()
    # under `from __future__ import annotations` a type is a string
    return [
        one.name
        for one in parameters
        if Path in get_args(one.annotation)
        or one.annotation is Path
        or (isinstance(one.annotation, str) and "Path" in one.annotation)
    ]
