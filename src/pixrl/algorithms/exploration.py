"""What a step's pictures are conditioned on: a group is one prompt, and an exploration gives it K semantic variants.

A group's samples differ in their noise alone (`NoiseOnly`), or in their conditions too (`e2po.py`). The loop asks
`prepare` once a training step for the `Variants` of its groups, and `Variants.at` once a sampling step.

Reference pictures that a group's metadata names become part of every condition of it (`shown_to`): sampling and update
alike are conditioned on them, since they belong to the anchor c_0 that all conditions start from.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from pixrl.config import Settings
from pixrl.equations import variant_weight
from pixrl.errors import CheckpointError, InputError, ShapeError
from pixrl.models.base import Conditioning, FlowPolicy, ReferencePolicy
from pixrl.models.text import TextEncoder, TextFeatures

GroupSize = Annotated[int, Field(ge=1, le=4096)]
"""The number of pictures of one prompt."""
SHOWN = "shown"
"""The key in a prompt's metadata of the reference pictures [3, H, W], of any sizes, that the model is conditioned on.
Rewards compare with those under "reference"."""


class ExplorationSettings(Settings):
    """The settings of an exploration, and what is known of it before a model is there.

    An exploration of your own has a class `Settings` derived from this one.
    """

    kind: str
    noises: GroupSize
    """G: noises of each variant."""
    varies_conditions: ClassVar[bool] = True
    """Whether samples differ in what they are conditioned on, for which text encoders compute in every step."""

    @property
    def per_noise(self) -> int:
        """K: semantic variants of a prompt."""
        return 1

    @property
    def starts_at_one_noise(self) -> bool:
        """Whether a group's samples differ in their random steps alone."""
        return False

    def describe(self) -> str:
        """Return the exploration in a line, for the report."""
        return f"{self.kind}, {self.noises} noises × {self.per_noise} variants"


class NoiseExploration(ExplorationSettings):
    """The settings of exploration by noise alone."""

    kind: Literal["noise"] = "noise"
    noises: GroupSize = 8
    """G: samples of a prompt."""
    shared_start: bool = False
    """All samples of a group begin at one noise and differ in what random steps add, as in DanceGRPO: all that
    their rewards differ by is due to steps that are trained. Needs `sampling.noise`."""
    varies_conditions: ClassVar[bool] = False

    @property
    def starts_at_one_noise(self) -> bool:
        return self.shared_start

    def describe(self) -> str:
        return f"noise alone, {self.noises} samples a prompt"


@dataclass(frozen=True)
class Group:
    """One prompt of a training step; its samples are compared with each other."""

    place: int
    """The group's number in the step, over all processes."""
    epoch: int
    """The number of the pass over the prompts, from 0."""
    index: int
    """The prompt's number in its set."""
    prompt: str
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Perturbed:
    """The features of all perturbed variants in one encoder, row prompt * `per_prompt` + place."""

    encoder: TextEncoder
    features: TextFeatures
    per_prompt: int


