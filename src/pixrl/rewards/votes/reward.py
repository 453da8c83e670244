"""Votes as a reward: a step's groups are laid before people, and training goes on when each has a vote.

Best of n gives the chosen picture 1 and the others -1 / (n - 1), an order of n spreads them evenly from 1 to -1, and a
pair is a group of two. The votes are in the run's folder, so a run that was killed asks about nothing twice.
"""

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from pathlib import Path

import torch

from pixrl.errors import ConfigError, InputError, RunError, ServiceError, did_you_mean
from pixrl.rewards.base import ComparingReward, Options, Reward
from pixrl.rewards.settings import RewardSetting
from pixrl.rewards.votes.groups import (
    FOLDER,
    VOTES,
    GroupVotes,
    VotedGroup,
    VotedPicture,
    rewards_of,
    write_pairs,
)
from pixrl.rewards.wire import png_of
from pixrl.types import Origin, RewardBatch, Scores, sample_seed

LOOK_AGAIN = 0.1
"""Seconds between two looks at the votes."""


class Ask(StrEnum):
    """What people are asked about a group."""

    BEST = "best"
    """Its best picture; of two, which is better."""
    ORDER = "order"
    """All of its pictures, from the best to the worst."""


@dataclass(frozen=True)
class Simulated:
    """A voter of known taste and known error rate in the place of people; the same seed gives the same votes."""

    taste: str
    """The name of the recipe's reward that the voter goes by."""
    wrong: float = 0.0
    """The probability of a vote for another picture than the best by this taste, drawn evenly among them."""
    seed: int = 0

    @classmethod
    def of(cls, given: Mapping[str, object]) -> "Simulated":
        """Return the voter that the option `simulated` describes.

        Raises:
            ConfigError: it names no taste, has a setting of another name, or one that is out of range.
        """
        like = "It is like {taste: preference, wrong: 0.2, seed: 0}."
        known = isinstance(given, Mapping) and given.keys() <= {"taste", "wrong", "seed"}
        if not known or "taste" not in given:
            raise ConfigError(
                f"votes: simulated names a taste, and may give wrong and seed; got {given!r}. {like}"
            )
        taste, wrong, seed = given["taste"], given.get("wrong", 0.0), given.get("seed", 0)
        if not isinstance(taste, str) or type(seed) is not int:
            raise ConfigError(
                f"votes: simulated.taste is a reward's name and seed a whole number; got {given!r}. {like}"
            )
        if isinstance(wrong, bool) or not isinstance(wrong, int | float) or not 0 <= wrong <= 1:
            raise ConfigError(f"votes: simulated.wrong is a share from 0 to 1, got {wrong!r}.")
        return cls(taste, float(wrong), seed)

    def answer(
        self, ballots: GroupVotes, groups: Sequence[VotedGroup], scores: Mapping[int, list[float]], ask: Ask
    ) -> None:
        """Vote on the groups that have no vote; `scores` are those of each group's pictures by the group's place."""
        for ballot in groups:
            if ballot.ranks is not None:
                continue
            known = [-math.inf if math.isnan(x) else x for x in scores[ballot.place]]
            order = sorted(range(len(known)), key=lambda n: -known[n])
            draws = random.Random(sample_seed(self.seed, ballot.step, ballot.place, 0))
            if draws.random() < self.wrong and len(order) > 1:
                chosen = draws.choice(order[1:])
                others = [n for n in order if n != chosen]
                draws.shuffle(others)
                order = [chosen, *others]
            names = [ballot.pictures[n].file for n in order]
            ballots.vote(ballot.number, names[:1] if ask is Ask.BEST else names)


