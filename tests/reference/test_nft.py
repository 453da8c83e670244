"""DiffusionNFT and its options, and E2PO on it, against a plain loop: the same weights after three training steps."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pixrl.algorithms import make_loss
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.exploration import NoiseOnly
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.algorithms.trainer import Method, OptimizerSettings
from tests.reference import nft, world
from tests.reference.agreement import assert_moved, assert_same_figures, assert_same_weights
from tests.reference.product import MICRO, Run, train, train_in_two

SEED = 7
OPTIMIZER = {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.1, "grad_clip": 1.0, "updates": 2, "ema": 0.8}


def one(step: int) -> Mapping[str, float]:
    return {"first": 1.0}


def staged(step: int) -> Mapping[str, float]:
    """Another mixture in every step, as stages of a recipe ask for."""
    return [{"first": 1.0}, {"first": 0.4, "second": 0.6}, {"second": 1.5}][step % 3]


# name -> what the recipe says
CASES: dict[str, dict[str, Any]] = {
    "published": {"advantage": {"scale": "global"}, "loss": {"old_policy": "slow"}, "first_step": 300},
    "strong_kl": {"loss": {"kl": 0.7, "beta": 0.1, "certain": 1.0}, "optimizer": {"grad_clip": 100.0}},
    "late": {"loss": {"old_policy": "late"}, "first_step": 100, "solver": "dpm", "steps": 6},
    "follow": {"loss": {"old_policy": "follow"}, "optimizer": {"updates": 1, "warmup": 2}, "solver": "dpm"},
    "levels": {"loss": {"levels": (1, 4), "timesteps": 2, "beta": 0.5, "kl": 0.0}, "advantage": {"scale": "none"}},
    "stages": {
        "trained": staged,
        "loss": {"old_policy": "constant", "old_decay": 0.3, "kl": 0.2},
        "advantage": {"scale": "group", "clamp": 0.9, "eps": 0.01, "skip_flat": True},
        "optimizer": {"decay_steps": 4, "updates": 3, "ema": None},
    },
}  # fmt: skip
DECAYS: dict[str, Callable[[int], float]] = {
    "follow": lambda step: 0.0,
    "slow": lambda step: min(0.001 * step, 0.5),
    "late": lambda step: 0.0 if step <= 75 else min(0.0075 * (step - 75), 0.999),
    "constant": lambda step: 0.3,
}


def product_run(case: dict[str, Any]) -> Run:
    first = case.get("first_step", 0)
    method = Method(
        NoiseOnly(),
        RolloutSettings(steps=case.get("steps", 5), solver=case.get("solver", "euler")),
        GroupAdvantage(AdvantageSettings(**case.get("advantage", {}))),
        make_loss(NFTSettings(**{"timesteps": 3, **case.get("loss", {})})),
        OptimizerSettings(**OPTIMIZER | case.get("optimizer", {})),
        noises=4,
    )
    trained = case.get("trained", one)
    return Run(method, SEED, range(first, first + 3), ("first", "second"), trained)


def plain_run(case: dict[str, Any]) -> Any:
    loss = {"timesteps": 3, "old_policy": "slow", **case.get("loss", {})}
    loss.pop("old_decay", None)
    first = case.get("first_step", 0)
    return nft.train(
        seed=SEED, steps=range(first, first + 3), noises=4,
        optimizer=OPTIMIZER | case.get("optimizer", {}),
        advantage=case.get("advantage", {}), trained=case.get("trained", one), rewards=("first", "second"),
        sampling_steps=case.get("steps", 5), solver=case.get("solver", "euler"),
        old_decay=DECAYS[loss.pop("old_policy")], kl_rows=MICRO.train, **loss,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_product_equals_the_plain_loop(name: str) -> None:
    expected, log = plain_run(CASES[name])
    alone = train(product_run(CASES[name]))
    assert_same_weights(alone, expected)
    assert_same_figures(alone, log)
    # which rows the distance to the reference is measured on, where it is only logged, depends on the process
    unlike = frozenset({"kl"}) if CASES[name]["loss"].get("kl") == 0 else frozenset()
    for peer in train_in_two(lambda: product_run(CASES[name])):
        assert_same_weights(peer, expected)
        assert_same_figures(peer, log, unlike)
    assert_moved(expected, {"current": world.added("current")})
