"""Reference pictures in the loop: what a group's metadata names becomes part of every condition of it.

Rollouts and updates alike are conditioned on them, since they belong to the anchor c_0 that all conditions start from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pixrl.algorithms.base import Group
from pixrl.algorithms.exploration import Variants
from pixrl.errors import InputError
from pixrl.models.base import FlowPolicy, ReferencePolicy, on_square

SHOWN = "shown"
"""metadata[SHOWN]: the pictures [3, H, W], of any sizes, that the model is shown. Rewards look at "reference"."""


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
