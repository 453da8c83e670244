"""Finders of a named object in a picture: boxes by Grounding DINO, or by any detector that knows the name.

Liu et al. 2023; `IDEA-Research/grounding-dino-base`, Apache-2.0, on transformers' own classes. DivGenBench names no
thresholds: the model card's are taken.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pixrl.device import choose_device, quiet_loading
from pixrl.errors import CheckpointError, ShapeError
from pixrl.hub import folder, weight_files
from pixrl.hub_check import Layout, read_json
from pixrl.rewards.geneval import Detector
from pixrl.rewards.preprocess import require_images
from pixrl.rewards.python import to_pil
from pixrl.rewards.weights import origin, refuse_misfits

BOX_THRESHOLD, TEXT_THRESHOLD = 0.35, 0.25
BATCH = 4
MODEL_TYPE = "grounding-dino"
LICENCE = "Apache-2.0"


class Finder(Protocol):
    """The interface of finders, which locate one kind of object in each picture."""

    provenance: Mapping[str, str]

    def boxes(self, images_BCHW: Tensor, kinds: Sequence[str]) -> list[Tensor]:
        """Return boxes [N, 4] (x0, y0, x1, y1 in shares of the picture's sides), one table per picture."""


class DetectorFinder:
    """A finder by a detector of known classes (`geneval.Detector`): its boxes above a score."""

    def __init__(self, detector: Detector, threshold: float = BOX_THRESHOLD) -> None:
        self.detector = detector
        self.threshold = threshold
        self.provenance: Mapping[str, str] = {**detector.provenance, "box_threshold": f"{threshold:g}"}

    def boxes(self, images_BCHW: Tensor, kinds: Sequence[str]) -> list[Tensor]:
        """Return the boxes as in `Finder`; a name that the detector does not know is found nowhere."""
        _require_kinds(images_BCHW, kinds)
        rows, columns = images_BCHW.shape[-2:]
        sides = torch.tensor([columns, rows, columns, rows], dtype=torch.float32)
        found = self.detector.instances(images_BCHW)
        return [
            torch.tensor(
                [one.box for one in instances if one.kind == kind and one.score > self.threshold]
            ).view(-1, 4)
            / sides
            for instances, kind in zip(found, kinds, strict=True)
        ]


class GroundingDino:
    """A finder of any phrase by Grounding DINO, from a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, cut short or of another class.
    """

    def __init__(
        self,
        ref: str | Path,
        *,
        device: str = "auto",
        box_threshold: float = BOX_THRESHOLD,
        text_threshold: float = TEXT_THRESHOLD,
        batch: int = BATCH,
    ) -> None:
        path = folder(ref, Layout.TRANSFORMERS)
        kind = read_json(path / "config.json").get("model_type")
        if kind != MODEL_TYPE:
            raise CheckpointError(f"{path} holds a {kind!r} model, not a {MODEL_TYPE!r} one.")
        self.device = choose_device(device)
        self.box_threshold, self.text_threshold, self.batch = box_threshold, text_threshold, batch
        with quiet_loading():
            from transformers import AutoProcessor, GroundingDinoForObjectDetection

            try:
                model, report = GroundingDinoForObjectDetection.from_pretrained(
                    path, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
                self.processor = AutoProcessor.from_pretrained(path, local_files_only=True, backend="pil")
            except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
                raise CheckpointError(f"{path} could not be loaded as Grounding DINO: {error}") from error
        refuse_misfits(sorted(report["missing_keys"]), [], path)
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.provenance: Mapping[str, str] = {
            **origin(ref, path, weight_files(path), LICENCE),
            "preprocessing": "the checkpoint's own; PIL",
            "box_threshold": f"{box_threshold:g}",
            "text_threshold": f"{text_threshold:g}",
        }

    @torch.inference_mode()
    def boxes(self, images_BCHW: Tensor, kinds: Sequence[str]) -> list[Tensor]:
        """Return the boxes as in `Finder`."""
        _require_kinds(images_BCHW, kinds)
        texts = [f"{kind.strip().lower()}." for kind in kinds]  # the form that it was trained on
        found: list[Tensor] = []
        for start in range(0, len(kinds), self.batch):
            rows = slice(start, start + self.batch)
            pictures = to_pil(images_BCHW[rows])
            inputs = self.processor(images=pictures, text=texts[rows], padding=True, return_tensors="pt")
            inputs = inputs.to(self.device)
            answers = self.processor.post_process_grounded_object_detection(
                self.model(**inputs),
                inputs["input_ids"],
                threshold=self.box_threshold,
                text_threshold=self.text_threshold,
            )
            found += [_named(one) for one in answers]
        return found


def _named(answer: Mapping[str, object]) -> Tensor:
    """Return the boxes that some word of the phrase stands for."""
    boxes_N4, labels = answer["boxes"], answer["text_labels"]
    assert isinstance(boxes_N4, Tensor) and isinstance(labels, Sequence)
    return boxes_N4[[row for row, label in enumerate(labels) if label]].float().cpu()


def _require_kinds(images_BCHW: Tensor, kinds: Sequence[str]) -> None:
    require_images(images_BCHW)
    if len(kinds) != len(images_BCHW):
        raise ShapeError(f"{len(images_BCHW)} pictures need one kind of object each, got {len(kinds)}.")
