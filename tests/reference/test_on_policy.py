"""How far a loss says training is from sampling: nothing before the first update, after it as a plain loop says."""

from typing import Any

import pytest
import torch

from pixrl.algorithms.dpo import DPOSettings
from pixrl.algorithms.draft import DraftSettings
from pixrl.algorithms.loss import Rollouts
from pixrl.algorithms.sft import SFTSettings
from pixrl.algorithms.trainer import Aligner
from tests.reference import grpo, plain, test_baselines, test_e2po, test_grpo, test_nft, world
from tests.reference.product import Run, begin, group_of
from tests.reference.world import Weights

ROWS = [1, 6, 3]
EXACT = 1e-12


def collected(run: Run) -> tuple[Aligner, Rollouts, Weights]:
    """The first step's rollouts, and `current` moved away from what drew them."""
    policy, aligner = begin(run)
    step = run.steps[0]
    rollouts = aligner.collect([group_of(scene) for scene in world.scenes(step, run.references)], step)
    current = policy.lora.slots["current"]
    moved = {
        name: x.detach() + world.normal(f"moved {name}", *x.shape, scale=0.02) for name, x in current.items()
    }
    return aligner, rollouts, moved


def put(aligner: Aligner, weights: Weights) -> None:
    for parameter, value in zip(aligner.parameters, weights.values(), strict=True):
        parameter.data.copy_(value)


def deviation(aligner: Aligner, rollouts: Rollouts, rows: list[int] = ROWS) -> float:
    return aligner.method.loss.deviation(aligner.policy, rollouts, rows)


def ratios_apart(module: Any, name: str, sampled: grpo.Sampled) -> tuple[float, float, float]:
    """The product's figure before and after the move, and the plain loop's after it."""
    case = module.CASES[name]
    run = module.product_run(case)
    aligner, rollouts, moved = collected(run)
    before = deviation(aligner, rollouts)
    put(aligner, moved)
    after = deviation(aligner, rollouts)
    kind, sampling = case["sampling"]["noise"], run.method.sampling
    sigmas, step, size = world.noise_levels(sampling.steps), run.steps[0], run.method.group_size
    where = {
        key: case["sampling"][key]
        for key in ("where", "fraction", "window", "every")
        if key in case["sampling"]
    }
    stochastic = grpo.places(run.seed, step, sampling.steps, **{"where": "all"} | where)
    random_step, eta = grpo.STEPS[kind]
    apart = []
    for row in ROWS:
        scene, s = world.scenes(step, run.references)[row // size], row % size
        noises = run.method.noises
        x = plain.first_noise(run.seed, scene, s, 1 if run.method.shared_start else noises)
        begun = world.added("current")
        drawn = grpo.draw(
            begun, scene, s, run.seed, sampled, s // noises, x, sigmas, stochastic, kind, eta, sampling.solver.value
        )  # fmt: skip
        for taken in drawn:
            t, next_t = sigmas[taken.number], sigmas[taken.number + 1]
            v = plain.velocity(moved, taken.x, t, plain.anchor(scene))
            move = random_step(taken.x, v, t, next_t, eta, sigmas[1])
            log_prob = grpo.density(kind, taken.next_x, move).item()
            apart.append(abs(torch.tensor(log_prob - taken.old_log_prob).exp().item() - 1))
    return before, after, max(apart)


def test_ratios_of_the_clipped_loss() -> None:
    before, after, expected = ratios_apart(test_grpo, "dance_grpo", grpo.prompt_alone)
    assert before <= EXACT < 1e-3 < after
    assert after == pytest.approx(expected, rel=1e-9)


def test_ratios_under_variants() -> None:
    """Their densities are those of the prompt itself, so the ratio is 1 at first for every variant."""
    case = test_e2po.CASES["grpo"]
    sampled = test_e2po.perturbing(test_e2po.WIDE | case["explore"]).condition
    before, after, expected = ratios_apart(test_e2po, "grpo", sampled)
    assert before <= EXACT < 1e-3 < after
    assert after == pytest.approx(expected, rel=1e-9)


def velocities_apart(run: Run, other: Weights | None) -> tuple[float, float]:
    """The product's figure on its own rollouts after the move, and the plain loop's."""
    aligner, rollouts, moved = collected(run)
    put(aligner, moved)
    sigmas, size = world.noise_levels(run.method.sampling.steps), run.method.group_size
    one, two = [], []
    for row in ROWS:
        scene, s = world.scenes(run.steps[0], run.references)[row // size], row % size
        t = sigmas[plain.shuffled_levels(run.seed, scene, s, 0, len(sigmas) - 1)[0]]
        x_t = (1 - t) * rollouts.x0_B[row] + t * plain.later_noise(run.seed, scene, s, 2, 0)
        one.append(plain.velocity(moved, x_t, t, plain.anchor(scene)))
        two.append(plain.velocity(other, x_t, t, plain.anchor(scene)))
    apart = (torch.stack(one) - torch.stack(two)).norm() / torch.stack(two).norm()
    return deviation(aligner, rollouts), apart.item()


RUNS = {
    "nft": (test_nft.product_run(test_nft.CASES["published"]), "old"),
    "rpo": (test_baselines.product_run(test_baselines.CASES["from_the_prompt"]), None),
    "dpo": (
        test_baselines.run_of(DPOSettings(timesteps=2), {"steps": 5}, "group", 0, lambda step: test_baselines.BOTH),
        None,
    ),
    "sft": (
        test_baselines.run_of(SFTSettings(timesteps=2), {"steps": 5}, "group", 1, lambda step: test_baselines.BOTH),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_velocities(name: str) -> None:
    run, slot = RUNS[name]
    found, expected = velocities_apart(run, None if slot is None else world.added(slot))
    assert found == pytest.approx(expected, rel=1e-9) and expected > 1e-3


def test_the_last_steps_of_draft() -> None:
    functions = {name: test_baselines.Differentiable(name) for name in test_baselines.FUNCTIONS}
    run = test_baselines.run_of(
        DraftSettings(last=3), {"steps": 5}, "group", 0, test_baselines.staged, functions
    )
    aligner, rollouts, moved = collected(run)
    assert deviation(aligner, rollouts) <= EXACT
    put(aligner, moved)
    sigmas, apart = world.noise_levels(5), []
    for row in ROWS:
        scene = world.scenes(run.steps[0])[row // run.method.group_size]
        x = rollouts.transitions[0].x_B[row]
        for i in (2, 3, 4):
            v = plain.velocity(moved, x, sigmas[i], plain.anchor(scene))
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        apart.append((x - rollouts.x0_B[row]).abs().max().item() / sigmas[2])
    assert deviation(aligner, rollouts) == pytest.approx(max(apart), rel=1e-9)
