"""Foreground masks and detected objects, from a semantic segmentation model.

A foreground back end is a transformers semantic segmentation folder (foreground probability = 1 - P(background)) or any
callable from pictures to soft masks. Objects are the connected regions of one class in the most probable map.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError, InputError, ShapeError
from pixrl.hub import Layout, fingerprint, folder, read_card
from pixrl.rewards.preprocess import Preprocessing, batches, require_images

Colour = tuple[float, float, float]
MaskFunction = Callable[[Tensor], Tensor]
WHITE: Colour = (1.0, 1.0, 1.0)
BACKGROUND_LABEL = "background"
MIN_FOREGROUND = 0.005
"""Least share of the picture that a foreground covers: below it there is none."""
MIN_OBJECT = 0.004
"""Least share of the picture that an object covers; smaller regions are specks."""
BATCH = 64
_TOUCHING = np.ones((3, 3), dtype=int)
"""Pixels that share a corner belong together."""


@dataclass(frozen=True)
class Instance:
    """One detected object: its class, box (x0, y0, x1, y1; the last two exclusive), mean probability and pixels."""

    kind: str
    box: tuple[float, float, float, float]
    score: float
    mask_HW: Tensor

    def detection(self) -> dict[str, object]:
        """In the form that GenEval's judge reads."""
        return {"box": list(self.box), "score": self.score, "color": None}


class Segmenter:
    """A transformers semantic segmentation model: per-pixel class probabilities, and objects from them."""

    def __init__(
        self, ref: str | Path, *, device: str = "auto", dtype: str = "float32", batch: int = BATCH
    ) -> None:
        path = folder(ref, Layout.TRANSFORMERS)
        self.name = str(ref)
        self.card = read_card(path)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        self.min_area = MIN_OBJECT if self.card.min_area is None else self.card.min_area
        self.preprocess = Preprocessing.from_folder(path, square=True)
        with quiet_loading():
            from transformers import AutoModelForSemanticSegmentation

            try:
                model = AutoModelForSemanticSegmentation.from_pretrained(
                    path, dtype=self.precision.weights, local_files_only=True
                )
            except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
                raise CheckpointError(f"{path} could not be loaded for segmentation: {error}") from error
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.labels = tuple(str(model.config.id2label[n]) for n in range(len(model.config.id2label)))
        if BACKGROUND_LABEL not in self.labels:
            raise CheckpointError(
                f"{path}: none of its classes is called {BACKGROUND_LABEL!r}; it has {', '.join(self.labels)}. "
                "Name the background class in id2label of its config.json."
            )
        self.background_index = self.labels.index(BACKGROUND_LABEL)
        self.provenance: Mapping[str, str] = {
            "model": f"{self.name} ({fingerprint(path)})",
            "preprocessing": self.preprocess.describe(),
            "min_area": f"{self.min_area:g}",
        }

    @torch.inference_mode()
    def probabilities(self, images_BCHW: Tensor) -> Tensor:
        """[B, classes, H, W] at the pictures' size, on the device."""
        require_images(images_BCHW)
        parts = batches(images_BCHW, self.batch)
        return torch.cat([self._probabilities(part.to(self.device)) for part in parts])

    def _probabilities(self, images_BCHW: Tensor) -> Tensor:
        pixels = self.preprocess(images_BCHW).to(self.precision.weights)
        with self.precision.context(self.device):
            logits = self.model(pixel_values=pixels).logits
        upsampled = F.interpolate(
            logits.float(), images_BCHW.shape[-2:], mode="bilinear", align_corners=False
        )
        return upsampled.softmax(dim=1)

    def instances(self, images_BCHW: Tensor) -> list[list[Instance]]:
        """Each picture's objects, largest probability first."""
        found: list[list[Instance]] = []
        for part in batches(images_BCHW, self.batch):
            best, label_map = self.probabilities(part).max(dim=1)
            pairs = zip(best.cpu().numpy(), label_map.cpu().numpy(), strict=True)
            found.extend(self._instances(probability, labels) for probability, labels in pairs)
        return found

    def _instances(self, probability_HW: np.ndarray, label_HW: np.ndarray) -> list[Instance]:
        least = self.min_area * label_HW.size
        found = []
        for index in np.unique(label_HW):
            if index == self.background_index:
                continue
            regions, _ = ndimage.label(label_HW == index, structure=_TOUCHING)
            for number, place in enumerate(ndimage.find_objects(regions), start=1):
                mask = regions == number
                if mask.sum() >= least:
                    found.append(
                        _instance(self.labels[index], mask, place, float(probability_HW[mask].mean()))
                    )
        return sorted(found, key=lambda instance: -instance.score)

    def objects(self, images_BCHW: Tensor) -> list[dict[str, list[dict[str, object]]]]:
        """Each picture's GenEval detections: class -> [{"box", "score", "color": None}]."""
        return [group(instances) for instances in self.instances(images_BCHW)]


