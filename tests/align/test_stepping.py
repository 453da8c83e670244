"""Solvers and random steps: orders measured on a flow whose solution is known, placements counted."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pixrl.algorithms.sampling import (
    ODESolver,
    RolloutSettings,
    Schedule,
    Solver,
    StepNoise,
    StepPlan,
    Where,
    random_steps,
)
from pixrl.errors import InputError
from pixrl.models.sd3 import SD3Policy
from tests.tolerance import agree

SPREAD = 0.4


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[noise - x0 | x_t] where data is N(0, SPREAD^2)."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / variance * x


def error(solver: Solver, steps: int) -> float:
    sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
    plan = StepPlan(Schedule(tuple(sigmas.tolist())), solver)
    x = start = torch.ones(1, 1, dtype=torch.float64)
    ode = ODESolver(plan)
    for number, t in enumerate(plan.schedule.sigmas[:-1]):
        x = ode.step(x, gaussian_velocity(x, t), number)
    first, last = ((1 - t) ** 2 * SPREAD**2 + t**2 for t in (0.95, 0.05))
    return abs((x - start * math.sqrt(last / first)).item())


@pytest.mark.parametrize(("solver", "order"), [(Solver.EULER, 1), (Solver.DPM, 2)])
def test_order_of_the_solvers(solver: Solver, order: int) -> None:
    measured = math.log2(error(solver, 40) / error(solver, 80))
    assert order - 0.2 < measured < order + 0.4


def test_dpm_is_better_at_ten_steps() -> None:
    assert error(Solver.DPM, 10) < 0.5 * error(Solver.EULER, 10)


def test_the_first_step_from_pure_noise_and_the_last_are_eulers() -> None:
    schedule = Schedule((1.0, 0.6, 0.0))
    x, velocity = torch.randn(2, 3), torch.randn(2, 3)
    dpm, euler = (ODESolver(StepPlan(schedule, solver)) for solver in (Solver.DPM, Solver.EULER))
    for number in range(2):
        assert agree(dpm.step(x, velocity, number), euler.step(x, velocity, number), 16)


def test_history_is_forgotten_after_a_random_step() -> None:
    schedule = Schedule((0.9, 0.6, 0.3, 0.1, 0.0))
    x, velocity = torch.randn(2, 3), torch.randn(2, 3)
    solver = ODESolver(StepPlan(schedule, Solver.DPM))
    solver.step(x, velocity + 1, 0)
    # step 1 is random, so the solver does not take it
    expected = x + (0.1 - 0.3) * velocity
    assert agree(solver.step(x, velocity, 2), expected, 16)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, list(range(9))),
        ({"where": "all"}, list(range(9))),
        ({"where": "sliding_window", "window": 4, "every": 25}, [0, 1, 2, 3]),
    ],
)
def test_fixed_placements(settings: dict[str, object], expected: list[int]) -> None:
    assert random_steps(RolloutSettings(noise="flow_sde", **settings), seed=0, step=0) == expected


def test_the_sliding_window_moves_and_comes_round() -> None:
    settings = RolloutSettings(noise="dance", where="sliding_window", window=4, every=25)
    firsts = [random_steps(settings, seed=0, step=step)[0] for step in range(0, 200, 25)]
    assert firsts == [0, 1, 2, 3, 4, 5, 0, 1]
    assert random_steps(settings, seed=3, step=24) == [0, 1, 2, 3]


def test_random_placements() -> None:
    window = RolloutSettings(noise="cps", where="random_window", window=3)
    drawn = [random_steps(window, seed=0, step=step) for step in range(40)]
    assert {tuple(one) for one in drawn} == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    share = RolloutSettings(noise="dance", where="fraction", fraction=0.6)
    drawn = [random_steps(share, seed=0, step=step) for step in range(40)]
    assert all(len(one) == 5 and one == sorted(set(one)) and one[-1] < 9 for one in drawn)
    assert len({tuple(one) for one in drawn}) > 20
    assert random_steps(share, seed=0, step=7) == drawn[7]


@pytest.mark.parametrize("where", list(Where))
def test_the_last_step_is_never_random(where: Where) -> None:
    more = {
        Where.FRACTION: {"fraction": 1.0},
        Where.RANDOM_WINDOW: {"window": 5},
        Where.SLIDING_WINDOW: {"window": 9, "every": 1},
    }
    settings = RolloutSettings(noise="flow_sde", where=where, **more.get(where, {}))
    assert all(9 not in random_steps(settings, seed=0, step=step) for step in range(30))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.5}, "eta has no effect without noise"),
        ({"where": "all"}, "where has no effect without noise"),
        ({"noise": "dance", "window": 3}, "window has no effect with where: all"),
        ({"noise": "dance", "where": "fraction", "fraction": 0.5, "every": 2}, "every has no effect"),
        ({"noise": "dance", "where": "fraction"}, "needs fraction"),
        ({"noise": "dance", "where": "sliding_window", "window": 3}, "needs every"),
        ({"noise": "dance", "where": "random_window", "window": 6}, "has room for 5"),
        ({"noise": "cps", "eta": 1.5}, r"eta of cps must be in \(0, 1\]"),
        ({"noise": "flow_sde", "eta": -1}, "greater than 0"),
        ({"noise": "flow_sde", "steps": 1}, "at least 2 steps"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutSettings(**settings)


def test_published_etas() -> None:
    found = {noise: RolloutSettings(noise=noise).scale for noise in StepNoise}
    assert found == {StepNoise.NONE: 0, StepNoise.FLOW_SDE: 0.7, StepNoise.DANCE: 0.3, StepNoise.CPS: 0.8}


def test_the_schedule_is_the_models(policy: SD3Policy, sd3_folder: Path) -> None:
    plan = StepPlan.make(policy, RolloutSettings(steps=6), seed=0, step=0)
    assert torch.equal(torch.tensor(plan.schedule.sigmas), policy.schedule(6))
    with pytest.raises(InputError, match=r"sampling\.noise"):
        plan.random_step(torch.zeros(1, 1), torch.zeros(1, 1), 0, noise=torch.zeros(1, 1))
