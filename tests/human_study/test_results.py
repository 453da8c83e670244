"""Results against what was put in: known tastes, figures counted by hand, and what other formulas give."""

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from pixrl import cli
from pixrl.human_study.results import PRIOR_SD, Ballot, Ballots, Results, alpha, compute, pearson, spearman
from pixrl.human_study.study import TIE, Comparison, Folder, Study
from pixrl.human_study.votes import Vote, Votes
from tests.human_study.conftest import PROMPTS, SYSTEMS, Make
from tests.tolerance import rounding

Taste = Callable[[Comparison], str]
OURS, BASE, CLOSED = SYSTEMS


def vote_all(folder: Folder, taste: Taste, people: Sequence[int], criterion: str = "harmony") -> None:
    with Votes(folder.votes) as votes:
        everyone = votes.participants()
        for n in people:
            tasks = enumerate(everyone[n].tasks)
            votes.save(n, [Vote(k, criterion, taste(task), 1.0) for k, task in tasks])


def prefers(study: Study, order: Sequence[str]) -> Taste:
    """Chooses by an order of the systems, and passes checks."""

    def taste(task: Comparison) -> str:
        if task.check is not None:
            return task.check
        return min(task.pictures, key=lambda name: order.index(study.pictures[name].system))

    return taste


def means(results: Results, figure: str) -> dict[str, float]:
    return {one.system: getattr(one, figure).mean for one in results.criteria[0].standings}


def answer(study: Study, left: str, right: str, choice: str, person: int = 0, item: int = 0) -> Ballot:
    names = study.picture_of()
    shown = (names[item, left], names[item, right])
    return Ballot(person, item, "harmony", shown, TIE if choice == TIE else names[item, choice], 1.0, None)


def test_one_taste_gives_its_order_full_agreement_and_certain_rates(made: Make) -> None:
    folder = made(people=4, comparisons=15)
    vote_all(folder, prefers(folder.study, [CLOSED, OURS, BASE]), range(4))
    results = compute(folder)
    one = results.criteria[0]
    assert [s.system for s in one.standings] == [CLOSED, OURS, BASE]
    assert means(results, "win_rate") == {CLOSED: 1.0, OURS: 0.5, BASE: 0.0}
    assert one.alpha == 1.0
    assert one.votes == 4 * 15
    best = one.standings[0]
    assert (best.win_rate.low, best.win_rate.high) == (1.0, 1.0)
    assert math.isfinite(best.strength.mean) and best.strength.low > 0 > one.standings[-1].strength.high


def test_who_fails_checks_is_left_out_and_counted(made: Make) -> None:
    folder = made(people=5, comparisons=15, checks=4)
    study = folder.study
    order = [OURS, BASE, CLOSED]
    vote_all(folder, prefers(study, order), [0, 1])
    vote_all(folder, lambda task: task.pictures[0], [2])
    slips = iter([True, False, False, False])
    honest = prefers(study, order)
    vote_all(
        folder,
        lambda task: (
            task.pictures[task.pictures.index(honest(task)) - 1]
            if task.check and next(slips)
            else honest(task)
        ),
        [3],
    )
    with Votes(folder.votes) as votes:
        first = next(k for k, task in enumerate(votes.participants()[4].tasks) if task.check is None)
        votes.save(4, [Vote(first, "harmony", votes.participants()[4].tasks[first].pictures[0])])
        wrong = sum(task.pictures[0] != task.check for task in votes.participants()[2].tasks if task.check)
    assert wrong >= 2
    people = compute(folder).people
    assert (people.invited, people.kept, people.failed, people.unchecked) == (5, (0, 1, 3), (2,), (4,))
    assert compute(folder, least_checks=0.8).people.kept == (0, 1)
    assert compute(folder).criteria[0].votes == 3 * 15


