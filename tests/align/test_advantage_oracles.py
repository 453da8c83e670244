"""Advantages, conflict and what is logged of rewards, in numbers worked out by hand."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage, conflict_metrics, reward_metrics
from pixrl.algorithms.customized_grpo import SynergySettings, TimeSettings
from tests.tolerance import agree

NAN = math.nan
TWO = {
    "a": torch.tensor([[0.0, 1, 2], [0, 2, NAN]]),  # centred: -1, 0, 1 and -1, 1
    "b": torch.tensor(
        [[3.0, 9, 0], [1, 5, 100]]
    ),  # centred: -1, 5, -4 and -2, 2, its third one left out with a's
}
PLAIN = {"scale": "none", "clamp": None}


def advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: AdvantageSettings, steps: int = 1
) -> Tensor:
    return GroupAdvantage(settings)(rewards, weights, steps)


def held(found: Tensor, expected: list[list[float]]) -> None:
    """Every number as worked out; four roundings of float32 or so."""
    assert agree(found, torch.tensor(expected), 30)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [[-1.0, 1.0], [-10.0, 10.0]]),
        ("group", [[-1 / 1.5, 1 / 1.5], [-10 / 10.5, 10 / 10.5]]),
        # all four rewards: mean 10.5, variance 563 / 4
        ("global", [[x / (math.sqrt(563 / 4) + 0.5) for x in row] for row in ([-1, 1], [-10, 10])]),
    ],
)
def test_whose_deviation_divides(scale: str, expected: list[list[float]]) -> None:
    rewards = {"a": torch.tensor([[0.0, 2], [10, 30]])}
    settings = {"scale": scale, "clamp": None} | ({} if scale == "none" else {"eps": 0.5})
    held(advantages(rewards, {"a": 1.0}, AdvantageSettings(**settings))[0], expected)


def test_rewards_count_by_their_weights_and_a_sample_that_failed_in_one_is_left_out() -> None:
    found = advantages(TWO, {"a": 2.0, "b": 0.5}, AdvantageSettings(**PLAIN))[0]
    held(found, [[-2.5, 2.5, 0.0], [-3.0, 3.0, NAN]])


@pytest.mark.parametrize(
    ("recenter", "expected"),
    [
        # min: -1, 0, -4 and -2, 1; minus that where both are bad: 1, 0, -4 and 2, 1
        (False, [[-2.25, 2.5, -1.0], [-2.5, 3.25, NAN]]),
        (True, [[-2.0, 2.75, -0.75], [-2.875, 2.875, NAN]]),
    ],
)
def test_synergy_adds_where_one_is_good_and_takes_away_where_both_are_bad(
    recenter: bool, expected: list[list[float]]
) -> None:
    settings = AdvantageSettings(**PLAIN, synergy=SynergySettings(kind="min", alpha=0.25, recenter=recenter))
    held(advantages(TWO, {"a": 2.0, "b": 0.5}, settings)[0], expected)


def test_the_synergy_of_three_rewards_is_the_mean_over_pairs() -> None:
    rewards = {"a": torch.tensor([[-1.0, 1]]), "b": torch.tensor([[2.0, -2]]), "c": torch.tensor([[-3.0, 3]])}
    settings = AdvantageSettings(**PLAIN, synergy=SynergySettings(kind="max", alpha=1.0))
    # pairs of the first sample: max(-1, 2) = 2, both bad -max(-1, -3) = 1, max(2, -3) = 2; of the second: 1, 3, 3
    held(advantages(rewards, dict.fromkeys("abc", 1.0), settings)[0], [[-2 + 5 / 3, 2 + 7 / 3]])


def test_the_clamp_has_two_sides() -> None:
    settings = AdvantageSettings(scale="none", clamp=3.0)
    held(advantages({"a": torch.tensor([[0.0, 10]])}, {"a": 1.0}, settings)[0], [[-3.0, 3.0]])


def test_time_weights_are_shared_within_a_role_and_end_turned_round() -> None:
    rewards = {name: torch.tensor([[-x, x]]) for name, x in (("id", 1.0), ("face", 10.0), ("prompt", 100.0))}
    weights = {"id": 3.0, "face": 1.0, "prompt": 1.0}
    for inverted, first, last in ((False, 0.8, 0.4), (True, 0.4, 0.8)):
        time = TimeSettings(identity=("id", "face"), w_max=0.8, w_min=0.4, inverted=inverted)
        found = advantages(rewards, weights, AdvantageSettings(**PLAIN, time=time), 25)[:, 0, 1]
        for step, prompt in ((0, first), (24, last), (14, 0.6)):
            expected = (1 - prompt) * (0.75 * 1 + 0.25 * 10) + prompt * 100
            assert found[step].item() == pytest.approx(expected, rel=1e-6), step


def test_the_transition_keeps_its_shape_whatever_the_number_of_steps() -> None:
    """Of 10 steps: centre 14 * 10 / 25 = 5.6, steepness 0.8 * 25 / 10 = 2."""
    weights = TimeSettings(identity=("id",)).prompt_weights(10)
    for step in (3, 5, 8):
        expected = 0.3 + 0.4 * (1 - 1 / (1 + math.exp(-2 * (step - 5.6))))
        assert weights[step].item() == pytest.approx(expected, rel=1e-5)


def test_conflict_is_of_opposite_signs_alone_and_of_samples_that_were_scored() -> None:
    rewards = {name: torch.cat([one, flat]) for (name, one), flat in zip(
        TWO.items(), (torch.zeros(1, 3), torch.tensor([[1.0, 2, 3]])), strict=True
    )}  # fmt: skip
    found = conflict_metrics(rewards, {"a": 1.0, "b": 1.0}, AdvantageSettings(**PLAIN))
    # products 1, 0, -4 | 2, 2 | 0, 0, 0; squares 2 + 2 and 42 + 8 + 2
    assert found["conflict_share"] == pytest.approx(1 / 8)
    assert found["reward_correlation"] == pytest.approx(1 / math.sqrt(4 * 52))


def test_what_is_logged_of_rewards() -> None:
    rewards = {
        "a": torch.tensor([[0.0, 2], [10, 14], [5, 5], [NAN, 1]]),
        "b": torch.tensor([[0.0, 1], [0, 0], [2, 2], [3, 3]]),
    }
    found = reward_metrics(rewards, {"a": 3.0, "b": 2.0})
    # 3 a + 2 b: 0, 8 | 30, 42 | 19, 19 | 9 alone
    assert found["group_std"] == pytest.approx((4 + 6 + 0 + 0) / 4)
    assert found["zero_std_share"] == pytest.approx(2 / 4)
    assert found["failed_share"] == pytest.approx(1 / 8)
    assert found["reward/a/mean"] == pytest.approx(37 / 7) and found["reward/b/mean"] == pytest.approx(11 / 8)
    alone = reward_metrics({"a": torch.tensor([[0.0, 2], [1, 1], [3, 3]])}, {"a": 1.0})
    assert alone["zero_std_share"] == pytest.approx(2 / 3)
