"""GenEval (Ghosh et al. 2023): does the picture hold the objects, counts, colours and positions of its prompt?

`judge` is the published rule on detections; `GenEvalReward` makes the detections with Mask2Former, as published
(`detector`), or with a semantic segmentation model (`segmenter`), and names colours with CLIP. The provenance of every
score names the models.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pixrl.errors import ConfigError, InputError, did_you_mean
from pixrl.hub import read_card
from pixrl.rewards.base import Options, Read, Reward
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.preprocess import batches, to_grey_levels
from pixrl.rewards.segmentation import Colour, Foreground, Instance, Segmenter, group
from pixrl.rewards.weights import part
from pixrl.rewards.zoo.mask2former import Mask2FormerDetector
from pixrl.rewards.zoo.openmmlab import URL
from pixrl.types import RewardBatch, Scores

Detection = Mapping[str, Any]
"""One detected object: {"box": [x0, y0, x1, y1], "score": float, "color": str or None}."""
Detections = Mapping[str, Sequence[Detection]]
"""The detected objects of one picture: class -> detections."""
Metadata = Mapping[str, Any]
"""One GenEval entry of a prompt, or one clause of it."""

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
"""GenEval's grey #999, which surrounds the object when CLIP names its colour."""


@dataclass(frozen=True)
class Verdict:
    """Whether the picture is right, and every reason why not, one per line."""

    correct: bool
    reason: str


@dataclass(frozen=True)
class Clause:
    """One thing that the prompt asks for: whether it holds and, for training, how nearly."""

    holds: bool
    reason: str
    credit: float
    """A number in [0, 1]; all clauses of an entry have 1 exactly where all hold."""


class Detector(Protocol):
    """The interface of object detectors: each picture's objects, and the provenance of the model."""

    provenance: Mapping[str, str]
    """The model and how pictures reach it: at least `model` and `preprocessing`."""

    def instances(self, images_BCHW: Tensor) -> list[list[Instance]]:
        """Return one list of objects per picture [3, H, W] in [0, 1]; boxes and masks in its pixels."""


def judge(detections: Detections, metadata: Metadata) -> Verdict:
    """Judge a picture by GenEval's strict rule.

    Args:
        detections: class -> [{"box": [x0, y0, x1, y1], "score": float, "color": str or None}], any order and number.
        metadata: one GenEval entry: `tag`, `include` and, where used, `exclude`.

    Raises:
        InputError: the entry asks for something the rule does not know.
    """
    failures = [clause.reason for clause in clauses(detections, metadata) if not clause.holds]
    return Verdict(not failures, "\n".join(failures))


def grade(detections: Detections, metadata: Metadata) -> float:
    """Return how nearly the entry is met, in [0, 1], for training: 1 exactly where `judge` says correct.

    It is the mean of the clauses' credits, one clause each for an entry's objects, colour, position and exclusion:

    * objects: found / asked;
    * colour, position: the share of the taken objects (of pairs of object and target) that are right, 0 where the
      objects that it speaks of are missing or wrong, as in the rule;
    * exclusion: 1 while the class stays under the limit, then less by 1 / (limit - 1) with every object too many, down
      to 0; never more than the credit of the same class's own objects, so that an empty picture earns nothing by it.

    The published training scores deviate from the rule: they ignore `exclude`, give a wrong position 0.75 and can be
    negative.

    Raises:
        InputError: the entry asks for something the rule does not know.
    """
    credits = [clause.credit for clause in clauses(detections, metadata)]
    return sum(credits) / len(credits)


def clauses(detections: Detections, metadata: Metadata) -> Iterator[Clause]:
    """Yield every clause of an entry, in order."""
    _check_entry(metadata)
    threshold = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
    kept = {kind: _keep(found, threshold) for kind, found in detections.items()}
    matched: list[Sequence[Detection] | None] = []
    present: dict[str, float] = {}
    for entry in metadata["include"]:
        kind, count = entry["class"], entry["count"]
        found = kept.get(kind, ())[:count]
        enough = len(found) == count
        asked = [Clause(enough, f"expected {kind}>={count}, found {len(found)}", len(found) / count)]
        if "color" in entry:
            colours = [detection["color"] for detection in found]
            share = colours.count(entry["color"]) / count if enough else 0.0
            reason = f"expected {entry['color']} {kind}>={count}, found colours {colours}"
            asked.append(Clause(share == 1, reason, share))
        if "position" in entry:
            relation, index = entry["position"]
            what, targets = f"expected {kind} {relation} the target (entry {index})", matched[index]
            if not all(clause.holds for clause in asked):
                asked.append(Clause(False, f"{what}, but its own objects are wrong", 0.0))
            elif targets is None:
                asked.append(Clause(False, f"{what}, but there is no target", 0.0))
            else:
                pairs = [relative_position(one["box"], target["box"]) for one in found for target in targets]
                wrong = [relations for relations in pairs if relation not in relations]
                seen = f", found {' and '.join(sorted(wrong[0])) or 'no relation'}" if wrong else ""
                credit = 1 - len(wrong) / len(pairs) if wrong else 1.0
                asked.append(Clause(not wrong, f"{what}{seen}", credit))
        # the boxes that later entries may stand beside; none where any clause fails
        matched.append(found if all(clause.holds for clause in asked) else None)
        present[kind] = min(present.get(kind, 1.0), asked[0].credit)
        yield from asked
    for entry in metadata.get("exclude", ()):
        kind, most = entry["class"], entry["count"] - 1
        number = len(kept.get(kind, ()))
        excess = max(number - most, 0)
        credit = max(1 - excess / most, 0.0) if most else float(not excess)
        reason = f"expected {kind}<{entry['count']}, found {number}"
        yield Clause(not excess, reason, credit * present.get(kind, 1.0))


