"""What a study found: win rates, Bradley-Terry strengths, agreement, and which automatic reward agrees with people.

Intervals are 95 % percentile intervals of a bootstrap over people and over prompts at once: each resample draws both
with replacement, and a vote counts as often as its person times its prompt was drawn (Owen, "The pigeonhole
bootstrap", 2007). Those of correlations resample prompts alone.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy import optimize, special

from pixrl.human_study.study import TIE, Folder, Study, scores_by_reward
from pixrl.human_study.votes import Votes
from pixrl.libraries import require
from pixrl.metrics.intervals import Interval

RESAMPLES = 1000
SEED = 0
LEAST_CHECKS = 0.75
"""Share of a participant's answers to attention checks that must be right."""
GRADIENT = 1e-5
"""Largest slope, in votes, at which strengths are taken as found."""
PRIOR_SD = 5.0
"""Standard deviation of the strengths' normal prior, in logits: weak, and finite for a system that won every time."""
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Ballot:
    """One vote with what it was about."""

    participant: int
    item: int
    criterion: str
    pictures: tuple[str, ...]
    """As they stood, from left to right."""
    choice: str
    seconds: float | None
    check: str | None
    """Of an attention check, the right answer."""


@dataclass(frozen=True)
class People:
    """Who is counted, and who is not."""

    invited: int
    kept: tuple[int, ...]
    failed: tuple[int, ...]
    """Who failed attention checks."""
    unchecked: tuple[int, ...]
    """Who has voted, but not answered any attention check yet."""


@dataclass(frozen=True)
class Standing:
    """One system by one criterion."""

    system: str
    win_rate: Interval
    strength: Interval


@dataclass(frozen=True)
class Correlation:
    """How an automatic reward agrees with the votes by one criterion."""

    reward: str
    pictures: int
    pearson: Interval
    spearman: Interval
    agreement: Interval
    """Share of pairs of pictures seen side by side in which the one that was chosen has the higher score."""


@dataclass(frozen=True)
class CriterionResult:
    """All figures of one criterion."""

    criterion: str
    question: str
    votes: int
    ties: int
    alpha: float
    """Krippendorff's alpha, nominal; nan where no comparison has two answers, or all answers are one."""
    first_place: float
    """Share of votes, without ties, for the picture that stood first: 1 / n where position does not matter."""
    standings: tuple[Standing, ...]
    correlations: tuple[Correlation, ...]


@dataclass(frozen=True)
class Results:
    """All figures of a study."""

    people: People
    criteria: tuple[CriterionResult, ...]
    answers: tuple[Ballot, ...] = field(repr=False)
    """Every vote, of those left out too, and attention checks."""


def compute(folder: Folder, *, least_checks: float = LEAST_CHECKS) -> Results:
    """Return a study's figures so far.

    Args:
        folder: the study.
        least_checks: who answered a smaller share of the attention checks' questions rightly is left out.
    """
    require("krippendorff", "human-study", "human-study results")
    with Votes(folder.votes) as votes:
        people = votes.participants()
        answers = [
            Ballot(
                who.number, task.item, vote.criterion, task.pictures, vote.choice, vote.seconds, task.check
            )
            for who in people
            for vote in votes.of(who.number)
            for task in [who.tasks[vote.task]]
        ]
    right: dict[int, list[bool]] = {answer.participant: [] for answer in answers}
    for answer in answers:
        if answer.check is not None:
            right[answer.participant].append(answer.choice == answer.check)
    asked = {who.number for who in people if any(task.check is not None for task in who.tasks)}
    unchecked = tuple(n for n, found in right.items() if not found and n in asked)
    failed = tuple(n for n, found in right.items() if found and sum(found) < least_checks * len(found))
    kept = tuple(n for n in right if n not in unchecked and n not in failed)
    real = [answer for answer in answers if answer.check is None and answer.participant in kept]
    study = folder.study
    criteria = tuple(
        _criterion(study, one.name, one.question, [a for a in real if a.criterion == one.name])
        for one in study.settings.criteria
    )
    return Results(People(len(people), kept, failed, unchecked), criteria, tuple(answers))