def test_strengths_of_two_systems_are_the_log_of_the_odds(made: Make) -> None:
    study = made(count=2).study
    rows = [answer(study, OURS, BASE, OURS)] * 30 + [answer(study, BASE, OURS, BASE)] * 10
    ((strong, weak),) = Ballots(study, rows).strengths(np.ones((1, 40)))
    gap = math.log(3)
    # the prior pulls by gap / (2 sd^2) against a curvature of n p (1 - p)
    pulled = gap / (2 * PRIOR_SD**2) / (40 * 0.75 * 0.25)
    assert strong - weak == pytest.approx(gap, abs=2 * pulled)
    assert strong + weak == pytest.approx(0, abs=rounding(torch.float64, 2, 1.0))
    rates = Ballots(study, rows).win_rates(np.ones((1, 40)))
    assert rates.tolist() == [[0.75, 0.25]]


def test_a_weighted_vote_is_that_many_votes_and_a_tie_is_half_each(made: Make) -> None:
    study = made().study
    once = [
        answer(study, OURS, BASE, OURS),
        answer(study, BASE, CLOSED, CLOSED),
        answer(study, OURS, CLOSED, TIE),
    ]
    weights = np.array([[3.0, 1.0, 2.0]])
    often = [row for row, count in zip(once, (3, 1, 2), strict=True) for _ in range(count)]
    few, many = Ballots(study, once), Ballots(study, often)
    even = np.ones((1, 6))
    np.testing.assert_array_equal(few.win_rates(weights), many.win_rates(even))
    np.testing.assert_allclose(few.strengths(weights), many.strengths(even), atol=1e-4)
    assert few.win_rates(weights).tolist() == [[4 / 5, 0.0, 2 / 3]]


