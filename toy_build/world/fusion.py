"""The truth about fusion: what a picture's parts say of its parents.

A true fusion is one connected object in which every slot is one kind's, every parent has at least one slot, and no
third kind has any. Whatever else a picture is has a name: the failures of RMLer's Figure 2 (two objects side by side,
one pasted over the other, one parent alone), a third kind, or nothing that can be recognized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pixrl.errors import InputError
from toy_build.world.scene import FIRST_PART, MIXED_CLASS, PART_CLASSES
from toy_build.world.vocabulary import KINDS, SLOTS

SMALLEST_FIGURE = 0.02
"""Of the picture: less ink than that shows nothing."""
SECOND_OBJECT = 0.08
"""Of all ink: a piece apart from the largest one that is an object of its own."""
SMALLEST_SLOT = 0.02
"""Of the figure: less than that is no slot but an error of the segmentation."""
MOST_MIXED = 0.15
"""Of the figure: more of what is pasted, or two kinds at once, is an overlay."""
DOUBLED = 0.3
"""Of a slot: as much of it as of a second kind makes it that of two kinds at once."""
NEIGHBOURS = np.ones((3, 3))


class Verdict(StrEnum):
    """What a picture is, asked for a mix of its parents."""

    FUSION = "fusion"
    SIDE_BY_SIDE = "side_by_side"
    OVERLAY = "overlay"
    IMBALANCE = "imbalance"
    THIRD_KIND = "third_kind"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Fusion:
    """A verdict; the share of each parent (of the slots that are anyone's, weighted by visible area); and their
    balance, the smallest share over the largest (0 unless the verdict is a fusion)."""

    verdict: Verdict
    shares: tuple[float, ...]
    balance: float

    @property
    def is_true(self) -> bool:
        return self.verdict is Verdict.FUSION


def judge(classes_HW: NDArray[np.integer], parents: Sequence[str]) -> Fusion:
    """What a map of part classes [H, W] (`scene.PART_CLASSES`) says of a picture that should mix the parents.

    Raises:
        InputError: fewer than two different parents, or one that the world does not know.
    """
    unknown = [kind for kind in parents if kind not in KINDS]
    if unknown or len(set(parents)) < max(len(parents), 2):
        raise InputError(
            f"A fusion has two or more different parents of {', '.join(KINDS)}; given: {', '.join(parents) or 'none'}."
        )
    ink = classes_HW > 0
    if ink.mean() < SMALLEST_FIGURE:
        return _failed(Verdict.NOTHING, parents)
    pieces, _ = ndimage.label(ink, NEIGHBOURS)
    sizes = np.bincount(pieces.ravel())[1:]
    if (sizes > SECOND_OBJECT * ink.sum()).sum() > 1:
        return _failed(Verdict.SIDE_BY_SIDE, parents)
    figure = classes_HW[pieces == sizes.argmax() + 1]
    areas = np.bincount(figure, minlength=PART_CLASSES)[:PART_CLASSES] / figure.size
    if areas[MIXED_CLASS] > MOST_MIXED:
        return _failed(Verdict.OVERLAY, parents)
    return _of_slots(areas[FIRST_PART:].reshape(len(KINDS), len(SLOTS)), parents)


def _of_slots(areas_KS: NDArray[np.floating], parents: Sequence[str]) -> Fusion:
    """From the share of the figure that each kind has in each slot."""
    owned = np.zeros(len(KINDS))
    doubled = False
    for areas in areas_KS.T:
        second, first = np.sort(areas)[-2:]
        if first < SMALLEST_SLOT:
            continue
        doubled |= bool(second >= max(DOUBLED * (first + second), SMALLEST_SLOT))
        owned[areas.argmax()] += first
    if not owned.any():
        return _failed(Verdict.NOTHING, parents)
    of_parents = owned[[KINDS.index(kind) for kind in parents]]
    shares = tuple(float(share) for share in of_parents / owned.sum())
    if doubled:
        return Fusion(Verdict.OVERLAY, shares, 0.0)
    if of_parents.sum() < owned.sum() - 1e-9:
        return Fusion(Verdict.THIRD_KIND, shares, 0.0)
    if min(shares) == 0:
        return Fusion(Verdict.IMBALANCE, shares, 0.0)
    return Fusion(Verdict.FUSION, shares, min(shares) / max(shares))


def _failed(verdict: Verdict, parents: Sequence[str]) -> Fusion:
    return Fusion(verdict, (0.0,) * len(parents), 0.0)
