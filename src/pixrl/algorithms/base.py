"""Rollouts: pictures drawn for a training step, and what an update needs to know of how they came about.

A group is one prompt's samples: G noises times K semantic variants, noise g with variant k at place k G + g. All
randomness is keyed per sample (`pixrl.types.sample_seed`), so that the same samples come out for any micro-batch and
any number of processes: the first noise by (run seed, epoch, prompt, g), shared by a group's variants as E2PO's
exploration set wants it (Eq. 8), everything later by the sample's own place as well.

Reference pictures that a group's metadata names become part of every condition of it (`shown_to`): rollouts and updates
alike are conditioned on them, since they belong to the anchor c_0 that all conditions start from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor

from pixrl.algorithms.exploration import Variants
from pixrl.algorithms.sampling import ODESolver, Schedule, StepPlan
from pixrl.errors import InputError
from pixrl.models.base import Conditioning, FlowPolicy, ReferencePolicy, on_square
from pixrl.models.pipeline import chunks
from pixrl.types import sample_seed

SHOWN = "shown"
"""metadata[SHOWN]: the pictures [3, H, W], of any sizes, that the model is shown. Rewards look at "reference"."""


class Use(IntEnum):
    """What a sample's further random numbers are for; keeps the streams apart."""

    STEP = 1
    FRESH = 2
    ORDER = 3


@dataclass(frozen=True)
class Group:
    """One prompt of a training step."""

    place: int
    """Number in the step, over all processes."""
    epoch: int
    """Pass over the prompts."""
    index: int
    """The prompt's number in its set."""
    prompt: str
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """Which pictures to draw: B of them, group by group."""

    groups: tuple[Group, ...]
    per_group: int
    prompt_B: Tensor
    """Row of the prompt among this process's groups, int64 [B]."""
    variant_B: Tensor
    """Semantic variant, int64 [B]; 0 is the prompt itself."""
    seeds: tuple[int, ...]
    """Of the first noise."""
    streams: tuple[int, ...]
    """Of everything later."""

    def __len__(self) -> int:
        return len(self.seeds)

    @staticmethod
    def of(
        groups: Sequence[Group], noises: int, variants: int, run_seed: int, *, shared_start: bool = False
    ) -> "Samples":
        """G = `noises` times K = `variants` samples of every group; `shared_start`: all begin at one noise."""
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

    @property
    def prompts(self) -> list[str]:
        """One a sample."""
        return [self.groups[row].prompt for row in self.prompt_B.tolist()]

    @property
    def metadata(self) -> list[Mapping[str, object]]:
        """One a sample."""
        return [self.groups[row].metadata for row in self.prompt_B.tolist()]


def fresh_noise(policy: FlowPolicy, streams: Sequence[int], use: Use, number: int) -> Tensor:
    """Standard normal latents [B, C, h, w], a function of each sample's stream, the use and its number alone."""
    return policy.initial_noise([sample_seed(stream, use, number, 0) for stream in streams])


@dataclass(frozen=True)
class Transition:
    """One random step of all B rollouts, or an ODE step that a loss takes again (`StepPlan.kept`)."""

    number: int
    """The true step, 0 the noisiest, whatever order an update takes them in."""
    x_B: Tensor
    """Latents before it, [B, C, h, w]."""
    next_B: Tensor
    """Latents behind it, the shape of `x_B`."""
    log_prob_B: Tensor
    """Log-density of `next_B` under the sampling policy, conditioned on the prompt itself, [B]; 0 of an ODE step."""


