"""GenEval: does the picture hold the objects, counts, colours and places that the prompt asks for?

`judge` is the published rule on detections; `GenEvalReward` makes the detections with a segmentation model and names
colours with CLIP. The published detector is Mask2Former; which one was used is in every score's provenance.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixrl.errors import InputError, did_you_mean
from pixrl.hub import read_card
from pixrl.rewards.base import Reward
from pixrl.rewards.clip import ClipSimilarity, flag_failures
from pixrl.rewards.preprocess import to_grey_levels
from pixrl.rewards.segmentation import Colour, Foreground, Instance, Segmenter
from pixrl.types import RewardBatch, Scores

Detection = Mapping[str, Any]
Detections = Mapping[str, Sequence[Detection]]
Metadata = Mapping[str, Any]

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_SHRINK = 0.1
POSITION_LEAST = 1e-3
POSITION_COMPONENT = 0.5
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEMPLATES = (
    "a photo of a {color} {kind}",
    "a photo of a {color}-colored {kind}",
    "a photo of a {color} object",
)
COLOR_BACKGROUND: Colour = (0.6, 0.6, 0.6)
"""GenEval's #999, put outside the object's mask before CLIP names its colour."""


@dataclass(frozen=True)
class Verdict:
    """Whether the picture is right, and every reason why not, one a line."""

    correct: bool
    reason: str


@dataclass(frozen=True)
class Clause:
    """One thing that the prompt asks for, and whether it holds."""

    holds: bool
    reason: str


def judge(detections: Detections, metadata: Metadata) -> Verdict:
    """GenEval's strict rule.

    Args:
        detections: class -> [{"box": [x0, y0, x1, y1], "score": float, "color": str or None}], any order and number.
        metadata: one GenEval entry: `tag`, `include` and, where used, `exclude`.

    Raises:
        InputError: the entry asks for something the rule does not know.
    """
    failures = [clause.reason for clause in clauses(detections, metadata) if not clause.holds]
    return Verdict(not failures, "\n".join(failures))


def grade(detections: Detections, metadata: Metadata) -> float:
    """The share of the prompt's clauses that hold, in [0, 1]: 1 exactly where `judge` says correct.

    One clause each for an entry's objects, its colour, its position and an exclusion. A colour or position does not
    hold where its objects are missing.
    """
    all_clauses = list(clauses(detections, metadata))
    return sum(clause.holds for clause in all_clauses) / len(all_clauses)


def clauses(detections: Detections, metadata: Metadata) -> Iterator[Clause]:
    """Every clause of an entry, in order."""
    _check_entry(metadata)
    threshold = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
    kept = {kind: _keep(found, threshold) for kind, found in detections.items()}
    matched: list[Sequence[Detection] | None] = []
    for entry in metadata["include"]:
        group, asked = _match(entry, kept, matched)
        matched.append(group)
        yield from asked
    for entry in metadata.get("exclude", ()):
        number = len(kept.get(entry["class"], ()))
        yield Clause(number < entry["count"], f"expected {entry['class']}<{entry['count']}, found {number}")


def _keep(found: Sequence[Detection], threshold: float) -> list[Detection]:
    """Strictly above the threshold, the most confident first, at most MAX_OBJECTS."""
    above = [detection for detection in found if detection["score"] > threshold]
    return sorted(above, key=lambda detection: -float(detection["score"]))[:MAX_OBJECTS]


def _match(
    entry: Metadata, kept: Mapping[str, Sequence[Detection]], matched: Sequence[Sequence[Detection] | None]
) -> tuple[Sequence[Detection] | None, list[Clause]]:
    """The boxes matched for an include entry (None where any clause fails), and its clauses."""
    kind, count = entry["class"], entry["count"]
    found = kept.get(kind, ())[:count]
    enough = len(found) == count
    asked = [Clause(enough, f"expected {kind}>={count}, found {len(found)}")]
    if "color" in entry:
        colours = [detection["color"] for detection in found]
        right = enough and all(colour == entry["color"] for colour in colours)
        asked.append(Clause(right, f"expected {entry['color']} {kind}>={count}, found colours {colours}"))
    if "position" in entry:
        settled = all(clause.holds for clause in asked)
        asked.append(_position_clause(entry, found if settled else None, matched[entry["position"][1]]))
    return (found if all(clause.holds for clause in asked) else None), asked


def _position_clause(
    entry: Metadata, found: Sequence[Detection] | None, targets: Sequence[Detection] | None
) -> Clause:
    relation, index = entry["position"]
    what = f"expected {entry['class']} {relation} the target (entry {index})"
    if found is None:
        return Clause(False, f"{what}, but its own objects are wrong")
    if targets is None:
        return Clause(False, f"{what}, but there is no target")
    for one in found:
        for target in targets:
            relations = relative_position(one["box"], target["box"])
            if relation not in relations:
                return Clause(False, f"{what}, found {' and '.join(sorted(relations)) or 'no relation'}")
    return Clause(True, what)


def relative_position(box_a: Sequence[float], box_b: Sequence[float]) -> frozenset[str]:
    """Where a stands relative to b: up to two of `RELATIONS`.

    Each axis of the centres' offset is shrunk by 0.1 of both sizes on that axis, then divided by the offset's length
    before shrinking.
    """
    offset, shrunk = [0.0, 0.0], [0.0, 0.0]
    for axis in (0, 1):
        a0, a1, b0, b1 = (float(box[axis + end]) for box in (box_a, box_b) for end in (0, 2))
        offset[axis] = (a0 + a1) / 2 - (b0 + b1) / 2
        size = abs(a1 - a0) + abs(b1 - b0)
        shrunk[axis] = math.copysign(max(abs(offset[axis]) - POSITION_SHRINK * size, 0.0), offset[axis])
    if all(abs(part) < POSITION_LEAST for part in shrunk):
        return frozenset()
    dx, dy = (part / math.hypot(*offset) for part in shrunk)
    holds = (
        dx < -POSITION_COMPONENT,
        dx > POSITION_COMPONENT,
        dy < -POSITION_COMPONENT,
        dy > POSITION_COMPONENT,
    )
    return frozenset(relation for relation, true in zip(RELATIONS, holds, strict=True) if true)


def _check_entry(metadata: Metadata) -> None:
    include = metadata.get("include")
    if not isinstance(include, Sequence) or not include:
        raise InputError(f"A GenEval entry needs a non-empty list 'include', got {dict(metadata)!r}.")
    for index, entry in enumerate(include):
        _check_clause(entry, index)
    for entry in metadata.get("exclude", ()):
        _check_clause(entry, 0)


def _check_clause(entry: Metadata, index: int) -> None:
    count = entry.get("count")
    if "class" not in entry or not isinstance(count, int) or count < 1:
        raise InputError(
            f"A GenEval clause needs a 'class' and a 'count' of at least 1, got {dict(entry)!r}."
        )
    if "position" not in entry:
        return
    relation, target = entry["position"]
    if relation not in RELATIONS:
        raise InputError(
            f"Unknown relation {relation!r}.{did_you_mean(str(relation), RELATIONS)} Use {', '.join(RELATIONS)}."
        )
    if not 0 <= target < index:
        raise InputError(
            f"Include entry {index} stands {relation} entry {target}; a position refers to an earlier entry."
        )


class ColorNamer:
    """Names an object's colour by zero-shot CLIP on its masked crop, as GenEval does.

    Colours, templates, background and whether to crop come from the card of the CLIP checkpoint (`colors`,
    `color_templates`, `color_background`, `color_zoom`) where it has them, else they are GenEval's.
    """

    def __init__(self, clip: ClipSimilarity, ref: str | Path) -> None:
        card = read_card(ref)
        self.clip = clip
        self.colors = card.colors or COLORS
        self.templates = card.color_templates or COLOR_TEMPLATES
        self.background = card.color_background or COLOR_BACKGROUND
        self.zoom = card.color_zoom is not False
        self._classifiers: dict[str, Tensor] = {}

    def name(self, crops: Sequence[Tensor], kinds: Sequence[str]) -> list[str]:
        """One colour a crop; all crops go through CLIP together."""
        if not crops:
            return []
        fitted = [self.clip.preprocess(crop[None].to(self.clip.device)) for crop in crops]
        features = torch.cat([self._embed(part) for part in _batches(fitted, self.clip.batch)])
        scores = [self._classifier(kind) @ row for kind, row in zip(kinds, features, strict=True)]
        return [self.colors[int(one.argmax())] for one in scores]

    @torch.inference_mode()
    def _embed(self, pixels: Sequence[Tensor]) -> Tensor:
        return self.clip.embed(torch.cat(list(pixels))).cpu()

    def crop(self, image_CHW: Tensor, instance: Instance) -> Tensor:
        """The object on GenEval's grey, cut to its box (or left in place where the card says so)."""
        mask_HW = instance.mask_HW.to(image_CHW)
        alone = Foreground.composite(image_CHW[None], mask_HW[None], self.background)[0]
        if not self.zoom:
            return alone
        x0, y0, x1, y1 = (int(side) for side in instance.box)
        return alone[:, y0:y1, x0:x1]

    def _classifier(self, kind: str) -> Tensor:
        """[colours, E]: the mean over templates of unit text features, made unit again."""
        if kind not in self._classifiers:
            texts = [form.format(color=color, kind=kind) for color in self.colors for form in self.templates]
            features = self.clip.text_features(texts).view(len(self.colors), len(self.templates), -1)
            self._classifiers[kind] = torch.nn.functional.normalize(features.mean(dim=1), dim=-1)
        return self._classifiers[kind]


