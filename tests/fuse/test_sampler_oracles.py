"""Samplers without a policy, one step at a time, in numbers worked out by hand."""

import math

import pytest
import torch

from pixrl.algorithms.fusion.base import Feedback
from pixrl.algorithms.fusion.baselines import BASS, AGSwap, BASSSettings, GoldenSection
from tests.fuse.test_samplers import sampler_of, task, told
from tests.tolerance import agree

GOLDEN = (math.sqrt(5) - 1) / 2


@pytest.mark.parametrize(
    ("rewards", "bracket"), [((2.0, 1.0), (0.0, GOLDEN)), ((1.0, 2.0), (1 - GOLDEN, 1.0))]
)
def test_golden_section_keeps_the_half_of_the_better_weight(
    rewards: tuple[float, float], bracket: tuple[float, float]
) -> None:
    sampler = sampler_of("golden", task())
    assert isinstance(sampler, GoldenSection)
    proposal = sampler.ask(4, 0)
    assert proposal.coefficients_BND[:, 0, 0].tolist() == pytest.approx([1 - GOLDEN, GOLDEN] * 2)
    assert agree(proposal.coefficients_BND[:, 1], 1 - proposal.coefficients_BND[:, 0], 8)
    sampler.tell(proposal, told(torch.tensor(rewards * 2)))
    assert (sampler.low[0], sampler.high[0]) == pytest.approx(bracket)


@pytest.mark.parametrize(("similarities", "handed"), [((0.9, 0.8), 2), ((0.9, 0.1), 5), ((0.52, 0.5), 1)])
def test_agswap_hands_over_as_many_columns_as_the_imbalance_and_at_most_a_quarter(
    similarities: tuple[float, float], handed: int
) -> None:
    sampler = sampler_of("agswap", task(columns=20))
    assert isinstance(sampler, AGSwap)
    before = sampler.owner_BD
    sampler.tell(sampler.ask(8, 0), Feedback.of(torch.tensor([similarities]).repeat(8, 1), 5.0))
    changed = sampler.owner_BD != before
    assert changed.sum(dim=1).tolist() == [handed] * 8
    assert bool((sampler.owner_BD[changed] == 1).all())  # the second concept is the weaker one


def test_bass_wants_both_balance_and_nearness() -> None:
    near, far, uneven = [0.9, 0.88], [0.2, 0.2], [0.95, 0.6]
    similarities = torch.tensor([near, far, uneven, [0.3, 0.1]])
    # imbalances 0.02, 0, 0.35, 0.2: median 0.11; mean distances 0.11, 0.8, 0.225, 0.8: median 0.5125
    assert BASS.shortlist(BASSSettings(quantile=0.5), similarities).tolist() == [True, False, False, False]


def test_the_search_varies_the_best_ever_more_narrowly() -> None:
    """In the difference of two logits the deviation is std, a third of it when the budget is spent."""
    sampler = sampler_of("search", task(columns=4000, budget=16, batch=4), std=0.6, elite=0.05)
    first = sampler.ask(4, 0)
    sampler.tell(first, told(torch.tensor([0.1, 0.9, 0.2, 0.3])))
    best = first.coefficients_BND[1].clamp_min(1e-4).log()
    for step, deviation in ((1, 0.6 * 3**-0.25), (4, 0.6 / 3)):
        logits = sampler.ask(4, step).coefficients_BND.log()
        moved = (logits[:, 0] - logits[:, 1]) - (best[0] - best[1])
        # 16000 draws: the standard error of a deviation is 0.6 %
        assert float(moved.std()) == pytest.approx(deviation, rel=0.03)
        assert float(moved.mean()) == pytest.approx(0, abs=0.03)
