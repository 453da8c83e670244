"""GenEval: does the picture hold the objects, counts, colours and places that the prompt asks for?

`judge` is the published rule on detections; `GenEvalReward` makes the detections with Mask2Former, as published
(`detector`), or with a semantic segmentation model (`segmenter`), and names colours with CLIP. Which ones were used is
in every score's provenance.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pixrl.errors import ConfigError, InputError, did_you_mean
from pixrl.hub import read_card
from pixrl.rewards.base import Options, Read, Reward
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.preprocess import to_grey_levels
from pixrl.rewards.segmentation import Colour, Foreground, Instance, Segmenter
from pixrl.rewards.weights import part
from pixrl.rewards.zoo.mask2former import Mask2FormerDetector
from pixrl.rewards.zoo.openmmlab import URL
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
    """One thing that the prompt asks for, whether it holds, and for training how nearly."""

    holds: bool
    reason: str
    credit: float
    """In [0, 1]; all clauses of an entry have 1 exactly where all hold."""


class Detector(Protocol):
    """What GenEval's reward sees with: each picture's objects, and what found them."""

    provenance: Mapping[str, str]
    """At least `model` and `preprocessing`."""

    def instances(self, images_BCHW: Tensor) -> list[list[Instance]]:
        """One list of objects a picture [3, H, W] in [0, 1]; boxes and masks in its pixels."""


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
    """How nearly the entry is met, in [0, 1]: 1 exactly where `judge` says correct. For training.

    The mean of the clauses' credits, one clause each for an entry's objects, its colour, its position and an exclusion:

    * objects: found / asked;
    * colour, position: the share of the taken objects (of pairs of object and target) that are right, 0 where the
      objects that it speaks of are missing or wrong, as in the rule;
    * exclusion: 1 while the class stays under the limit, then less by 1 / (limit - 1) with every object too many, down
      to 0; never more than the credit of the same class's own objects, so that an empty picture earns nothing by it.

    The published training scores leave the rule: they ignore `exclude`, give a wrong position 0.75 and can be negative.

    Raises:
        InputError: the entry asks for something the rule does not know.
    """
    credits = [clause.credit for clause in clauses(detections, metadata)]
    return sum(credits) / len(credits)


def clauses(detections: Detections, metadata: Metadata) -> Iterator[Clause]:
    """Every clause of an entry, in order."""
    _check_entry(metadata)
    threshold = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
    kept = {kind: _keep(found, threshold) for kind, found in detections.items()}
    matched: list[Sequence[Detection] | None] = []
    present: dict[str, float] = {}
    for entry in metadata["include"]:
        group, asked = _match(entry, kept, matched)
        matched.append(group)
        present[entry["class"]] = min(present.get(entry["class"], 1.0), asked[0].credit)
        yield from asked
    for entry in metadata.get("exclude", ()):
        yield _exclusion(entry, len(kept.get(entry["class"], ())), present.get(entry["class"], 1.0))


def _exclusion(entry: Metadata, number: int, present: float) -> Clause:
    limit = entry["count"]
    reason = f"expected {entry['class']}<{limit}, found {number}"
    if number < limit:
        return Clause(True, reason, present)
    most = limit - 1
    return Clause(False, reason, max(1 - (number - most) / most, 0.0) * present if most else 0.0)


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
    asked = [Clause(enough, f"expected {kind}>={count}, found {len(found)}", len(found) / count)]
    if "color" in entry:
        colours = [detection["color"] for detection in found]
        share = colours.count(entry["color"]) / count if enough else 0.0
        asked.append(
            Clause(share == 1, f"expected {entry['color']} {kind}>={count}, found colours {colours}", share)
        )
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
        return Clause(False, f"{what}, but its own objects are wrong", 0.0)
    if targets is None:
        return Clause(False, f"{what}, but there is no target", 0.0)
    pairs = [relative_position(one["box"], target["box"]) for one in found for target in targets]
    wrong = [relations for relations in pairs if relation not in relations]
    if not wrong:
        return Clause(True, what, 1.0)
    reason = f"{what}, found {' and '.join(sorted(wrong[0])) or 'no relation'}"
    return Clause(False, reason, 1 - len(wrong) / len(pairs))


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
    if not isinstance(include, Sequence) or isinstance(include, str) or not include:
        raise InputError(f"A GenEval entry needs a non-empty list 'include', got {dict(metadata)!r}.")
    for index, entry in enumerate(include):
        _check_clause(entry, index)
    exclude = metadata.get("exclude", ())
    if not isinstance(exclude, Sequence) or isinstance(exclude, str):
        raise InputError(f"The 'exclude' of a GenEval entry is a list, got {exclude!r}.")
    for entry in exclude:
        _check_clause(entry, 0)


def _check_clause(entry: Metadata, index: int) -> None:
    count = entry.get("count") if isinstance(entry, Mapping) else None
    if not isinstance(count, int) or count < 1 or "class" not in entry:
        raise InputError(f"A GenEval clause needs a 'class' and a 'count' of at least 1, got {entry!r}.")
    if "position" not in entry:
        return
    position = entry["position"]
    is_pair = isinstance(position, Sequence) and not isinstance(position, str) and len(position) == 2
    if not is_pair or not isinstance(position[1], int):
        raise InputError(f"A GenEval position is a relation and an entry's number, got {position!r}.")
    relation, target = position
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
    """1 where GenEval's rule holds and 0 where not (`judge`); with `graded`, how nearly it holds (`grade`).

    `metadata` of the batch holds one GenEval entry a picture; a picture without one fails.

    Args:
        segmenter: a semantic segmentation checkpoint, or any `Detector`; regions of one class are its objects.
        clip: the CLIP that names colours; GenEval's is openai/clip-vit-large-patch14.
        detector: instead of the segmenter, GenEval's own: Mask2Former as OpenMMLab's .pth file, a folder or a hub id.
        graded: see above.
        device: auto, cpu, cuda or cuda:N.
        dtype: of CLIP and the segmenter; Mask2Former computes in float32.

    Raises:
        ConfigError: not exactly one of `segmenter` and `detector` is given.
        CheckpointError: a checkpoint is missing, half written or of another class.
    """

    name = "geneval"
    examples: ClassVar[Mapping[str, object]] = {"clip": "toy:clip"}

    def __init__(
        self,
        segmenter: str | Path | Detector | None = None,
        *,
        clip: str | Path,
        detector: str | Path | None = None,
        graded: bool = False,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.detector = _detector(segmenter, detector, device, dtype)
        self.colors = ColorNamer(ClipSimilarity(clip, device=device, dtype=dtype), clip)
        self.graded = graded
        self.provenance: Mapping[str, str] = {
            **self.detector.provenance,
            **part("color_clip", self.colors.clip.provenance),
            "color_crop": "to the box" if self.colors.zoom else "in place",
            "background": str(tuple(self.colors.background)),
            "scoring": "graded" if graded else "strict",
        }
        seer = segmenter if isinstance(segmenter, str | Path | None) else id(segmenter)
        self._eyes = (self.name, seer, detector, clip, device, dtype)
        """Equal where two rewards detect alike: a batch is looked at once for the strict and the graded one."""

    @classmethod
    def lacks(cls, prompt: str, metadata: Mapping[str, object], options: Mapping[str, object]) -> str | None:
        if "include" not in metadata:
            return "no GenEval metadata (`include`: what the picture must show)"
        try:
            _check_entry(metadata)
        except InputError as error:
            return str(error)
        return None

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        detector = Read(
            kinds=("mask2former",),
            alone=str(options["detector"]).lower().endswith(".pth"),
            advice=f"GenEval's own: curl -O {URL}",
        )
        return {"segmenter": Read(), "detector": detector, "clip": Read(kinds=("clip",))}

    def detect(self, images_BCHW: Tensor, metadata: Sequence[Metadata]) -> list[Detections]:
        """Each picture's detections; colours are named only for classes whose colour the entry asks for."""
        images_BCHW = to_grey_levels(images_BCHW.float().cpu())
        found = self.detector.instances(images_BCHW)
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
            if self._eyes not in batch.findings:
                batch.findings[self._eyes] = self.detect(batch.images_BCHW[usable], chosen)
            detections = batch.findings[self._eyes]
            values_B[usable] = torch.tensor(
                [self._value(*pair) for pair in zip(detections, chosen, strict=True)]
            )
        return Scores.checked(values_B, reasons, self.provenance)

    def _value(self, detections: Detections, entry: Metadata) -> float:
        return grade(detections, entry) if self.graded else float(judge(detections, entry).correct)


def _detector(
    segmenter: str | Path | Detector | None, detector: str | Path | None, device: str, dtype: str
) -> Detector:
    if (segmenter is None) == (detector is None):
        given = "neither is" if segmenter is None else "both are"
        raise ConfigError(
            f"geneval takes one of the options 'detector' (GenEval's Mask2Former) and 'segmenter', and {given} "
            "given. Type, for example: detector: facebook/mask2former-swin-small-coco-instance, or: segmenter: "
            "toy:segmenter"
        )
    if detector is not None:
        return Mask2FormerDetector(detector, device=device, least=THRESHOLD)
    if isinstance(segmenter, str | Path):
        return Segmenter(segmenter, device=device, dtype=dtype)
    assert segmenter is not None
    return segmenter


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
