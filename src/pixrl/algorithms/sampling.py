"""How a training step's pictures are drawn: from noise to data, with random steps whose density a loss can use.

A group's samples are G noises times K semantic variants, noise g with variant k at place k G + g. All randomness is
keyed per sample (`pixrl.types.sample_seed`), so that the same pictures come out for any micro-batch and any number of
processes: the first noise by (run seed, epoch, prompt, g), shared by a group's variants as E2PO's exploration set wants
it (Eq. 8), everything later by the sample's own place as well.

Two solvers of the flow's ODE (Euler, and DPM-Solver++ 2M, Lu et al. 2022, for the path x_t = (1-t) x0 + t noise) and
three stochastic steps with a density (`pixrl.equations.sde`): Flow-GRPO's, DanceGRPO's, the coefficient-preserving.
Where a step is not random it is an ODE step.

| paper                          | here                                             |
|--------------------------------|--------------------------------------------------|
| t_i, sigma_i                   | `Schedule.sigmas`, from 1 down to 0              |
| alpha, lambda = log(alpha / t) | 1 - sigma, `_half_log_snr`                       |
| SDE window (Flow-GRPO-Fast, MixGRPO) | `StepPlan.stochastic`, numbers of steps    |
| x ~ pi_old(. | c_k(t))         | `roll_out`, with the slot that is active         |
| log pi_old(x_next | x, c_0)    | `Transition.log_prob_B`                          |

Deviations:

1. Which steps are random is drawn once a training step for all samples, keyed by (seed, step), so that it depends on
   neither the micro-batch nor the number of processes. Published code draws per batch or per sample.
2. The last step is never random: its density is too sharp to train on.
3. DPM's history is forgotten after a random step, so the step behind it is of first order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pixrl.algorithms.exploration import Group, Variants
from pixrl.config import Count, Settings
from pixrl.equations import SDEStep, cps_step, dance_step, flow_sde_step, predict_x0
from pixrl.errors import InputError
from pixrl.models.base import Conditioning, FlowPolicy
from pixrl.models.pipeline import chunks
from pixrl.types import Origin, RewardBatch, sample_seed

_STEPS_KEY = -2
"""Prompt index of the draws of random steps; prompts use 0 and up."""


class Solver(StrEnum):
    """The solver of the flow's ODE, for steps that are not random."""

    EULER = "euler"
    DPM = "dpm"
    """DPM-Solver++ 2M: second order, from this step's and the last step's prediction of the data."""


class StepNoise(StrEnum):
    """The stochastic step that replaces an ODE step, with a density."""

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
    """The settings of sampling in training. The loss is taken at the noise levels of the same schedule."""

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
        """The noise scale eta, the published one where none was given; 0 without noise."""
        return ETA.get(self.noise, 0.0) if self.eta is None else self.eta


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)


@dataclass(frozen=True)
class Schedule:
    """The noise levels sigma_0 = 1 > ... > sigma_T = 0 of a rollout. Sampling and training share one."""

    sigmas: tuple[float, ...]

    @staticmethod
    def of(policy: FlowPolicy, steps: int) -> "Schedule":
        """Return the model's own schedule of T = `steps` steps."""
        return Schedule(tuple(policy.schedule(steps).tolist()))

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class StepPlan:
    """The steps of one training step's rollouts: their noise levels, and which are random."""

    schedule: Schedule
    solver: Solver = Solver.EULER
    noise: StepNoise = StepNoise.NONE
    eta: float = 0.0
    stochastic: frozenset[int] = frozenset()
    """Numbers of the random steps, 0 the noisiest."""
    kept: frozenset[int] = frozenset()
    """Numbers of further steps whose latents a loss wants to begin again from."""
    watch: Callable[[slice, Tensor], None] | None = field(default=None, compare=False, repr=False)
    """Is given each micro-batch's rows and pictures [b, 3, H, W], on the CPU, before the next is drawn."""

    @staticmethod
    def make(policy: FlowPolicy, settings: RolloutSettings, *, seed: int, step: int) -> "StepPlan":
        """Return the plan of a training step, a function of (settings, seed, step) alone."""
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
        """Take step `number` of x [B, ...] with its density: drawn with `noise`, or the given `next_x` scored again."""
        if self.noise is StepNoise.NONE:
            raise InputError("These rollouts are deterministic and have no density: set sampling.noise.")
        sigmas = self.schedule.sigmas
        here, there = (x.new_full((len(x),), sigmas[at], dtype=torch.float32) for at in (number, number + 1))
        step = _STEPS[self.noise]
        return step(x, velocity, here, there, self.eta, sigma_max=sigmas[1], noise=noise, next_x=next_x)

    def dt(self, number: int) -> float:
        """Return sigma_next - sigma of a step, which is below 0."""
        return self.schedule.sigmas[number + 1] - self.schedule.sigmas[number]


