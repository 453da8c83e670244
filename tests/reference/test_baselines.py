"""SFT, DPO, RPO and DRaFT against plain loops: the same weights after three training steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pixrl.algorithms import make_loss
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.dpo import DPOSettings
from pixrl.algorithms.draft import DraftSettings
from pixrl.algorithms.exploration import NoiseOnly
from pixrl.algorithms.loss import LossSettings
from pixrl.algorithms.rpo import RPOSettings
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.algorithms.sft import SFTSettings
from pixrl.algorithms.trainer import Method, OptimizerSettings
from tests.reference import baselines, world
from tests.reference.agreement import assert_moved, assert_same_figures, assert_same_weights
from tests.reference.product import MICRO, Run, train, train_in_two

SEED, NOISES = 5, 4
OPTIMIZER = {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.1, "grad_clip": 1.0, "updates": 2, "ema": 0.8}
REWARDS = ("first", "second")
BOTH = {"first": 0.4, "second": 0.7}


def run_of(
    loss: LossSettings,
    sampling: dict[str, Any],
    scale: str,
    references: int,
    trained: Any,
    rewards: Any = None,
) -> Run:
    method = Method(
        NoiseOnly(),
        RolloutSettings(**sampling),
        GroupAdvantage(AdvantageSettings(scale=scale)),
        make_loss(loss, rewards),
        OptimizerSettings(**OPTIMIZER),
        noises=NOISES,
    )
    return Run(method, SEED, range(1, 4), REWARDS, trained, references)


def compare(run: Any, expected: Any, unlike: frozenset[str]) -> None:
    slots, log = expected
    alone = train(run())
    assert_same_weights(alone, slots)
    assert_same_figures(alone, log)
    for peer in train_in_two(run):
        assert_same_weights(peer, slots)
        assert_same_figures(peer, log, unlike)
    assert_moved(slots, {"current": world.added("current")})


LOGGED = frozenset({"kl"})
"""On which rows the distance to the reference is measured, where it is only logged, depends on the process."""


def test_sft_equals_the_plain_loop() -> None:
    expected = baselines.sft(
        seed=SEED, steps=range(1, 4), noises=NOISES, optimizer=OPTIMIZER, timesteps=2, sampling_steps=5, references=2,
        rewards=REWARDS, trained=BOTH, kl_rows=MICRO.train,
    )  # fmt: skip
    compare(
        lambda: run_of(SFTSettings(timesteps=2), {"steps": 5}, "group", 2, lambda step: BOTH),
        expected,
        LOGGED,
    )


@pytest.mark.parametrize(("beta", "timesteps"), [(3.0, 1), (20.0, 3)])
def test_dpo_equals_the_plain_loop(beta: float, timesteps: int) -> None:
    expected = baselines.dpo(
        seed=SEED, steps=range(1, 4), noises=NOISES, optimizer=OPTIMIZER, timesteps=timesteps, sampling_steps=5,
        rewards=REWARDS, trained=BOTH, beta=beta, kl_rows=MICRO.train,
    )  # fmt: skip
    loss = DPOSettings(beta=beta, timesteps=timesteps)
    compare(lambda: run_of(loss, {"steps": 5}, "group", 0, lambda step: BOTH), expected, LOGGED)


# of RPO; name -> what the recipe says
CASES: dict[str, dict[str, Any]] = {
    "from_the_prompt": {"beta": 3.0, "similarity": 0.5, "scale": "group", "solver": "euler", "references": 2},
    "shown": {
        "beta": 8.0,
        "similarity": 0.0,
        "scale": "global",
        "solver": "dpm",
        "references": 1,
        "shown": True,
    },
    "one_subject": {"beta": 2.0, "similarity": 1.5, "scale": "none", "solver": "dpm", "references": 1},
}


def product_run(case: dict[str, Any]) -> Run:
    loss = RPOSettings(
        beta=case["beta"], similarity=case["similarity"], timesteps=3, shown=case.get("shown", False)
    )
    sampling = {"steps": 5, "solver": case["solver"]}
    return run_of(loss, sampling, case["scale"], case["references"], lambda step: BOTH)


def plain_run(case: dict[str, Any]) -> Any:
    return baselines.rpo(
        seed=SEED, steps=range(1, 4), noises=NOISES, optimizer=OPTIMIZER, timesteps=3, sampling_steps=5,
        rewards=REWARDS, trained=BOTH, kl_rows=MICRO.train, **{"shown": False} | case,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rpo_equals_the_plain_loop(name: str) -> None:
    compare(lambda: product_run(CASES[name]), plain_run(CASES[name]), LOGGED)


def likeness(image: Tensor, prompt: str) -> Tensor:
    """To a picture of the prompt's own."""
    return -((image - world.picture(f"wanted {prompt}").double()) ** 2).mean()


def colour(image: Tensor, prompt: str) -> Tensor:
    """Of the prompt's own; one prompt has none."""
    if prompt == "a green house":
        return image.sum() * torch.nan
    return (image.mean(dim=(1, 2)) * world.normal(f"colour {prompt}", 3)).sum().tanh()


FUNCTIONS = {"first": likeness, "second": colour}


class Differentiable:
    """A plain function as a reward of the product."""

    def __init__(self, name: str) -> None:
        self.function = FUNCTIONS[name]

    def differentiable_scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> Tensor:
        # the metadata must be that of the prompt
        words = {scene.prompt: scene.word for scene in world.scenes(0) + world.scenes(1)}
        assert [known["class"] for known in metadata] == [words[prompt] for prompt in prompts]
        return torch.stack(
            [self.function(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        )


def staged(step: int) -> dict[str, float]:
    return {"first": 1.0} if step == 1 else BOTH


@pytest.mark.parametrize(("last", "kl"), [(2, 0.0), (3, 0.4), (5, 0.0)])
def test_draft_equals_the_plain_loop(last: int, kl: float) -> None:
    """The last of these is full DRaFT: all steps."""
    expected = baselines.draft(
        seed=SEED, steps=range(1, 4), noises=NOISES, optimizer=OPTIMIZER, sampling_steps=5, last=last, kl=kl,
        functions=FUNCTIONS, rewards=REWARDS, trained=staged, kl_rows=MICRO.train,
    )  # fmt: skip

    def run() -> Run:
        rewards = {name: Differentiable(name) for name in FUNCTIONS}
        return run_of(DraftSettings(last=last, kl=kl), {"steps": 5}, "group", 0, staged, rewards)

    compare(run, expected, frozenset() if kl else LOGGED)