@dataclass(frozen=True)
class Variants:
    """The conditions of P prompts, K variants each."""

    anchor: Conditioning
    """c_0, the conditions of the prompts themselves, one row each."""
    variants: int = 1
    """K, the number of variants of a prompt."""
    perturbed: tuple[Perturbed, ...] = ()
    """The perturbed features of each encoder; empty: every variant is c_0."""
    perturbation_range: float | None = None
    """tau of the noise-aware schedule; None: static, the variants' own conditions at every t."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def at(self, t: float, prompt_B: Tensor, variant_B: Tensor) -> Conditioning:
        """Return c_k(t) = lambda(t) c_k + (1 - lambda(t)) c_0, one row a sample; tokens and pooled features alike.

        Args:
            t: the flow's time, 1 is noise; the noise level of the step that is about to be taken.
            prompt_B: row of `anchor` of each sample, integers `[B]`.
            variant_B: k of each sample, integers `[B]`, 0 .. K - 1. An anchored variant 0 is exactly c_0.

        Raises:
            InputError: `t` is outside [0, 1], or an index out of range.
            ShapeError: the indices are not two integer tensors `[B]`.

        Source: E2PO Eq. 13.
        """
        if not 0 <= t <= 1:
            raise InputError(f"t must be in [0, 1], 1 is noise; got {t}.")
        whole = not (prompt_B.is_floating_point() or variant_B.is_floating_point())
        if prompt_B.ndim != 1 or prompt_B.shape != variant_B.shape or not whole:
            raise ShapeError(
                "prompt_B and variant_B must be integers [B], got "
                f"{prompt_B.dtype} {list(prompt_B.shape)} and {variant_B.dtype} {list(variant_B.shape)}."
            )
        counts = (("prompt_B", prompt_B, len(self.anchor)), ("variant_B", variant_B, self.variants))
        for name, index_B, count in counts:
            if len(index_B) and not 0 <= int(index_B.min()) <= int(index_B.max()) < count:
                raise InputError(f"{name} must be in 0 .. {count - 1}, got {index_B.tolist()}.")
        weight = 1.0 if self.perturbation_range is None else variant_weight(float(t), self.perturbation_range)
        condition = self.anchor[prompt_B]
        for part in self.perturbed:
            place_B = variant_B - (self.variants - part.per_prompt)
            rows = prompt_B * part.per_prompt + place_B.clamp(min=0)
            features = part.features[rows.to(part.features.pooled_KE.device)]
            condition = part.encoder.blend(condition, features, weight * (place_B >= 0))
        return condition


class Exploration(ABC):
    """An exploration: it gives each prompt the conditions that its samples are drawn from."""

    Settings: ClassVar[type[ExplorationSettings]]
    """The class of its settings; their `kind` is how a recipe names it."""
    variants: int
    """K, the number of a prompt's variants; 1 for noise alone."""

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings

    @classmethod
    def make(cls, settings: Any) -> Self:
        """Return the exploration of these settings."""
        return cls(settings)

    @abstractmethod
    def prepare(self, policy: FlowPolicy, prompts: Sequence[str]) -> Variants:
        """Return the conditions of some prompts, one row each in `Variants.anchor`, in order."""

    def state(self) -> dict[str, Tensor]:
        """Return what was learned, for a checkpoint: names and contiguous CPU tensors."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            CheckpointError: it is not this exploration's state.
        """
        if state:
            raise CheckpointError(
                f"{type(self).__name__} learns nothing, but the checkpoint holds {sorted(state)[0]!r}. "
                "Resume with the exploration that the run began with."
            )


class NoiseOnly(Exploration):
    """Exploration by noise alone: every variant of a prompt is the prompt itself."""

    Settings = NoiseExploration
    variants = 1

    def prepare(self, policy: FlowPolicy, prompts: Sequence[str]) -> Variants:
        return Variants(policy.encode(prompts))


def prepare(exploration: Exploration, policy: FlowPolicy, groups: Sequence[Group]) -> Variants:
    """Return the conditions of some groups, with the reference pictures that they name; no rows for no groups.

    Raises:
        InputError: a group has reference pictures and the model takes none, or not all have as many.
    """
    if not groups:
        return Variants(policy.encode([""])[:0], exploration.variants)
    with policy.text_present():
        variants = exploration.prepare(policy, [group.prompt for group in groups])
    return shown_to(policy, variants, groups)


def shown_to(policy: FlowPolicy, variants: Variants, groups: Sequence[Group]) -> Variants:
    """Return the variants with each group's reference pictures in their anchor, one row a group.

    Raises:
        InputError: the model takes no references, or the groups have different numbers of them.
    """
    pictures = [shown_pictures(group.metadata) for group in groups]
    counts = sorted({len(own) for own in pictures})
    if counts == [0]:
        return variants
    if not isinstance(policy, ReferencePolicy):
        raise InputError(
            f"{policy.name} ({type(policy).__name__}) takes no reference pictures. Give a model that does, such as "
            "toy:flux."
        )
    if len(counts) > 1:
        raise InputError(
            f"Prompts of one step have {counts[0]} and {counts[-1]} reference pictures; give all the same number: "
            f"--set references.count={max(1, counts[0])}"
        )
    prompts = [group.prompt for group in groups]
    laid_out = [policy.laid_out(own) for own in pictures]
    if len({tuple(one.shape for one in own) for own in laid_out}) == 1:
        by_place = [torch.stack(same) for same in zip(*laid_out, strict=True)]
        return replace(variants, anchor=policy.show(variants.anchor, by_place, prompts))
    rows = [
        policy.show(variants.anchor[[row]], [one[None] for one in own], [prompts[row]])
        for row, own in enumerate(laid_out)
    ]
    return replace(variants, anchor=Conditioning.cat(rows))


def shown_pictures(metadata: Mapping[str, object]) -> tuple[Tensor, ...]:
    """Return the reference pictures [3, H, W] of a prompt's metadata."""
    given = metadata.get(SHOWN, ())
    assert isinstance(given, tuple | list)
    return tuple(given)