def random_steps(settings: RolloutSettings, *, seed: int, step: int) -> list[int]:
    """Return which steps of a rollout are random in a training step, in order."""
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
    """Steps of the flow's ODE for one batch of rollouts; DPM remembers the last step's prediction of the data.

    A step behind one that it did not take, such as a random one, starts anew.
    """

    def __init__(self, plan: StepPlan) -> None:
        self._sigmas = plan.schedule.sigmas
        self._second_order = plan.solver is Solver.DPM
        self._before: tuple[int, Tensor] | None = None

    def step(self, x: Tensor, velocity: Tensor, number: int) -> Tensor:
        """Return x [B, ...] at the next noise level."""
        sigma, after = self._sigmas[number], self._sigmas[number + 1]
        if not self._second_order:
            return x + (after - sigma) * velocity
        x0 = predict_x0(x, velocity, x.new_full((len(x),), sigma))
        data = x0
        if self._before is not None and self._before[0] == number - 1 and after > 0:
            # h / h_before in half log-SNR; 0 where the last step began at pure noise, infinitely far away
            before, here = _half_log_snr(self._sigmas[number - 1]), _half_log_snr(sigma)
            slope = (_half_log_snr(after) - here) / (here - before)
            data = x0 + 0.5 * slope * (x0 - self._before[1])
        self._before = (number, x0)
        # the exponential integrator of dx/dlambda with constant data: for this path it is a straight line to `data`
        return after / sigma * x + (1 - after / sigma) * data


def _half_log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


class Use(IntEnum):
    """What a sample's further random numbers are for; each use has a stream of its own."""

    STEP = 1
    FRESH = 2
    ORDER = 3


@dataclass(frozen=True)
class Samples:
    """The B pictures to draw, group by group."""

    groups: tuple[Group, ...]
    per_group: int
    prompt_B: Tensor
    """Row of the prompt among this process's groups, int64 [B]."""
    variant_B: Tensor
    """Semantic variant, int64 [B]; 0 is the prompt itself."""
    seeds: tuple[int, ...]
    """Each sample's seed of its first noise."""
    streams: tuple[int, ...]
    """Each sample's seed of everything later."""

    def __len__(self) -> int:
        return len(self.seeds)

    @staticmethod
    def of(
        groups: Sequence[Group], noises: int, variants: int, run_seed: int, *, shared_start: bool = False
    ) -> "Samples":
        """Return G = `noises` times K = `variants` samples of every group; `shared_start`: all begin at one noise."""
        starts = 1 if shared_start else noises
        size = noises * variants
        keys = [(group, place) for group in groups for place in range(size)]
        return Samples(
            groups=tuple(groups),
            per_group=size,
            prompt_B=torch.arange(len(groups)).repeat_interleave(size),
            variant_B=torch.arange(variants).repeat_interleave(noises).repeat(len(groups)),
            seeds=tuple(sample_seed(run_seed, g.epoch, g.index, place % starts) for g, place in keys),
            streams=tuple(sample_seed(run_seed, g.epoch, g.index, place) for g, place in keys),
        )

    def batch(self, images_BCHW: Tensor, step: int | None = None, rows: slice = slice(None)) -> RewardBatch:
        """Return samples' pictures [B, 3, H, W] with prompt and metadata of each, as rewards look at them.

        Args:
            images_BCHW: the pictures.
            step: the training step that they belong to; None: no run trains on them.
            rows: which samples they show.
        """
        drawn = zip(self.prompt_B.tolist(), self.seeds, self.variant_B.tolist(), strict=True)
        origins = (
            [Origin(step, self.groups[row].place, *rest) for row, *rest in drawn] if step is not None else []
        )
        return RewardBatch(images_BCHW, self.prompts[rows], self.metadata[rows], origins[rows])

    @property
    def prompts(self) -> list[str]:
        """The prompt of each sample."""
        return [self.groups[row].prompt for row in self.prompt_B.tolist()]

    @property
    def metadata(self) -> list[Mapping[str, object]]:
        """The metadata of each sample's prompt."""
        return [self.groups[row].metadata for row in self.prompt_B.tolist()]