def _keep(found: Sequence[Detection], threshold: float) -> list[Detection]:
    """Return the detections strictly above the threshold, the most confident first, at most MAX_OBJECTS."""
    above = [detection for detection in found if detection["score"] > threshold]
    return sorted(above, key=lambda detection: -float(detection["score"]))[:MAX_OBJECTS]


def relative_position(box_a: Sequence[float], box_b: Sequence[float]) -> frozenset[str]:
    """Return where box a stands relative to box b: up to two of `RELATIONS`.

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
    """A namer of objects' colours by zero-shot CLIP on their masked crops, as in GenEval.

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
        """Return one colour per crop; all crops go through CLIP together."""
        if not crops:
            return []
        fitted = torch.cat([self.clip.preprocess(crop[None].to(self.clip.device)) for crop in crops])
        with torch.inference_mode():
            features = torch.cat([self.clip.embed(part).cpu() for part in batches(fitted, self.clip.batch)])
        scores = [self.classifier(kind) @ row for kind, row in zip(kinds, features, strict=True)]
        return [self.colors[int(one.argmax())] for one in scores]

    def classifier(self, kind: str) -> Tensor:
        """Return [colours, E]: the mean over templates of unit text features, made unit again."""
        if kind not in self._classifiers:
            texts = [form.format(color=color, kind=kind) for color in self.colors for form in self.templates]
            features = self.clip.text_features(texts).view(len(self.colors), len(self.templates), -1)
            self._classifiers[kind] = torch.nn.functional.normalize(features.mean(dim=1), dim=-1)
        return self._classifiers[kind]

    def crop(self, image_CHW: Tensor, instance: Instance) -> Tensor:
        """Return the object on GenEval's grey, cut to its box (or left in place where the card says so)."""
        mask_HW = instance.mask_HW.to(image_CHW)
        alone = Foreground.composite(image_CHW[None], mask_HW[None], self.background)[0]
        if not self.zoom:
            return alone
        x0, y0, x1, y1 = (int(side) for side in instance.box)
        return alone[:, y0:y1, x0:x1]


class GenEvalReward(Reward):
    """1 where GenEval's rule holds and 0 where not (`judge`); with `graded`, how nearly it holds (`grade`).

    The batch's `metadata` holds one GenEval entry per picture; a picture without one fails.

    Args:
        segmenter: a semantic segmentation checkpoint, or any `Detector`; regions of one class are its objects.
        clip: the CLIP that names colours; GenEval's is openai/clip-vit-large-patch14.
        detector: instead of the segmenter, GenEval's own: Mask2Former as OpenMMLab's .pth file, a folder or a hub id.
        graded: whether scores come from `grade`.
        device: auto, cpu, cuda or cuda:N.
        dtype: the type of CLIP and the segmenter; Mask2Former computes in float32.

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
        if (segmenter is None) == (detector is None):
            given = "neither is" if segmenter is None else "both are"
            raise ConfigError(
                f"geneval takes one of the options 'detector' (GenEval's Mask2Former) and 'segmenter', and {given} "
                "given. Type, for example: detector: facebook/mask2former-swin-small-coco-instance, or: segmenter: "
                "toy:segmenter"
            )
        self.detector: Detector
        if detector is not None:
            self.detector = Mask2FormerDetector(detector, device=device, least=THRESHOLD)
        elif isinstance(segmenter, str | Path):
            self.detector = Segmenter(segmenter, device=device, dtype=dtype)
        elif segmenter is not None:
            self.detector = segmenter
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
        """A key that is equal for two rewards with the same detections: strict and graded ones share them."""

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
        """Return each picture's detections; colours are named only for classes whose colour the entry asks for."""
        images_BCHW = to_grey_levels(images_BCHW.float().cpu())
        found = self.detector.instances(images_BCHW)
        wanted = []
        for row, instances in enumerate(found):
            coloured = {clause["class"] for clause in metadata[row]["include"] if "color" in clause}
            wanted += [(row, instance) for instance in instances if instance.kind in coloured]
        crops = [self.colors.crop(images_BCHW[row], instance) for row, instance in wanted]
        names = self.colors.name(crops, [instance.kind for _, instance in wanted])
        colour_of = {id(instance): color for (_, instance), color in zip(wanted, names, strict=True)}
        return [group(instances, colour_of) for instances in found]

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
                [
                    grade(found, entry) if self.graded else float(judge(found, entry).correct)
                    for found, entry in zip(detections, chosen, strict=True)
                ]
            )
        return Scores.checked(values_B, reasons, self.provenance)