def group(instances: Sequence[Instance]) -> dict[str, list[dict[str, object]]]:
    """Detections by class, in the order given."""
    classes: dict[str, list[dict[str, object]]] = {}
    for instance in instances:
        classes.setdefault(instance.kind, []).append(instance.detection())
    return classes


def _instance(kind: str, mask: np.ndarray, place: tuple[slice, slice], score: float) -> Instance:
    rows, columns = place
    box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
    return Instance(kind, box, score, torch.from_numpy(mask))


class Foreground:
    """Soft foreground masks, from a segmentation checkpoint or from a callable [B, 3, H, W] -> [B, H, W]."""

    def __init__(
        self,
        back_end: str | Path | Segmenter | MaskFunction,
        *,
        device: str = "auto",
        min_area: float = MIN_FOREGROUND,
    ) -> None:
        self.min_area = min_area
        loaded = Segmenter(back_end, device=device) if isinstance(back_end, str | Path) else back_end
        if isinstance(loaded, Segmenter):
            segmenter = loaded
            self._masks: MaskFunction = lambda images: (
                1 - segmenter.probabilities(images)[:, segmenter.background_index]
            )
            self.provenance: Mapping[str, str] = segmenter.provenance
        elif callable(loaded):
            self._masks = loaded
            self.provenance = {"model": _callable_name(loaded), "preprocessing": "its own"}
        else:
            raise InputError(f"A foreground back end is a checkpoint or a callable, got {back_end!r}.")

    @torch.inference_mode()
    def masks(self, images_BCHW: Tensor) -> Tensor:
        """Foreground probability [B, H, W] in [0, 1], float32 on the CPU."""
        require_images(images_BCHW)
        masks_BHW = self._masks(images_BCHW).float().cpu()
        expected = (len(images_BCHW), *images_BCHW.shape[-2:])
        if masks_BHW.shape != expected:
            raise ShapeError(
                f"The foreground back end gave {list(masks_BHW.shape)} for masks of {list(expected)}."
            )
        return masks_BHW.clamp(0, 1)

    def is_present(self, masks_BHW: Tensor) -> Tensor:
        """Whether more than `min_area` of the picture is more foreground than background; False on nan. [B]"""
        return (masks_BHW > 0.5).float().mean(dim=(1, 2)) > self.min_area

    @staticmethod
    def composite(images_BCHW: Tensor, masks_BHW: Tensor, background: Colour = WHITE) -> Tensor:
        """The foreground on one colour: mask * picture + (1 - mask) * background."""
        colour = images_BCHW.new_tensor(background).view(1, 3, 1, 1)
        return torch.lerp(colour.expand_as(images_BCHW), images_BCHW, masks_BHW[:, None].to(images_BCHW))


def _callable_name(function: MaskFunction) -> str:
    kind = type(function)
    return function.__qualname__ if kind.__name__ == "function" else f"{kind.__module__}.{kind.__qualname__}"
