"""How one rollout moves from noise to data, and which of its steps are random.

Two solvers of the flow's ODE (Euler, and DPM-Solver++ 2M, Lu et al. 2022, for the path x_t = (1-t) x0 + t noise) and
three stochastic steps with a density (`pixrl.equations.sde`): Flow-GRPO's, DanceGRPO's, the coefficient-preserving.
Where a step is not random it is an ODE step.

| paper                          | here                                             |
|--------------------------------|--------------------------------------------------|
| t_i, sigma_i                   | `Schedule.sigmas`, from 1 down to 0              |
| alpha, lambda = log(alpha / t) | 1 - sigma, `_half_log_snr`                       |
| SDE window (Flow-GRPO-Fast, MixGRPO) | `StepPlan.stochastic`, numbers of steps    |

Deviations:

1. Which steps are random is drawn once a training step for all samples, keyed by (seed, step), so that it depends on
   neither the micro-batch nor the number of processes. Published code draws per batch or per sample.
2. The last step is never random: its density is too sharp to train on.
3. DPM's history is forgotten after a random step, so the step behind it is of first order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pixrl.config import Count, Settings
from pixrl.equations import SDEStep, cps_step, dance_step, flow_sde_step, predict_x0
from pixrl.errors import InputError
from pixrl.models.base import FlowPolicy
from pixrl.types import sample_seed

_STEPS_KEY = -2
"""Prompt index of the draws of random steps; prompts use 0 and up."""


class Solver(StrEnum):
    """How a step of the ODE is taken."""

    EULER = "euler"
    DPM = "dpm"
    """DPM-Solver++ 2M: second order, from this step's and the last step's prediction of the data."""


class StepNoise(StrEnum):
    """What makes a step random."""

    NONE = "none"
    FLOW_SDE = "flow_sde"
    DANCE = "dance"
    CPS = "cps"


class Where(StrEnum):
    """Which steps are random, and so trained on. The last one never is."""

    ALL = "all"
    FRACTION = "fraction"
    """A share of them, drawn anew each training step."""
    RANDOM_WINDOW = "random_window"
    """Neighbouring steps in the first half, drawn anew each training step (Flow-GRPO-Fast)."""
    SLIDING_WINDOW = "sliding_window"
    """Neighbouring steps that move one on every `every` training steps (MixGRPO)."""


ETA = {StepNoise.FLOW_SDE: 0.7, StepNoise.DANCE: 0.3, StepNoise.CPS: 0.8}
"""Published noise scales."""
_STEPS: dict[StepNoise, Callable[..., SDEStep]] = {
    StepNoise.FLOW_SDE: flow_sde_step,
    StepNoise.DANCE: dance_step,
    StepNoise.CPS: cps_step,
}

MOST_STEPS = 1000
"""From noise to picture."""


class RolloutSettings(Settings):
    """How training pictures are drawn. The same schedule is trained on."""

    steps: int = Field(10, ge=1, le=MOST_STEPS)
    """Steps from noise to picture."""
    solver: Solver = Solver.EULER
    """Of the steps that are not random."""
    noise: StepNoise = StepNoise.NONE
    """What makes steps random; none: an ODE, for losses that need no density."""
    eta: float | None = Field(None, gt=0, le=2)
    """Noise scale; none: the published one (flow_sde 0.7, dance 0.3, cps 0.8). At most 1 for cps."""
    where: Where | None = None
    """Which steps are random; none: all but the last."""
    fraction: float | None = Field(None, gt=0, le=1)
    """Share of random steps, for `where: fraction`."""
    window: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Number of random steps, for the two windows."""
    every: Count | None = None
    """Training steps after which the sliding window moves on."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "RolloutSettings":
        if self.noise is StepNoise.NONE:
            for name in ("eta", "where", "fraction", "window", "every"):
                _refuse(self.__dict__[name] is not None, f"{name} has no effect without noise: remove it")
            return self
        _refuse(
            self.steps < 2,
            f"noise {self.noise.value} needs at least 2 steps, for the last one is never random",
        )
        _refuse(
            self.noise is StepNoise.CPS and (self.eta or 0) > 1,
            f"eta of cps must be in (0, 1], got {self.eta}",
        )
        needs = {
            Where.FRACTION: {"fraction"},
            Where.RANDOM_WINDOW: {"window"},
            Where.SLIDING_WINDOW: {"window", "every"},
        }.get(self.where or Where.ALL, set())
        for name in ("fraction", "window", "every"):
            given = self.__dict__[name] is not None
            _refuse(
                given and name not in needs,
                f"{name} has no effect with where: {self.placing.value}: remove it",
            )
            _refuse(not given and name in needs, f"where: {self.placing.value} needs {name}")
        room = self.steps // 2 if self.where is Where.RANDOM_WINDOW else self.steps - 1
        _refuse(
            (self.window or 0) > room,
            f"a window of {self.window} does not fit: {self.placing.value} of {self.steps} steps has room for {room}",
        )
        return self

    @property
    def placing(self) -> Where:
        return self.where or Where.ALL

    @property
    def scale(self) -> float:
        """eta, the published one where none was given; 0 without noise."""
        return ETA.get(self.noise, 0.0) if self.eta is None else self.eta


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a rollout, from 1 down to 0. Sampling and training share one."""

    sigmas: tuple[float, ...]

    @staticmethod
    def of(policy: FlowPolicy, steps: int) -> "Schedule":
        """The model's own schedule."""
        return Schedule(tuple(policy.schedule(steps).tolist()))

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class StepPlan:
    """The moves of one training step's rollouts."""

    schedule: Schedule
    solver: Solver = Solver.EULER
    noise: StepNoise = StepNoise.NONE
    eta: float = 0.0
    stochastic: frozenset[int] = frozenset()
    """Numbers of the random steps, 0 the noisiest."""
    kept: frozenset[int] = frozenset()
    """Numbers of further steps whose latents a loss wants to begin again from."""

    @staticmethod
    def make(policy: FlowPolicy, settings: RolloutSettings, *, seed: int, step: int) -> "StepPlan":
        """The plan of a training step: a function of (settings, seed, step) alone."""
        schedule = Schedule.of(policy, settings.steps)
        places = random_steps(settings, seed=seed, step=step)
        return StepPlan(schedule, settings.solver, settings.noise, settings.scale, frozenset(places))

    def random_step(
        self,
        x: Tensor,
        velocity: Tensor,
        number: int,
        *,
        noise: Tensor | None = None,
        next_x: Tensor | None = None,
    ) -> SDEStep:
        """Step `number` of x [B, ...] with its density: drawn with `noise`, or `next_x` scored again."""
        if self.noise is StepNoise.NONE:
            raise InputError("These rollouts are deterministic and have no density: set sampling.noise.")
        sigmas = self.schedule.sigmas
        here, there = (x.new_full((len(x),), sigmas[at], dtype=torch.float32) for at in (number, number + 1))
        step = _STEPS[self.noise]
        return step(x, velocity, here, there, self.eta, sigma_max=sigmas[1], noise=noise, next_x=next_x)

    def dt(self, number: int) -> float:
        """sigma_next - sigma, below 0."""
        return self.schedule.sigmas[number + 1] - self.schedule.sigmas[number]


