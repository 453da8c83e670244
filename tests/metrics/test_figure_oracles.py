"""Figures of evaluations in numbers worked out by hand, and pictures drawn on a model of a few hundred numbers."""

import math
from itertools import pairwise

import pytest
import torch
from tests.align.synthetic import settings
from tests.reference.world import TinyPolicy
from tests.tolerance import PICTURE, agree

from pixrl.algorithms.sampling import Solver
from pixrl.data.prompts import Prompt
from pixrl.metrics.diversity import Arrangement, mean_pairwise_distance
from pixrl.metrics.fusion import figures
from pixrl.metrics.intervals import Interval, bootstrap, by_unit, gains_by_prompt, paired, student
from pixrl.models.slots import Slot
from pixrl.report.figures import Change
from pixrl.rewards.segmentation import Instance
from pixrl.runs.measure import EPOCH, Drawing, draw, evaluated_slot, reward_figures
from pixrl.types import Scores, sample_seed
from studies.pictures import shift

T_OF_TWO = 4.302653
"""Student's t(0.975) with two degrees of freedom."""


def test_distance_is_over_pairs_of_different_pictures() -> None:
    """Cosines of the three pairs: 0.6, 0, 0.8."""
    group = torch.tensor([[[1.0, 0], [0.6, 0.8], [0, 1]]])
    assert mean_pairwise_distance(group).item() == pytest.approx(1 - 1.4 / 3)


def test_a_layout_is_the_middle_of_each_box_in_shares_of_width_and_height() -> None:
    boxes = [Instance("owl", (10.0, 0.0, 30.0, 20.0), 1.0, torch.zeros(1))]
    assert Arrangement.of(boxes, rows=40, columns=80).centres_N2.tolist() == [[0.25, 0.25]]


def test_scores_are_read_prompt_by_prompt_and_failed_ones_left_out() -> None:
    values = torch.tensor([1.0, 0, 0, 0, math.nan, 1])
    reasons = tuple("broken" if x != x else None for x in values.tolist())
    found = reward_figures(Scores(values, reasons), ["two", "two", "one"], True)
    assert found.prompt_means == (0.5, 0.0, 1.0)
    assert found.tasks == {"two": 0.25, "one": 1.0}
    assert (found.mean, found.task_mean, found.failed) == (pytest.approx(0.4), 0.625, 1)


def test_the_averaged_weights_are_judged_where_there_are_any() -> None:
    assert evaluated_slot(settings(optimizer={"ema": 0.9})) is Slot.EMA
    assert evaluated_slot(settings(optimizer={"ema": None})) is Slot.CURRENT


@pytest.mark.parametrize("slot", [Slot.REFERENCE, Slot.CURRENT, Slot.EMA])
@pytest.mark.parametrize("solver", list(Solver))
def test_pictures_of_an_evaluation_are_a_slots_path_from_seeds_of_their_own(
    slot: Slot, solver: Solver
) -> None:
    policy = TinyPolicy()
    prompts = [Prompt("a red owl"), Prompt("fish")]
    found = draw(policy, slot, prompts, Drawing(2, 4, solver, seed=9, micro_batch=3))
    seeds = [sample_seed(9, EPOCH, prompt, picture) for prompt in range(2) for picture in range(2)]
    assert list(found.samples.seeds) == seeds and EPOCH < 0
    condition = policy.encode([prompts[0].text] * 2 + [prompts[1].text] * 2)
    x, levels, last = policy.initial_noise(seeds), policy.schedule(4).double().tolist(), None
    with policy.slot(slot), torch.no_grad():
        for number, (here, after) in enumerate(pairwise(levels)):
            clean = x - here * policy.velocity(x, torch.full((4,), here, dtype=torch.float64), condition)
            # DPM-Solver++ 2M: half log-SNR steps; the first one from pure noise and the last one are first order
            snr = [
                math.log((1 - t) / t) if 0 < t < 1 else math.inf for t in (levels[number - 1], here, after)
            ]
            data = clean
            if solver is Solver.DPM and number > 1 and after > 0:
                data = clean + 0.5 * (snr[2] - snr[1]) / (snr[1] - snr[0]) * (clean - last)
            last, x = clean, after / here * x + (1 - after / here) * data
        assert agree(found.images_BCHW, policy.decode(x).float(), PICTURE)