def test_resamples_are_fitted_each_as_alone(made: Make) -> None:
    study = made().study
    rows = [
        answer(study, OURS, BASE, OURS),
        answer(study, BASE, CLOSED, CLOSED),
        answer(study, OURS, CLOSED, OURS),
    ]
    weights = np.array([[3.0, 1.0, 2.0], [1.0, 0.0, 40.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    ballots = Ballots(study, rows)
    together = ballots.strengths(weights)
    for row, found in zip(weights, together, strict=True):
        np.testing.assert_allclose(found, ballots.strengths(row[None])[0], atol=1e-3)
    assert together[2].tolist() == [0.0, 0.0, 0.0]


def test_the_best_of_three_gives_the_shares_of_the_choice_model(made: Make) -> None:
    study = made(design="best").study
    names = study.picture_of()
    shown = tuple(names[0, system] for system in SYSTEMS)
    counts = {OURS: 50, BASE: 30, CLOSED: 20}
    rows = [
        Ballot(0, 0, "harmony", shown, names[0, system], 1.0, None)
        for system, count in counts.items()
        for _ in range(count)
    ]
    (strengths,) = Ballots(study, rows).strengths(np.ones((1, 100)))
    shares = np.exp(strengths) / np.exp(strengths).sum()
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=1 / PRIOR_SD**2 / 20)


def test_agreement_is_krippendorffs_formula_by_hand(made: Make) -> None:
    study = made(count=2).study
    rows = [
        answer(study, OURS, BASE, chosen, person, item)
        for item, choices in enumerate(([OURS, OURS], [OURS, BASE], [BASE, BASE]))
        for person, chosen in enumerate(choices)
    ]
    # coincidences: 2 of 6 values stand beside another one; expected by the codes' counts n_0, n_1 of 6
    places = [sorted(row.pictures).index(row.choice) for row in rows]
    ones = sum(places)
    expected = 2 * ones * (6 - ones) / (6 * 5)
    assert alpha(study, rows) == pytest.approx(1 - (2 / 6) / expected)
    assert math.isnan(alpha(study, rows[:1]))


def test_chance_is_no_agreement_however_many_systems(made: Make) -> None:
    folder = made(people=40, comparisons=15)
    draw = random.Random(0)
    vote_all(folder, lambda task: task.check or draw.choice(task.pictures), range(40))
    results = compute(folder)
    # 15 comparisons by 40 people: alpha's spread at chance is about 1 / sqrt(pairs of votes)
    assert abs(results.criteria[0].alpha) < 4 / math.sqrt(15 * 40 * 39 / 2)
    for one in results.criteria[0].standings:
        assert one.win_rate.low < 0.5 < one.win_rate.high


def test_a_reward_that_knows_the_taste_correlates_and_its_opposite_does_not(
    made: Make, systems: list[str]
) -> None:
    strength = {OURS: 3.0, BASE: 2.0, CLOSED: 1.0}
    for place in map(Path, systems):
        rows = {
            f"{place.name}-{n}.png": {
                "taste": strength[place.name],
                "against": -strength[place.name],
                "same": 1.0,
            }
            for n in range(len(PROMPTS))
        }
        (place / "scores.json").write_text(json.dumps(rows), encoding="utf-8")
    folder = made(people=3, comparisons=15)
    vote_all(folder, prefers(folder.study, [OURS, BASE, CLOSED]), range(3))
    found = {one.reward: one for one in compute(folder).criteria[0].correlations}
    exact = rounding(torch.float64, 15, 1.0)
    assert found["taste"].pictures == 3 * len(PROMPTS)
    for reward, sign in (("taste", 1), ("against", -1)):
        assert found[reward].pearson.mean == pytest.approx(sign, abs=exact)
        assert found[reward].spearman.mean == pytest.approx(sign, abs=exact)
        assert found[reward].agreement.mean == (1 + sign) / 2
    assert math.isnan(found["same"].spearman.mean)
    assert found["same"].agreement.mean == 0.5


def test_correlations_are_scipys_on_the_resampled_values() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 12).astype(float), rng.normal(size=12)
    weights = rng.integers(0, 3, (6, 12)).astype(float)
    bound = rounding(torch.float64, 24 * 24, 1.0)
    for row, linear, ranked in zip(weights, pearson(x, y, weights), spearman(x, y, weights), strict=True):
        often = row.astype(int)
        assert linear == pytest.approx(stats.pearsonr(x.repeat(often), y.repeat(often))[0], abs=bound)
        assert ranked == pytest.approx(stats.spearmanr(x.repeat(often), y.repeat(often))[0], abs=bound)
    ones = np.ones((1, 12))
    assert math.isnan(pearson(x, ones[0], ones)[0]) and math.isnan(spearman(x, ones[0], ones)[0])


def test_the_page_and_the_tables_say_what_was_found(made: Make, tmp_path: Path) -> None:
    folder = made(people=2, comparisons=15, title="<b>Which & why</b>")
    run = CliRunner()
    asked = ["human-study", "results", str(folder.path), "--out", str(tmp_path / "out")]
    empty = run.invoke(cli.app, asked)
    assert empty.exit_code == 0, empty.output
    assert "No votes that count yet" in (tmp_path / "out" / "results.html").read_text(encoding="utf-8")
    vote_all(folder, prefers(folder.study, [CLOSED, OURS, BASE]), range(2))
    done = run.invoke(cli.app, asked)
    assert done.exit_code == 0, done.output
    assert "2 of 2 participants voted; 2 are counted." in done.output
    page = (tmp_path / "out" / "results.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;Which &amp; why" in page and "<b>Which" not in page
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        figures = {(row["figure"], row["of"]): row["mean"] for row in csv.DictReader(file)}
    assert float(figures["win_rate", CLOSED]) == 1.0
    with (tmp_path / "out" / "votes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (15 + 6)
    assert {row["chosen"] for row in rows if row["check"] == "0"} == {CLOSED, OURS}
    with Votes(folder.votes) as votes:
        tokens = [who.token for who in votes.participants()]
    written = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir())
    assert not any(token in written for token in tokens)