def fresh_noise(policy: FlowPolicy, streams: Sequence[int], use: Use, number: int) -> Tensor:
    """Return standard normal latents [B, C, h, w], a function of each sample's stream, the use and its number alone."""
    return policy.initial_noise([sample_seed(stream, use, number, 0) for stream in streams])


@dataclass(frozen=True)
class Transition:
    """One random step of all B samples, or an ODE step that a loss takes again (`StepPlan.kept`)."""

    number: int
    """The true step, 0 the noisiest, whatever order an update takes them in."""
    x_B: Tensor
    """Latents before it, [B, C, h, w]."""
    next_B: Tensor
    """Latents behind it, the shape of `x_B`."""
    log_prob_B: Tensor
    """Log-density of `next_B` under the sampling policy, conditioned on the prompt itself, [B]; 0 of an ODE step."""


Drawn = tuple[Tensor, Tensor, tuple[Transition, ...]]
"""Pictures [B, 3, H, W] on the CPU, clean latents [B, C, h, w], and the random steps in order."""


@torch.no_grad()
def roll_out(
    policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, micro_batch: int
) -> Drawn:
    """Draw the samples with the slot that is active, a micro-batch at a time.

    Returns:
        pictures [B, 3, H, W] on the CPU, clean latents [B, C, h, w], and the random and kept steps in order.
    """
    if not len(samples):
        return _nothing(policy, plan)
    parts, images = [], []
    with policy.folded():
        for rows in chunks(len(samples), micro_batch):
            parts.append(_roll_out_part(policy, variants, samples, plan, rows))
            if plan.watch is not None:
                images.append(policy.decode(parts[-1][0]).float().cpu())
                plan.watch(rows, images[-1])
    if plan.watch is None:  # at the end, so that an offloaded decoder is moved once
        images = [policy.decode(x0).float().cpu() for x0, _ in parts]
    by_step = zip(*(transitions for _, transitions in parts), strict=True)
    transitions = tuple(
        Transition(
            same[0].number,
            torch.cat([part.x_B for part in same]),
            torch.cat([part.next_B for part in same]),
            torch.cat([part.log_prob_B for part in same]),
        )
        for same in by_step
    )
    return torch.cat(images), torch.cat([x0 for x0, _ in parts]), transitions


def _nothing(policy: FlowPolicy, plan: StepPlan) -> Drawn:
    """Return what a process without samples has drawn."""
    latents = policy.initial_noise([0])[:0]
    none_B = latents.new_zeros(0)
    transitions = tuple(
        Transition(number, latents, latents, none_B) for number in sorted(plan.stochastic | plan.kept)
    )
    return torch.zeros(0, 3, policy.settings.height, policy.settings.width), latents, transitions


def _roll_out_part(
    policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, part: slice
) -> tuple[Tensor, list[Transition]]:
    prompt_B, variant_B, streams = samples.prompt_B[part], samples.variant_B[part], samples.streams[part]
    anchor = variants.anchor[prompt_B]
    x = plan.schedule.sigmas[0] * policy.initial_noise(samples.seeds[part])
    solver, transitions = ODESolver(plan), []
    for number, sigma in enumerate(plan.schedule.sigmas[:-1]):
        condition = variants.at(sigma, prompt_B, variant_B)
        velocity = policy.velocity(x, x.new_full((len(x),), sigma), condition)
        if number not in plan.stochastic:
            after = solver.step(x, velocity, number)
            if number in plan.kept:
                transitions.append(Transition(number, x, after, x.new_zeros(len(x))))
            x = after
            continue
        step = plan.random_step(x, velocity, number, noise=fresh_noise(policy, streams, Use.STEP, number))
        # its density under c_0, as the update will be; rows that were drawn under c_0 keep theirs
        log_prob_B = step.log_prob
        rows = _differing_rows(condition, anchor)
        if rows:
            velocity = policy.velocity(x[rows], x.new_full((len(rows),), sigma), anchor[rows])
            again = plan.random_step(x[rows], velocity, number, next_x=step.next_x[rows])
            log_prob_B = log_prob_B.clone()
            log_prob_B[rows] = again.log_prob
        transitions.append(Transition(number, x, step.next_x, log_prob_B))
        x = step.next_x
    return x, transitions


def _differing_rows(one: Conditioning, other: Conditioning) -> list[int]:
    differs_B = (one.tokens_BLD != other.tokens_BLD).flatten(1).any(dim=1)
    if one.pooled_BE is not None and other.pooled_BE is not None:
        differs_B |= (one.pooled_BE != other.pooled_BE).flatten(1).any(dim=1)
    return [int(row) for row in differs_B.nonzero().flatten()]