@dataclass(frozen=True)
class Rollouts:
    """A training step's pictures on this process."""

    step: int
    samples: Samples
    plan: StepPlan
    anchor: Conditioning
    """c_0: one row a prompt of this process."""
    images_BCHW: Tensor
    x0_B: Tensor
    """Clean latents, [B, C, h, w]."""
    transitions: tuple[Transition, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    rival_B: Tensor | None = None
    """Row of the picture that each one was preferred to, int64 [B]; where a loss learns from pairs."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """What each reward counts; where a loss differentiates the rewards themselves."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    def conditioning(self, rows: Sequence[int]) -> Conditioning:
        """What an update is conditioned on: the unperturbed prompts of some samples."""
        return self.anchor[self.samples.prompt_B[list(rows)]]


Drawn = tuple[Tensor, Tensor, tuple[Transition, ...]]
"""Pictures [B, 3, H, W] on the CPU, clean latents [B, C, h, w], and the random steps in order."""


@torch.no_grad()
def roll_out(
    policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, micro_batch: int
) -> Drawn:
    """Draw the samples with the slot that is active.

    Returns:
        pictures [B, 3, H, W] on the CPU, clean latents [B, C, h, w], and the random and kept steps in order.
    """
    if not len(samples):
        return _nothing(policy, plan)
    parts = [
        _roll_out_part(policy, variants, samples, plan, rows) for rows in chunks(len(samples), micro_batch)
    ]
    images = torch.cat([policy.decode(x0).float().cpu() for x0, _ in parts])
    by_step = zip(*(transitions for _, transitions in parts), strict=True)
    return images, torch.cat([x0 for x0, _ in parts]), tuple(_join(same) for same in by_step)


def _nothing(policy: FlowPolicy, plan: StepPlan) -> Drawn:
    """What a process without samples has."""
    side = policy.settings.resolution
    latents = policy.initial_noise([0])[:0]
    none_B = latents.new_zeros(0)
    transitions = tuple(
        Transition(number, latents, latents, none_B) for number in sorted(plan.stochastic | plan.kept)
    )
    return torch.zeros(0, 3, side, side), latents, transitions


def _join(parts: Sequence[Transition]) -> Transition:
    return Transition(
        parts[0].number,
        torch.cat([part.x_B for part in parts]),
        torch.cat([part.next_B for part in parts]),
        torch.cat([part.log_prob_B for part in parts]),
    )


def _roll_out_part(
    policy: FlowPolicy, variants: Variants, samples: Samples, plan: StepPlan, rows: slice
) -> tuple[Tensor, list[Transition]]:
    prompt_B, variant_B, streams = samples.prompt_B[rows], samples.variant_B[rows], samples.streams[rows]
    anchor = variants.anchor[prompt_B]
    x = policy.initial_noise(samples.seeds[rows])
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
        log_prob = _anchored_log_prob(policy, plan, number, x, step.next_x, step.log_prob, condition, anchor)
        transitions.append(Transition(number, x, step.next_x, log_prob))
        x = step.next_x
    return x, transitions


def _anchored_log_prob(
    policy: FlowPolicy,
    plan: StepPlan,
    number: int,
    x: Tensor,
    next_x: Tensor,
    log_prob_B: Tensor,
    condition: Conditioning,
    anchor: Conditioning,
) -> Tensor:
    """The step's log-density under the sampling policy conditioned on c_0, which an update can compare with.

    Rows that were drawn under c_0 keep the density that they were drawn with.
    """
    rows = _differing_rows(condition, anchor)
    if not rows:
        return log_prob_B
    sigma_B = x.new_full((len(rows),), plan.schedule.sigmas[number])
    velocity = policy.velocity(x[rows], sigma_B, anchor[rows])
    again = plan.random_step(x[rows], velocity, number, next_x=next_x[rows])
    log_prob_B = log_prob_B.clone()
    log_prob_B[rows] = again.log_prob
    return log_prob_B


def _differing_rows(one: Conditioning, other: Conditioning) -> list[int]:
    differs_B = (one.tokens_BLD != other.tokens_BLD).flatten(1).any(dim=1)
    if one.pooled_BE is not None and other.pooled_BE is not None:
        differs_B |= (one.pooled_BE != other.pooled_BE).flatten(1).any(dim=1)
    return [int(row) for row in differs_B.nonzero().flatten()]


def shown_to(policy: FlowPolicy, variants: Variants, groups: Sequence[Group]) -> Variants:
    """The same variants with each group's reference pictures, one row of `anchor` a group.

    Raises:
        InputError: the model takes no references, or the groups have different numbers of them.
    """
    pictures = [shown_pictures(group.metadata) for group in groups]
    counts = sorted({len(own) for own in pictures})
    if counts == [0]:
        return variants
    if not isinstance(policy, ReferencePolicy):
        raise InputError(
            f"{policy.name} ({type(policy).__name__}) takes no reference pictures. Give a FLUX model, such as toy:flux."
        )
    if len(counts) > 1:
        raise InputError(
            f"Prompts of one step have {counts[0]} and {counts[-1]} reference pictures; give all the same number: "
            f"--set references.count={max(1, counts[0])}"
        )
    side = policy.reference_side
    by_place = [torch.stack([on_square(one, side) for one in same]) for same in zip(*pictures, strict=True)]
    return replace(variants, anchor=policy.with_references(variants.anchor, by_place))


def shown_pictures(metadata: Mapping[str, object]) -> tuple[Tensor, ...]:
    """The pictures that the model is shown with a prompt."""
    given = metadata.get(SHOWN, ())
    assert isinstance(given, tuple | list)
    return tuple(given)