class VotesReward(ComparingReward):
    """What people say of a group's pictures: those that a picture beats less those that beat it, over all others.

    Args:
        ask: `best`: which picture of a group is the best; `order`: all of them, from the best to the worst.
        undo_seconds: how long the last vote of a step can be taken back before training learns from it.
        simulated: a voter in the place of people, `{taste: REWARD, wrong: 0.2, seed: 0}`; `taste` is the name of
            another reward of the recipe, `wrong` the share of wrong votes.

    Raises:
        ConfigError: an option is wrong.
    """

    name = "votes"
    keeps_time = True

    def __init__(
        self, ask: str = "best", undo_seconds: float = 3.0, simulated: Mapping[str, object] | None = None
    ) -> None:
        if ask not in list(Ask):
            raise ConfigError(f"votes: ask is one of {', '.join(Ask)}, got {ask!r}.{did_you_mean(ask, Ask)}")
        if not (isinstance(undo_seconds, int | float) and 0 <= undo_seconds < math.inf):
            raise ConfigError(f"votes: undo_seconds is a number of seconds from 0 up, got {undo_seconds!r}.")
        self.ask = Ask(ask)
        self.undo_seconds = float(undo_seconds)
        self.simulated = None if simulated is None else Simulated.of(simulated)
        who = "people" if self.simulated is None else f"a simulated voter ({self.simulated})"
        self.provenance: Mapping[str, str] = {
            "model": f"votes of {who}",
            "licence": "the voters' own",
            "question": self.ask.value,
        }
        self._votes: GroupVotes | None = None
        self._taste: Reward | None = None
        self._say: Callable[[str], None] = print

    @classmethod
    def notes(cls, options: Options, *, announced: bool) -> Iterator[str]:
        if options.get("simulated") is None:
            yield "waits for people at every step, on a page that pixrl vote serves."

    def problem(self, others: Collection[str], processes: int) -> str | None:
        if processes > 1:
            return f"waits for people in one process, and there are {processes}. Start it as one process."
        taste = None if self.simulated is None else self.simulated.taste
        if taste is not None and taste not in others:
            return (
                f"has a simulated voter whose taste {taste!r} is no other reward of the recipe."
                f"{did_you_mean(taste, others)} Add one: {{name: {taste}, held_out: true, ...}}"
            )
        return None

    def attend(self, folder: Path, others: Mapping[str, Reward], say: Callable[[str], None]) -> None:
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        self._votes = GroupVotes(place / VOTES, make=True)
        self._taste = None if self.simulated is None else others[self.simulated.taste]
        self._say = say

    def leave(self) -> None:
        if self._votes is not None:
            self._votes.close()
            self._votes = None

    def score(self, batch: RewardBatch) -> Scores:
        """Ask about the batch's groups and wait for the votes; outside a run's folder the pictures' order is the vote.

        The latter is what `pixrl selfcheck` and a rehearsal compute with: nobody is asked.
        """
        origins = batch.origins or [Origin(0, 0, 0, 0)] * len(batch.images_BCHW)
        rows: dict[int, list[int]] = {}
        for row, origin in enumerate(origins):
            rows.setdefault(origin.group, []).append(row)
        if self._votes is None:
            ranks = {group: tuple(range(len(own))) for group, own in rows.items()}
        else:
            try:
                ranks = self._vote(self._votes, batch, rows)
            except (OSError, RunError) as error:
                raise ServiceError(f"The votes cannot be kept: {error}. All earlier ones are.") from error
        values_B = torch.zeros(len(origins))
        for group, own in rows.items():
            values_B[own] = torch.tensor(rewards_of(ranks[group]))
        return Scores(values_B, (None,) * len(origins), provenance=self.provenance)

    def _vote(
        self, ballots: GroupVotes, batch: RewardBatch, rows: Mapping[int, Sequence[int]]
    ) -> dict[int, tuple[int, ...]]:
        step = batch.origins[0].step
        shown = {
            group: (batch.prompts[own[0]], [_keep(ballots.path.parent, batch, row) for row in own])
            for group, own in rows.items()
        }
        ballots.add(step, shown)
        waiting = [one for one in ballots.all(step) if one.place in rows and one.ranks is None]
        if self.simulated is not None and self._taste is not None:
            if waiting:
                scores = self._taste.score(batch).values_B.tolist()
                by_group = {group: [scores[row] for row in own] for group, own in rows.items()}
                self.simulated.answer(ballots, waiting, by_group, self.ask)
        elif waiting:
            self._say(f"Step {step}: {len(waiting)} groups wait for votes.")
        settled = 0.0 if self.simulated is not None or not waiting else self.undo_seconds
        with _interruptible():
            while (voted := ballots.learn(step, rows, settled)) is None:
                time.sleep(LOOK_AGAIN)
        write_pairs(ballots)
        return {one.place: one.ranks for one in voted if one.ranks is not None}


def votes_reward(settings: Sequence[RewardSetting]) -> RewardSetting | None:
    """Return which of a recipe's rewards is people's votes; None where none is."""
    return next((one for one in settings if one.reward == VotesReward.name), None)


def with_simulated_voter(
    settings: Sequence[RewardSetting], taste: str, wrong: float, seed: int
) -> tuple[RewardSetting, ...]:
    """Return a recipe's rewards with a simulated voter, who votes by another of them and is wrong in a share.

    Raises:
        InputError: there are no votes to give.
    """
    asked = votes_reward(settings)
    if asked is None:
        raise InputError(
            "The recipe has no reward `votes`, so there is nothing to simulate. Leave --simulate out."
        )
    voter = {"taste": taste, "wrong": wrong, "seed": seed}
    simulated = asked.model_copy(update={"options": {**asked.options, "simulated": voter}})
    return tuple(simulated if one is asked else one for one in settings)


def _keep(place: Path, batch: RewardBatch, row: int) -> VotedPicture:
    """Write a picture under a name that tells nothing of how it was drawn, and is its own for each content."""
    origin, content = batch.origins[row], png_of(batch.images_BCHW[row])
    key = f"{origin.step}/{origin.group}/{row}/".encode()
    file = place / f"{blake2b(key + content, digest_size=16).hexdigest()}.png"
    if not file.is_file():
        beside = file.with_suffix(".tmp")
        beside.write_bytes(content)
        beside.replace(file)
    return VotedPicture(file.name, origin.seed, origin.variant)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the waiting at once: the step cannot end before people vote, and every vote is on the disk."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