class GenEvalReward(Reward):
    """1 where GenEval's rule holds and 0 where not; with `graded`, the share of clauses that hold.

    `metadata` of the batch holds one GenEval entry a picture; a picture without one fails.
    """

    name = "geneval"

    def __init__(
        self,
        segmenter: str | Path,
        clip: str | Path,
        graded: bool = False,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.segmenter = Segmenter(segmenter, device=device, dtype=dtype)
        self.colors = ColorNamer(ClipSimilarity(clip, device=device, dtype=dtype), clip)
        self.graded = graded
        zoom = "crop" if self.colors.zoom else "in place"
        self.provenance: Mapping[str, str] = {
            "model": self.segmenter.provenance["model"],
            "preprocessing": self.segmenter.provenance["preprocessing"],
            "min_area": self.segmenter.provenance["min_area"],
            "score_evidence": self.segmenter.provenance["score_evidence"],
            "color_model": self.colors.clip.provenance["model"],
            "color_preprocessing": f"{zoom}; {self.colors.clip.provenance['preprocessing']}",
            "background": str(tuple(self.colors.background)),
            "scoring": "share of clauses" if graded else "strict",
        }

    def detect(self, images_BCHW: Tensor, metadata: Sequence[Metadata]) -> list[Detections]:
        """Each picture's detections; colours are named only for classes whose colour the entry asks for."""
        images_BCHW = to_grey_levels(images_BCHW.float().cpu())
        found = self.segmenter.instances(images_BCHW)
        wanted = [
            (row, instance)
            for row, instances in enumerate(found)
            for instance in instances
            if instance.kind in _coloured_kinds(metadata[row])
        ]
        crops = [self.colors.crop(images_BCHW[row], instance) for row, instance in wanted]
        names = self.colors.name(crops, [instance.kind for _, instance in wanted])
        colour_of = {id(instance): color for (_, instance), color in zip(wanted, names, strict=True)}
        return [_group(instances, colour_of) for instances in found]

    def score(self, batch: RewardBatch) -> Scores:
        count = len(batch.images_BCHW)
        entries: list[Metadata] = [
            batch.metadata[row] if row < len(batch.metadata) else {} for row in range(count)
        ]
        reasons = [None if "include" in entry else "no GenEval metadata" for entry in entries]
        finite = batch.images_BCHW.isfinite().flatten(1).all(dim=1).tolist()
        reasons = [
            reason or (None if ok else "the picture is not finite")
            for reason, ok in zip(reasons, finite, strict=True)
        ]
        usable = [row for row, reason in enumerate(reasons) if reason is None]
        values_B = torch.full((count,), torch.nan)
        if usable:
            chosen = [entries[row] for row in usable]
            detections = self.detect(batch.images_BCHW[usable], chosen)
            values_B[usable] = torch.tensor(
                [self._value(*pair) for pair in zip(detections, chosen, strict=True)]
            )
        return flag_failures(values_B, reasons, self.provenance)

    def _value(self, detections: Detections, entry: Metadata) -> float:
        return grade(detections, entry) if self.graded else float(judge(detections, entry).correct)


def _coloured_kinds(entry: Metadata) -> frozenset[str]:
    return frozenset(clause["class"] for clause in entry["include"] if "color" in clause)


def _group(instances: Iterable[Instance], colour_of: Mapping[int, str]) -> Detections:
    classes: dict[str, list[Detection]] = {}
    for instance in instances:
        detection = instance.detection() | {"color": colour_of.get(id(instance))}
        classes.setdefault(instance.kind, []).append(detection)
    return classes


def _batches(parts: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    return (parts[start : start + size] for start in range(0, len(parts), size))
