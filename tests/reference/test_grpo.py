"""The clipped loss and its samplers against a plain loop: the same weights after three training steps."""

from collections.abc import Mapping
from typing import Any

import pytest

from pixrl.algorithms import make_loss
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.exploration import NoiseOnly
from pixrl.algorithms.grpo import GRPOSettings
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.algorithms.trainer import Method, OptimizerSettings
from tests.reference import grpo, world
from tests.reference.agreement import assert_moved, assert_same_figures, assert_same_weights
from tests.reference.product import MICRO, Run, train, train_in_two

SEED = 11
OPTIMIZER = {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.1, "grad_clip": 1.0, "updates": 2, "ema": 0.8}
TDW = {"identity": ("first",), "start": 4.0, "end": 20.0, "center": 11.0, "steepness": 0.3}


def both(step: int) -> Mapping[str, float]:
    return {"first": 0.4, "second": 0.6}


def alike(step: int) -> Mapping[str, float]:
    return {"first": 1.0, "second": 1.0}


def three(step: int) -> Mapping[str, float]:
    return {"first": 1.0, "second": 0.3, "third": 0.9}


# name -> what the recipe says
CASES: dict[str, dict[str, Any]] = {
    "flow_grpo": {
        "sampling": {"noise": "flow_sde"}, "loss": {"clip": 0.002, "kl": 0.5, "kl_form": "flow_grpo"},
        "advantage": {"scale": "global"},
    },
    "flow_grpo_exact_kl": {
        "sampling": {"noise": "flow_sde", "eta": 0.5}, "loss": {"clip": 0.05, "kl": 0.3, "kl_form": "exact"},
        "optimizer": {"grad_clip": 100.0, "updates": 3},
    },
    "flow_grpo_fast": {
        "sampling": {"noise": "cps", "steps": 9, "where": "random_window", "window": 2}, "loss": {"clip": 0.01},
        "advantage": {"scale": "global"}, "first_step": 4,
    },
    "dance_grpo": {
        "sampling": {"noise": "dance", "steps": 6, "where": "fraction", "fraction": 0.6}, "loss": {"clip": 0.002},
        "shared_start": True,
    },
    "mix_grpo": {
        "sampling": {
            "noise": "flow_sde", "steps": 7, "where": "sliding_window", "window": 2, "every": 2, "solver": "dpm",
        },
        "loss": {"clip": 0.002}, "shared_start": True, "first_step": 7,
    },
    "customized_grpo": {
        "sampling": {"noise": "flow_sde"}, "loss": {}, "references": 2, "trained": alike, "optimizer": {"updates": 1},
        "advantage": {"synergy": {"kind": "tanh", "alpha": 0.5}, "time": TDW},
    },
    "customized_grpo_at_random_steps": {
        "sampling": {"noise": "flow_sde", "steps": 8, "where": "fraction", "fraction": 0.4}, "loss": {},
        "references": 1, "trained": alike, "optimizer": {"updates": 1},
        "advantage": {"synergy": {"alpha": 0.5}, "time": TDW},
    },
    "customized_grpo_inverted": {
        "sampling": {"noise": "dance", "eta": 0.6, "steps": 6}, "loss": {"clip": 0.01}, "references": 1,
        "trained": three, "scale_loss": True,
        "advantage": {
            "synergy": {"kind": "min", "alpha": 0.8, "recenter": True}, "clamp": None,
            "time": {"identity": ("second", "third"), "inverted": True, "w_max": 0.9, "w_min": 0.2},
        },
    },
    "harmonic": {
        "sampling": {"noise": "flow_sde"}, "loss": {}, "trained": both, "optimizer": {"updates": 1, "grad_clip": 50.0},
        "advantage": {"synergy": {"kind": "harmonic"}, "scale": "global", "skip_flat": True},
    },
    "max": {
        "sampling": {"noise": "flow_sde"}, "loss": {}, "trained": three, "optimizer": {"updates": 1, "warmup": 1},
        "advantage": {"synergy": {"kind": "max"}, "clamp": 1.0},
    },
}  # fmt: skip


def product_run(case: dict[str, Any]) -> Run:
    first = case.get("first_step", 0)
    method = Method(
        NoiseOnly(),
        RolloutSettings(**{"steps": 5} | case["sampling"]),
        GroupAdvantage(AdvantageSettings(**case.get("advantage", {}))),
        make_loss(GRPOSettings(**case["loss"])),
        OptimizerSettings(**OPTIMIZER | case.get("optimizer", {})),
        noises=4,
        shared_start=case.get("shared_start", False),
    )
    trained, references = case.get("trained", both), case.get("references", 0)
    rewards = ("first", "second", "third")
    return Run(
        method, SEED, range(first, first + 3), rewards, trained, references, case.get("scale_loss", False)
    )


def plain_run(case: dict[str, Any]) -> Any:
    sampling = {"steps": 5} | case["sampling"]
    where = {name: sampling[name] for name in ("where", "fraction", "window", "every") if name in sampling}
    advantage = dict(case.get("advantage", {}))
    if "synergy" in advantage:
        advantage["synergy_of"] = advantage.pop("synergy")
    first = case.get("first_step", 0)
    return grpo.train(
        seed=SEED, steps=range(first, first + 3), noises=4,
        optimizer=OPTIMIZER | case.get("optimizer", {}),
        advantage=advantage, trained=case.get("trained", both), rewards=("first", "second", "third"),
        sampling_steps=sampling["steps"], noise=sampling["noise"], eta=sampling.get("eta"), where=where,
        solver=sampling.get("solver", "euler"), shared_start=case.get("shared_start", False),
        references=case.get("references", 0), kl_rows=MICRO.train, **case["loss"],
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_product_equals_the_plain_loop(name: str) -> None:
    expected, log = plain_run(CASES[name])
    alone = train(product_run(CASES[name]))
    assert_same_weights(alone, expected)
    assert_same_figures(alone, log)
    # which rows the distance to the reference is measured on, where it is only logged, depends on the process
    unlike = frozenset() if CASES[name]["loss"].get("kl") else frozenset({"kl"})
    for peer in train_in_two(lambda: product_run(CASES[name])):
        assert_same_weights(peer, expected)
        assert_same_figures(peer, log, unlike)
    assert_moved(expected, {"current": world.added("current")})