def test_a_variants_shift_is_from_variant_0_with_the_same_noise() -> None:
    """Two noises: variant 0 shows e1, e2; variant 1 shows e1 twice, variant 2 e2 twice. Cosines 1, 0, 0, 1."""
    one, two = [1.0, 0.0], [0.0, 1.0]
    assert shift(torch.tensor([one, two, one, one, two, two]), noises=2, variants=3) == pytest.approx(0.5)


def test_figures_of_a_fusion() -> None:
    """Eight pictures; the reward is the sum of similarities minus twice their difference."""
    pairs = [
        (0.2, 0.4),
        (0.8, 0.6),
        (0.7, 0.7),
        (0.9, 0.1),
        (math.nan, 0.5),
        (0.9, 0.8),
        (0.6, 0.6),
        (0.5, 0.4),
    ]
    rewards = [0.2, 1.0, 1.4, -0.6, math.nan, 1.5, 1.2, 0.7]
    found = figures(torch.tensor(pairs), 2.0, 0.55, 0.15, chosen=(2, 5))
    known = [reward for reward in rewards if reward == reward]
    assert found.reward == pytest.approx(sum(known) / 7, rel=1e-5)
    assert found.similarity == pytest.approx((0.3 + 0.7 + 0.7 + 0.5 + 0.85 + 0.6 + 0.45) / 7, rel=1e-5)
    assert found.balance == pytest.approx((0.2 + 0.2 + 0 + 0.8 + 0.1 + 0 + 0.1) / 7, rel=1e-5)
    assert found.candidate_rate == pytest.approx(3 / 8)  # the third, sixth and seventh
    assert found.late_reward == pytest.approx((1.2 + 0.7) / 2, rel=1e-5)
    assert (found.best_reward, found.best_total) == pytest.approx((1.5, 1.7), rel=1e-5)
    assert (found.selected_reward, found.selected_balance) == pytest.approx((1.4, 0.0), rel=1e-5)
    assert found.failed == pytest.approx(1 / 8)
    alone = figures(torch.tensor([(0.9, 0.1), (0.95, 0.8)]), 2.0, 0.85, 0.5)
    assert math.isnan(alone.best_total) and alone.selected_reward == pytest.approx(1.45, rel=1e-5)


def test_intervals_are_those_of_the_books() -> None:
    found = student([1.0, 2.0, 6.0, math.nan])
    half = T_OF_TWO * math.sqrt(7) / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-5)
    assert found.count == 3
    # a hundred zeros and ones: 0.5 ± 1.96 x 0.05, in hundredths; 90 % would reach 0.42 and 0.58
    coins = bootstrap([0.0, 1.0] * 50)
    assert (coins.low, coins.high) == pytest.approx((0.40, 0.60), abs=0.011)
    for interval, excluded in (((-2.0, -3.0, -1.0, 3), True), ((2.0, 1.0, 3.0, 3), True), ((1.0, -1.0, 3.0, 3), False),
                               ((2.0, 1.0, 3.0, 1), False)):  # fmt: skip
        assert Interval(*interval).excludes_zero is excluded


def test_records_are_averaged_by_unit_and_differences_paired() -> None:
    rows = (
        ("a", "x", 1.0),
        ("a", "x", 4.0),
        ("a", "y", 5.0),
        ("b", "x", 0.5),
        ("b", "y", 6.0),
        ("b", "z", 9.0),
    )
    records = [{"variant": variant, "pair": pair, "figures": {"f": value}} for variant, pair, value in rows]
    assert by_unit(records, "a", "f") == {"x": 2.5, "y": 5.0}
    assert paired(records, "a", "b", "f", interval=student).mean == pytest.approx((2.0 - 1.0) / 2)


def test_gains_are_after_minus_before_and_of_prompts() -> None:
    fallen, risen = Change("b", "never trained on", 20.0, 19.0), Change("a", "trained on", 0.5, 0.6)
    assert fallen.gain == -1.0 and fallen.fell and not risen.fell
    gains = gains_by_prompt([1.0, None, 1.0, 3.0, None, None], [2.0, 5.0, 4.0, 3.0, 1.0, 1.0], 2)
    assert gains[:2] == [1.0, 1.5] and math.isnan(gains[2])
