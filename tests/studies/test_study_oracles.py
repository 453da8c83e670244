"""What studies say of their records, in numbers worked out by hand: curves, levels, orderings, budgets."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from tests.align.synthetic import settings

from pixrl.errors import ConfigError
from pixrl.metrics.intervals import Interval
from studies.config import budget_of, check_budgets
from studies.figures import INDEPENDENT, conflict, marks_of, over_seeds
from studies.runs import training_figures, training_record
from studies.runs_tables import (
    HOLDS,
    MISSING,
    OPEN,
    REVERSED,
    expected_conflict,
    orderings,
    verdict,
)

STUDY: Any = SimpleNamespace(
    drawn=lambda: ["ours"],
    prompt="prompt",
    identity="identity",
    orderings=[SimpleNamespace(better="ours", worse="base", rewards=("identity", "prompt"), paper="")],
)


def record(variant: str, seed: int, identity: float, prompt: float, **curves: Any) -> dict[str, Any]:
    figures = {"reward/identity": identity, "reward/prompt": prompt}
    return {"variant": variant, "seed": seed, "figures": figures, "curves": curves}


def test_the_lines_of_independence_lie_at_one_half_and_at_zero() -> None:
    """Curves that are as of independent rewards lie on them; others above or below."""

    def heights(share: float, correlation: float) -> list[list[list[float]]]:
        points = {
            "conflict_share": [[10, share], [20, share]],
            "reward_correlation": [[10, correlation], [20, correlation]],
        }
        made = conflict(STUDY, [record("ours", 0, 0, 0, **points)])
        assert made is not None
        assert not any(axes.yaxis_inverted() for axes in made.axes)  # a larger value is higher up
        lines = [line for axes in made.axes for line in axes.lines]
        assert all(list(line.get_xdata()) == [10, 20] for line in lines)
        return [
            [list(line.get_ydata()) for line in lines if (line.get_label() == INDEPENDENT) is level]
            for level in (False, True)
        ]

    curves, levels = heights(0.5, 0.0)
    assert curves == levels == [[0.5, 0.5], [0.0, 0.0]]
    for share, correlation in ((0.2, 0.5), (0.9, -0.5)):
        curves, levels = heights(share, correlation)
        assert curves == [[share, share], [correlation, correlation]] and levels == [[0.5, 0.5], [0.0, 0.0]]


def test_each_panel_names_what_it_shows() -> None:
    points = {"conflict_share": [[10, 0.4]], "reward_correlation": [[10, 0.3]]}
    made = conflict(STUDY, [record("ours", 0, 0, 0, **points)])
    assert made is not None
    shown = {axes.get_title(loc="left"): axes.lines[0].get_ydata()[0] for axes in made.axes}
    assert shown == {"conflict share": 0.4, "correlation of the advantages": 0.3}


def test_the_trade_off_has_the_prompt_across_and_the_identity_up() -> None:
    records = [record("ours", seed, 0.7, 20.0 + seed) for seed in range(3)]
    (mark,) = marks_of(STUDY, records, {"ours": ("ours", 0)})
    assert (mark.x[0], mark.y[0]) == pytest.approx((21.0, 0.7))


def test_an_ordering_holds_or_is_reversed_where_the_interval_excludes_zero() -> None:
    records = [record("ours", seed, 0.7 + 0.01 * seed, 19.0 + seed) for seed in range(3)]
    records += [record("base", seed, 0.6, 21.0 + seed) for seed in range(3)]
    assert [one["verdict"] for one in orderings(STUDY, records)] == [HOLDS, REVERSED]
    assert [one["difference"].mean for one in orderings(STUDY, records)] == pytest.approx([0.11, -2.0])
    assert verdict(Interval(0.1, -0.1, 0.3, 3)) == OPEN
    assert verdict(Interval(math.nan, math.nan, math.nan, 0)) == MISSING


def test_the_expected_conflict_falls_with_the_correlation() -> None:
    assert [expected_conflict(rho) for rho in (1, 0.5, 0, -1)] == pytest.approx([0, 1 / 3, 1 / 2, 1])


def test_a_band_is_the_mean_least_and_greatest_of_the_seeds() -> None:
    runs = [[(1.0, 2.0), (2.0, 5.0)], [(1.0, 6.0), (2.0, 1.0), (3.0, 9.0)], [(1.0, 1.0), (2.0, 3.0)]]
    assert over_seeds(runs) == [(1.0, 3.0, 1.0, 6.0), (2.0, 3.0, 1.0, 5.0)]


def config(**changes: Any) -> Any:
    base = {"steps": 4, "exploration": {"kind": "noise", "noises": 3}, "sampling": {"steps": 10}}
    return settings(**base | changes)


def test_curves_are_over_pictures_drawn() -> None:
    """Two prompts of three noises a step; an evaluation before the first step has none drawn."""
    rows = [
        {"step": step, "kl": 0.1 * step, "group_std": 1.0 + step, "seconds/update": 30.0} for step in range(4)
    ]
    evaluated = [{"step": step, "geneval/mean": 0.4 + step} for step in (0, 4)]
    found = training_record(config(loss={"kind": "nft"}), rows, evaluated)
    assert found["curves"]["group_std"] == [[6 * (step + 1), 1.0 + step] for step in range(4)]
    assert found["curves"]["fixed/geneval"] == [[0, 0.4], [24, 4.4]]
    assert found["images"] == 24 and found["training"]["minutes"] == pytest.approx(2)
    assert found["training"]["group_std"] == 2.5 and found["training"]["group_std/end"] == 4.0


def test_the_end_of_training_is_its_last_quarter() -> None:
    rows = [{"group_std": float(step), "zero_std_share": math.nan if step else 0.5} for step in range(8)]
    found = training_figures(rows)
    assert (found["group_std"], found["group_std/end"]) == (3.5, 6.5)
    assert (found["zero_std_share"], found["zero_std_share/end"]) == (0.5, None)


def test_pictures_of_sft_and_rpo_are_not_the_trained_models() -> None:
    losses = ("nft", "sft", "rpo")
    assert [config(loss={"kind": kind}).loss.draws_its_own for kind in losses] == [True, False, False]
    found = training_record(config(loss={"kind": "rpo"}), [{"step": 0, "kl": 0.1, "group_std": 1.0}], [])
    assert not found["curves"].get("group_std") and found["curves"]["kl"] == [[6, 0.1]]


def test_budgets_count_what_goes_through_a_gradient() -> None:
    """24 pictures in 8 groups."""
    of = {
        kind: budget_of(config(loss={"kind": kind, "timesteps": 5, **more}))
        for kind, more in (("nft", {}), ("sft", {}), ("rpo", {"similarity": 0.0}))
    }
    assert {name: one.gradient_terms for name, one in of.items()} == {"nft": 120, "sft": 120, "rpo": 80}
    assert budget_of(config(loss={"kind": "rpo", "timesteps": 5})).gradient_terms == 120
    assert {name: one.scores for name, one in of.items()} == {"nft": 24, "sft": 0, "rpo": 24}
    assert of["nft"].comparable == (24, 4)
    with pytest.raises(ConfigError, match="24 images, 8 updates"):
        check_budgets({"one": config(), "two": config(optimizer={"updates": 2})})