def random_steps(settings: RolloutSettings, *, seed: int, step: int) -> list[int]:
    """Which steps of a rollout are random in a training step, in order."""
    if settings.noise is StepNoise.NONE:
        return []
    trained = settings.steps - 1
    drawer = torch.Generator().manual_seed(sample_seed(seed, step, _STEPS_KEY, 0))
    if settings.where is Where.FRACTION:
        count = max(1, round((settings.fraction or 1) * trained))
        return sorted(torch.randperm(trained, generator=drawer)[:count].tolist())
    window = settings.window or trained
    if settings.where is Where.RANDOM_WINDOW:
        first = int(torch.randint(settings.steps // 2 - window + 1, (), generator=drawer))
    elif settings.where is Where.SLIDING_WINDOW:
        first = step // (settings.every or 1) % (trained - window + 1)
    else:
        first = 0
    return list(range(first, first + window))


class ODESolver:
    """Takes the ODE steps of one batch of rollouts; DPM remembers the last step's prediction of the data.

    A step behind one that it did not take, such as a random one, starts anew.
    """

    def __init__(self, plan: StepPlan) -> None:
        self._sigmas = plan.schedule.sigmas
        self._second_order = plan.solver is Solver.DPM
        self._before: tuple[int, Tensor] | None = None

    def step(self, x: Tensor, velocity: Tensor, number: int) -> Tensor:
        """x [B, ...] at the next noise level."""
        sigma, after = self._sigmas[number], self._sigmas[number + 1]
        if not self._second_order:
            return x + (after - sigma) * velocity
        x0 = predict_x0(x, velocity, x.new_full((len(x),), sigma))
        data = x0
        if self._before is not None and self._before[0] == number - 1 and after > 0:
            slope = _step_ratio(self._sigmas[number - 1], sigma, after)
            data = x0 + 0.5 * slope * (x0 - self._before[1])
        self._before = (number, x0)
        # the exponential integrator of dx/dlambda with constant data: for this path it is a straight line to `data`
        return after / sigma * x + (1 - after / sigma) * data


def _half_log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def _step_ratio(before: float, sigma: float, after: float) -> float:
    """h / h_before in half log-SNR; 0 where the last step began at pure noise, infinitely far away."""
    here = _half_log_snr(sigma)
    return (_half_log_snr(after) - here) / (here - _half_log_snr(before))
