"""The truth about fusion: what a segmentation of parts says of a picture that should mix its parents.

A true fusion is one connected object in which every parent has at least one part, and no third kind has any; a part
is the kind's that has most of it. Whatever else a picture is has a name: the failures of RMLer's Figure 2 (two objects
side by side, one pasted over the other, one parent alone), a third kind, or nothing that can be recognized.

This is a metric. The reward of a fusion stays the published one, of similarities, unless a recipe asks for this one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from pixrl.errors import CheckpointError, InputError, did_you_mean
from pixrl.hub import read_card
from pixrl.hub_check import Layout, read_json
from pixrl.rewards.segmentation import BACKGROUND_LABEL, Segmenter

WORN, MIXED = "worn", "mixed"
"""Classes that are no part: what an object wears, and what is pasted or two things at once."""
SMALLEST_FIGURE = 0.02
"""The least share of the picture that a figure covers; below that it shows nothing."""
SECOND_OBJECT = 0.08
"""The share of all that is drawn above which a piece apart from the largest one is an object of its own."""
SMALLEST_PART = 0.01
"""The least share of the figure that a part covers; less is an error of the segmentation."""
MOST_MIXED = 0.15
"""The share of the figure above which what is pasted, or two things at once, makes it an overlay."""
FOREIGN = 0.3
"""The share of a slot from which a third kind's area in it counts; between parents the slot is the larger one's."""
_TOUCHING = np.ones((3, 3))
"""Neighbours of a pixel for connected pieces: those that share a corner too."""


class FusionVerdict(StrEnum):
    """What a picture is that was asked for as a mix of its parents."""

    FUSION = "fusion"
    SIDE_BY_SIDE = "side_by_side"
    OVERLAY = "overlay"
    IMBALANCE = "imbalance"
    THIRD_KIND = "third_kind"
    NOTHING = "nothing"

    @property
    def words(self) -> str:
        """The verdict as pages show it."""
        return _WORDS[self]


_WORDS = {
    FusionVerdict.FUSION: "true fusion",
    FusionVerdict.SIDE_BY_SIDE: "side by side",
    FusionVerdict.OVERLAY: "overlay",
    FusionVerdict.IMBALANCE: "a parent is missing",
    FusionVerdict.THIRD_KIND: "a third kind",
    FusionVerdict.NOTHING: "nothing recognized",
}


@dataclass(frozen=True, slots=True)
class Fusion:
    """The verdict on one picture and what it rests on."""

    verdict: FusionVerdict
    shares: tuple[float, ...]
    """The share of each parent in the parts that are anyone's, weighted by visible area."""
    balance: float
    """The smallest share over the largest one; 0 unless the verdict is a fusion."""

    @property
    def is_true(self) -> bool:
        return self.verdict is FusionVerdict.FUSION


@dataclass(frozen=True)
class PartClasses:
    """The classes of a segmentation of parts, "KIND SLOT" such as "owl head", and those that are no part."""

    kinds: tuple[str, ...]
    slots: tuple[str, ...]
    index_KS: NDArray[np.intp]
    """The class of each kind's part in each slot; -1 where it has none."""
    background: int
    mixed: int | None
    count: int
    """The number of classes."""

    @staticmethod
    def of(labels: Sequence[str], name: str) -> "PartClasses":
        """Read the names of the classes, in their order; `name` is the checkpoint's in errors.

        Raises:
            CheckpointError: a class is no part, or there is no background.
        """
        known = [label for label in labels if label not in (BACKGROUND_LABEL, WORN, MIXED)]
        split = {label: label.rpartition(" ")[::2] for label in known}
        odd = [label for label, (kind, slot) in split.items() if not kind or not slot]
        if odd or not known or BACKGROUND_LABEL not in labels:
            what = f"its class {odd[0]!r} is no part" if odd else "it lacks such classes or a background"
            raise CheckpointError(
                f"{name} does not tell the parts of kinds: {what}. A segmentation of parts names its classes "
                f"'KIND SLOT', for example 'owl head', beside {BACKGROUND_LABEL!r}, {WORN!r} and {MIXED!r}."
            )
        kinds = tuple(dict.fromkeys(kind for kind, _ in split.values()))
        slots = tuple(dict.fromkeys(slot for _, slot in split.values()))
        index_KS = np.full((len(kinds), len(slots)), -1, dtype=np.intp)
        for label, (kind, slot) in split.items():
            index_KS[kinds.index(kind), slots.index(slot)] = labels.index(label)
        mixed = labels.index(MIXED) if MIXED in labels else None
        return PartClasses(kinds, slots, index_KS, labels.index(BACKGROUND_LABEL), mixed, len(labels))

    def require(self, parents: Sequence[str]) -> None:
        """Raise InputError for fewer than two different parents, or one that is none of the kinds."""
        unknown = [kind for kind in parents if kind not in self.kinds]
        if unknown or len(set(parents)) < max(len(parents), 2):
            meant = did_you_mean(unknown[0], self.kinds) if unknown else ""
            raise InputError(
                f"A true fusion has two or more different parents of {', '.join(self.kinds)}; given: "
                f"{', '.join(parents) or 'none'}.{meant}"
            )