class Ballots:
    """The votes of one criterion as arrays: one row a vote, one column a system."""

    def __init__(self, study: Study, answers: Sequence[Ballot]) -> None:
        self.systems = study.systems
        column = {name: n for n, name in enumerate(study.systems)}
        of = {name: column[picture.system] for name, picture in study.pictures.items()}
        shape = (len(answers), len(study.systems))
        self.shown = np.zeros(shape)
        """1 where a vote's comparison showed the system."""
        self.won = np.zeros(shape)
        """1 for the chosen system; a tie is shared."""
        for row, answer in enumerate(answers):
            self.shown[row, [of[name] for name in answer.pictures]] = 1
            if answer.choice == TIE:
                self.won[row] = self.shown[row] / len(answer.pictures)
            else:
                self.won[row, of[answer.choice]] = 1
        self.people = np.unique([a.participant for a in answers], return_inverse=True)[1]
        prompts = [study.items[a.item].prompt for a in answers]
        self.prompts = np.unique(prompts, return_inverse=True)[1]

    @cached_property
    def sets(self) -> tuple[Array, np.ndarray[Any, np.dtype[np.intp]]]:
        """The different sets of systems, and which of them each vote is about."""
        found, which = np.unique(self.shown, axis=0, return_inverse=True)
        return found, which.reshape(-1)

    def resampled(self, count: int) -> Array:
        """Return how often each vote counts in each of `count` resamples of people and prompts: [count, votes]."""
        rng = np.random.default_rng(SEED)
        drawn = []
        for group in (self.people, self.prompts):
            size = int(group.max()) + 1
            drawn.append(rng.multinomial(size, np.full(size, 1 / size), size=count)[:, group])
        return np.asarray(drawn[0] * drawn[1], dtype=np.float64)

    def win_rates(self, weights: Array) -> Array:
        """Return each system's share of the comparisons that showed it; nan where none did.

        Args:
            weights: how often each vote counts, [resamples, votes].

        Returns:
            The shares, [resamples, systems].
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((weights @ self.won) / (weights @ self.shown))

    def strengths(self, weights: Array) -> Array:
        """Return the systems' Bradley-Terry strengths in logits, of mean 0: [resamples, systems], as `win_rates`.

        With more than two systems in a comparison it is Luce's choice model, of which Bradley-Terry is the case of two:
        P(i) = exp(s_i) / sum of exp(s_j) over what is shown. It is the mode under a weak normal prior (`PRIOR_SD`).
        """
        sets, which = self.sets
        wins = weights @ self.won
        votes = weights @ (which[:, None] == np.arange(len(sets))).astype(np.float64)
        hidden = np.where(sets > 0, 0.0, -np.inf)

        def loss(flat: Array) -> tuple[float, Array]:
            strength = flat.reshape(wins.shape)
            logits = strength[:, None, :] + hidden
            total = special.logsumexp(logits, axis=2)
            expected = np.einsum("rk,rks->rs", votes, np.exp(logits - total[:, :, None]))
            value = (votes * total).sum() - (wins * strength).sum() + (strength**2).sum() / (2 * PRIOR_SD**2)
            return float(value), (expected - wins + strength / PRIOR_SD**2).reshape(-1)

        # the resamples do not touch each other: one minimum of their sum is the minimum of each
        options = {"ftol": 0.0, "gtol": GRADIENT, "maxiter": 2000, "maxfun": 4000}
        start = np.zeros(wins.size)
        found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
        strengths = found.reshape(wins.shape)
        return np.asarray(strengths - strengths.mean(axis=1, keepdims=True))


def _interval(value: float, resampled: Sequence[float] | Array, count: int) -> Interval:
    known = np.asarray(resampled, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known) or count < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, count)
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(value, float(low), float(high), count)


def _criterion(study: Study, name: str, question: str, answers: Sequence[Ballot]) -> CriterionResult:
    ties = sum(answer.choice == TIE for answer in answers)
    clear = [answer for answer in answers if answer.choice != TIE]
    first = sum(answer.choice == answer.pictures[0] for answer in clear) / len(clear) if clear else math.nan
    if not answers:
        return CriterionResult(name, question, 0, 0, math.nan, math.nan, (), ())
    ballots = Ballots(study, answers)
    weights = ballots.resampled(RESAMPLES)
    even = np.ones((1, len(answers)))
    (rates,), (strengths,) = ballots.win_rates(even), ballots.strengths(even)
    rates_again, strengths_again = ballots.win_rates(weights), ballots.strengths(weights)
    standings = tuple(
        Standing(
            system,
            _interval(float(rates[n]), rates_again[:, n], int(ballots.shown[:, n].sum())),
            _interval(float(strengths[n]), strengths_again[:, n], int(ballots.shown[:, n].sum())),
        )
        for n, system in enumerate(study.systems)
    )
    correlations = tuple(
        _correlation(study, reward, scores, answers) for reward, scores in scores_by_reward(study).items()
    )
    by_strength = sorted(standings, key=lambda one: -one.strength.mean)
    kept = tuple(one for one in correlations if one.pearson.count > 1)  # scores of one prompt tell nothing
    return CriterionResult(
        name, question, len(answers), ties, alpha(study, answers), first, tuple(by_strength), kept
    )


def alpha(study: Study, answers: Sequence[Ballot]) -> float:
    """Return Krippendorff's alpha of votes by one criterion; nan where it is not defined.

    A comparison's answers are coded by the place in an order of its pictures that is the same for all participants and
    arbitrary (their opaque names): systems as codes would make every answer that the pair does not offer look like
    agreement.
    """
    import krippendorff

    counts: dict[tuple[str, ...], Counter[int]] = {}
    for answer in answers:
        order = tuple(sorted(answer.pictures))
        place = len(order) if answer.choice == TIE else order.index(answer.choice)
        counts.setdefault(order, Counter())[place] += 1
    width = max(len(order) for order in counts) + 1
    table = np.array([[found[n] for n in range(width)] for found in counts.values()])
    paired = table[table.sum(axis=1) > 1]
    if not len(paired) or np.count_nonzero(paired.sum(axis=0)) < 2:
        return math.nan
    return float(krippendorff.alpha(value_counts=paired, level_of_measurement="nominal"))


def _correlation(
    study: Study, reward: str, scores: Mapping[str, float], answers: Sequence[Ballot]
) -> Correlation:
    """Correlate a reward with the share of its comparisons that each picture won, and with single choices."""
    won: dict[str, float] = dict.fromkeys(study.pictures, 0.0)
    shown = Counter[str]()
    agrees: dict[str, list[float]] = {}
    for answer in answers:
        for name in answer.pictures:
            shown[name] += 1
            won[name] += 1 / len(answer.pictures) if answer.choice == TIE else float(answer.choice == name)
        found = agrees.setdefault(study.items[answer.item].prompt, [])
        if answer.choice in scores:
            others = [scores[n] for n in answer.pictures if n != answer.choice and n in scores]
            found += [0.5 + 0.5 * float(np.sign(scores[answer.choice] - other)) for other in others]
    names = [name for name in scores if shown[name]]
    people = np.array([won[name] / shown[name] for name in names])
    machine = np.array([scores[name] for name in names])
    prompts = [study.items[study.pictures[name].item].prompt for name in names]
    group = np.unique(prompts, return_inverse=True)[1]
    count = int(group.max()) + 1 if len(names) else 0
    rng = np.random.default_rng(SEED)
    even = np.ones((1, len(names)))
    again = even[:0]
    if count:
        again = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)[:, group].astype(np.float64)
    every = [share for shares in agrees.values() for share in shares]
    sums = np.array(
        [[sum(shares), len(shares)] for shares in agrees.values() if shares] or [[0, 0]], np.float64
    )
    drawn = sums[rng.integers(len(sums), size=(RESAMPLES, len(sums)))].sum(axis=1)
    with np.errstate(invalid="ignore"):
        agreement = _interval(
            sum(every) / len(every) if every else math.nan, drawn[:, 0] / drawn[:, 1], len(sums)
        )
    figures = [
        _interval(float(figure(people, machine, even)[0]), figure(people, machine, again), count)
        for figure in (pearson, spearman)
    ]
    return Correlation(reward, len(names), figures[0], figures[1], agreement)


def pearson(x: Array, y: Array, weights: Array) -> Array:
    """Return Pearson's correlations; nan where one of the two does not vary.

    Args:
        x: values, [count] or [resamples, count].
        y: as x.
        weights: how often each pair of values counts, [resamples, count].

    Returns:
        One correlation a resample.
    """
    total = weights.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = [z - ((weights * z).sum(axis=1) / total)[:, None] for z in (x, y)]
        scale = [(weights * z * z).sum(axis=1) for z in apart]
        found = (weights * apart[0] * apart[1]).sum(axis=1) / np.sqrt(scale[0] * scale[1])
    return np.where(_varies(x, weights) & _varies(y, weights), found, math.nan)


def _varies(z: Array, weights: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    high = np.where(weights > 0, z, -np.inf).max(axis=1, initial=-np.inf)
    return np.asarray(high > np.where(weights > 0, z, np.inf).min(axis=1, initial=np.inf))


def spearman(x: Array, y: Array, weights: Array) -> Array:
    """Return Spearman's correlations, of ranks in which equal values share theirs; as `pearson`, x and y [count]."""

    def ranks(z: Array) -> Array:  # of each resample's values, but for a constant
        before = (z[:, None] < z) + (z[:, None] == z) / 2
        return np.asarray(weights @ before)

    return pearson(ranks(x), ranks(y), weights)
