"""E2PO on DiffusionNFT and on the clipped loss against a plain loop; its learned perturbations against another."""

from typing import Any

import pytest
import torch

from pixrl.algorithms import make_loss
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.e2po import PerturbationSettings, PerturbedEmbeddings
from pixrl.algorithms.grpo import GRPOSettings
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.algorithms.trainer import Method, OptimizerSettings
from tests.reference import grpo, nft, world
from tests.reference.agreement import assert_moved, assert_same_figures, assert_same_weights
from tests.reference.e2po import Perturbing, perturbations
from tests.reference.product import MICRO, Run, train, train_in_two
from tests.tolerance import agree_after_adam

SEED, NOISES = 3, 2
OPTIMIZER = {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.1, "grad_clip": 1.0, "updates": 2, "ema": 0.8}
LEARNING = frozenset(
    (
        "anchor_cosine",
        "anchor_cosine_min",
        "in_band_share",
        "delta_norm_share",
        "pairwise_cosine",
        "learned_prompts",
    )
)
"""Figures of the variants, which are compared below."""
WIDE = {"sigma_init": 0.7, "max_norm": 0.9, "steps": 0}
"""Perturbations as they are drawn, so large that it shows under whose condition a step was taken."""
TDW = {"identity": ("second",), "start": 3.0, "end": 21.0}
GRPO = {
    "sampling": {"noise": "flow_sde"},
    "loss": {"clip": 0.002, "kl": 0.3},
    "advantage": {"scale": "global"},
}

CASES: dict[str, dict[str, Any]] = {
    "nft": {"explore": {"variants": 3}, "advantage": {"scale": "global"}},
    "nft_static_both": {
        "explore": {"variants": 2, "schedule": "static", "encoders": "both", "norm": "relative", "max_norm": 0.5},
        "sampling": {"solver": "dpm"},
    },
    "nft_without_anchor": {"explore": {"variants": 3, "anchored": False, "perturbation_range": 0.8, "seed": 5}},
    "sars": {"explore": {"variants": 3}, "references": 1, "advantage": {"synergy": {"alpha": 0.7}, "time": TDW}},
    "grpo": GRPO | {"explore": {"variants": 3, "perturbation_range": 0.6}},
    "grpo_window": {
        "sampling": {"noise": "cps", "steps": 8, "where": "random_window", "window": 2, "solver": "dpm"},
        "loss": {"clip": 0.02}, "explore": {"variants": 3, "anchored": False, "perturbation_range": 1.0},
    },
}  # fmt: skip


def weights(step: int) -> dict[str, float]:
    return {"first": 1.0, "second": 1.0}


def product_run(case: dict[str, Any]) -> Run:
    sampling = {"steps": 5} | case.get("sampling", {})
    is_clipped = "noise" in sampling
    loss = GRPOSettings(**case["loss"]) if is_clipped else NFTSettings(timesteps=3, kl=0.2)
    method = Method(
        PerturbedEmbeddings(PerturbationSettings(**WIDE | case["explore"])),
        RolloutSettings(**sampling),
        GroupAdvantage(AdvantageSettings(**case.get("advantage", {}))),
        make_loss(loss),
        OptimizerSettings(**OPTIMIZER),
        noises=NOISES,
    )
    return Run(method, SEED, range(200, 203), ("first", "second"), weights, case.get("references", 0))


def perturbing(explore: dict[str, Any]) -> Perturbing:
    options = dict(explore)
    options["static"] = options.pop("schedule", "") == "static"
    options["relative"] = options.pop("norm", "") == "relative"
    if options.pop("encoders", "clip_l") == "both":
        options["encoders"] = ("clip_l", "clip_g")
    return Perturbing(**options)


def plain_run(case: dict[str, Any]) -> Any:
    explore = perturbing(WIDE | case["explore"])
    sampling = {"steps": 5} | case.get("sampling", {})
    advantage = dict(case.get("advantage", {}))
    if "synergy" in advantage:
        advantage["synergy_of"] = advantage.pop("synergy")
    options = {
        "seed": SEED, "steps": range(200, 203), "noises": NOISES, "optimizer": OPTIMIZER, "advantage": advantage,
        "trained": weights, "rewards": ("first", "second"), "sampling_steps": sampling["steps"],
        "solver": sampling.get("solver", "euler"), "variants": explore.variants, "sampled": explore.condition,
        "references": case.get("references", 0),
    }  # fmt: skip
    if "noise" not in sampling:
        return nft.train(**options, timesteps=3, kl=0.2)
    where = {name: sampling[name] for name in ("where", "window") if name in sampling}
    return grpo.train(**options, noise=sampling["noise"], where=where, kl_rows=MICRO.train, **case["loss"])


@pytest.mark.parametrize("name", CASES)
def test_the_product_equals_the_plain_loop(name: str) -> None:
    expected, log = plain_run(CASES[name])
    alone = train(product_run(CASES[name]))
    assert_same_weights(alone, expected)
    assert_same_figures(alone, log, LEARNING)
    unlike = LEARNING if CASES[name].get("loss", {"kl": 0.2}).get("kl") else LEARNING | {"kl"}
    for peer in train_in_two(lambda: product_run(CASES[name])):
        assert_same_weights(peer, expected)
        assert_same_figures(peer, log, unlike)
    assert_moved(expected, {"current": world.added("current")})


LEARNED: dict[str, dict[str, Any]] = {
    "published": {"variants": 4, "steps": 12, "lr": 0.02, "sigma_init": 0.02, "max_norm": 0.2},
    "anchor_weighted": {
        "variants": 3, "weighted": "anchor", "target": 0.6, "margin": 0.05, "weight": 7.0, "norm": "relative",
        "max_norm": 0.5, "encoders": "both", "anchored": False, "steps": 12, "lr": 0.02, "sigma_init": 0.02,
    },
    # some variants begin above the band, some in it, some below
    "around_the_band": {
        "variants": 4, "weighted": "anchor", "target": 0.7, "margin": 0.15, "weight": 7.0, "max_norm": 2.0, "steps": 6,
        "lr": 0.02, "sigma_init": 0.6,
    },
    "single": {"variants": 2, "steps": 6, "lr": 0.05, "seed": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_learned_perturbations_equal_the_plain_loops(name: str) -> None:
    """Learning is in float32, by steps of Adam."""
    settings = LEARNED[name] | {"prompts_at_once": 2}
    exploration, expected = PerturbedEmbeddings(PerturbationSettings(**settings)), perturbing(LEARNED[name])
    prompts = ["a red owl", "fish", "a red owl"]
    prepared = exploration.prepare(world.TinyPolicy(), prompts)
    found = exploration.state()
    wanted = {
        (number, encoder): delta
        for number, prompt in enumerate(dict.fromkeys(prompts))
        for encoder, delta in perturbations(expected, prompt).items()
    }
    assert len(found) == len(wanted)
    for (name_found, delta), ((_, encoder), other) in zip(found.items(), wanted.items(), strict=True):
        assert name_found.endswith(encoder)
        nothing = {"delta": torch.zeros_like(delta)}
        assert agree_after_adam({"delta": delta}, {"delta": other.float()}, nothing, 16), name_found
    figures = expected.figures(list(dict.fromkeys(prompts))) | {"learned_prompts": 2.0}
    assert prepared.metrics == pytest.approx(figures, rel=1e-4)
    assert exploration.prepare(world.TinyPolicy(), prompts).metrics["learned_prompts"] == 0