def judge(classes_HW: NDArray[np.integer], parents: Sequence[str], parts: PartClasses) -> Fusion:
    """Return what a map of classes [H, W] says of a picture that should mix the parents.

    Raises:
        InputError: fewer than two different parents, or one that `parts` does not know.
    """
    parts.require(parents)
    drawn_HW = classes_HW != parts.background
    if drawn_HW.mean() < SMALLEST_FIGURE:
        return _failed(FusionVerdict.NOTHING, parents)
    pieces_HW, _ = ndimage.label(drawn_HW, _TOUCHING)
    sizes = np.bincount(pieces_HW.ravel())[1:]
    if (sizes > SECOND_OBJECT * drawn_HW.sum()).sum() > 1:
        return _failed(FusionVerdict.SIDE_BY_SIDE, parents)
    figure = classes_HW[pieces_HW == sizes.argmax() + 1]
    areas = np.bincount(figure, minlength=parts.count) / figure.size
    if parts.mixed is not None and areas[parts.mixed] > MOST_MIXED:
        return _failed(FusionVerdict.OVERLAY, parents)
    areas_KS = np.where(parts.index_KS >= 0, areas[parts.index_KS], 0.0)
    places = [parts.kinds.index(kind) for kind in parents]
    owned_K = np.zeros(len(parts.kinds))
    foreign = False
    for areas_K in areas_KS.T:
        if areas_K.max() < SMALLEST_PART:
            continue
        owned_K[areas_K.argmax()] += areas_K.max()
        foreign |= bool(
            np.delete(areas_K, places).max(initial=0.0) >= max(FOREIGN * areas_K.sum(), SMALLEST_PART)
        )
    if not owned_K.any():
        return _failed(FusionVerdict.NOTHING, parents)
    of_parents = owned_K[places]
    shares = tuple(float(share) for share in of_parents / owned_K.sum())
    if foreign or of_parents.sum() < owned_K.sum() - 1e-9:
        return Fusion(FusionVerdict.THIRD_KIND, shares, 0.0)
    if min(shares) == 0:
        return Fusion(FusionVerdict.IMBALANCE, shares, 0.0)
    return Fusion(FusionVerdict.FUSION, shares, min(shares) / max(shares))


def _failed(verdict: FusionVerdict, parents: Sequence[str]) -> Fusion:
    return Fusion(verdict, (0.0,) * len(parents), 0.0)


class FusionTruth:
    """A segmentation of parts that judges pictures of mixed concepts.

    Args:
        ref: a semantic segmentation checkpoint whose classes are parts (see `PartClasses`). Its card may name other
            words for the kinds: `synonyms`, such as mug for cup.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        CheckpointError: it is missing, half written, of another class, or does not tell the parts of kinds.
    """

    def __init__(self, ref: str | Path, *, device: str = "auto") -> None:
        self.segmenter = Segmenter(ref, device=device)
        self.name = self.segmenter.name
        self.parts = PartClasses.of(self.segmenter.labels, self.name)
        self.provenance: Mapping[str, str] = self.segmenter.provenance
        self._synonyms = self.segmenter.card.synonyms

    def parents(self, concepts: Sequence[str]) -> tuple[str, ...]:
        """Return the kinds that words stand for. Raises InputError for a word that is none, or one kind twice."""
        return _kinds(concepts, self.parts, self._synonyms)

    @torch.inference_mode()
    def judge(self, images_BCHW: Tensor, concepts: Sequence[str]) -> tuple[Fusion, ...]:
        """Judge pictures, float [B, 3, H, W] in [0, 1], that should mix the concepts.

        Raises:
            InputError: fewer than two different concepts, or one that is none of the kinds.
        """
        parents = self.parents(concepts)
        maps_BHW = self.segmenter.classes(images_BCHW).cpu().numpy()
        return tuple(judge(classes_HW, parents, self.parts) for classes_HW in maps_BHW)


def require_truth(folder: Path, name: str, concepts: Sequence[str]) -> None:
    """Check by its files alone that a checkpoint can judge mixes of the concepts.

    Raises:
        CheckpointError: it does not tell the parts of kinds.
        InputError: one of the concepts is none of its kinds, or two are the same one.
    """
    named = read_json(folder / "config.json").get("id2label")
    labels = named if isinstance(named, dict) else {}
    parts = PartClasses.of([str(labels[key]) for key in sorted(labels, key=int)], name)
    _kinds(concepts, parts, read_card(folder, Layout.REWARD).synonyms)


def _kinds(concepts: Sequence[str], parts: PartClasses, synonyms: Mapping[str, str]) -> tuple[str, ...]:
    found = tuple(synonyms.get(word, word) for word in concepts)
    parts.require(found)
    return found
