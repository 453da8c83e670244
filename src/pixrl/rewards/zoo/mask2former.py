"""GenEval's published detector: Mask2Former with a Swin backbone, on transformers' own class, without mmdet.

Cheng et al. 2022; Ghosh et al. 2023 (GenEval). Two layouts hold it:

* OpenMMLab's .pth file (`openmmlab.GENEVAL_FILE`): the very weights that GenEval is published with.
* A hub folder such as facebook/mask2former-swin-small-coco-instance: the same architecture and data, other weights.

Either way a picture goes through mmdet's test pipeline, not through the folder's preprocessor_config.json, which asks
for other sizes: scaled to (800, 1333) with the ratio kept, bilinear without antialias and rounded to 8 bits; padded on
the right and below with grey 128 to a multiple of 32; then ImageNet's mean and deviation. The instances are mmdet's
too: of all query x class pairs the 100 most probable, each with the query's own mask at the picture's size.
transformers' `post_process_instance_segmentation` paints masks over each other, which changes counts and boxes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.device import choose_device, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import folder, read_card
from pixrl.hub_check import Layout, read_json
from pixrl.rewards.preprocess import batches, require_images, to_grey_levels
from pixrl.rewards.segmentation import Instance
from pixrl.rewards.weights import folder_arguments, from_pretrained, origin, refuse_misfits, weight_shards
from pixrl.rewards.zoo import openmmlab

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""GenEval's names of COCO's 80 classes, in COCO's order."""
MOST = 100
"""The most instances of one picture, before any threshold."""
DIVISOR = 32
GREY = 128.0
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""ImageNet's mean and deviation, on the scale 0 to 255."""
BATCH = 4
SUFFIX = ".pth"
MODEL_TYPE = "mask2former"
SHOWN = 3
_MAY_LACK = (".swin.layernorm.", "criterion.empty_weight")
"""Weights of training, or of the backbone as a classifier, which no file need have."""
_MAY_HAVE = ("relative_position_index",)
"""Tables that are computed."""


@dataclass(frozen=True)
class Sides:
    """The limits of a scaled picture's sides: as large as possible within them, the aspect ratio kept."""

    shortest: int = 800
    longest: int = 1333


@dataclass(frozen=True)
class Frame:
    """The sizes (rows, columns) that a picture goes through."""

    picture: tuple[int, int]
    scaled: tuple[int, int]
    padded: tuple[int, int]

    @staticmethod
    def of(rows: int, columns: int, sides: Sides) -> "Frame":
        """Return the sizes of a picture of rows x columns pixels, rounded as mmcv does."""
        factor = min(sides.longest / max(rows, columns), sides.shortest / min(rows, columns))
        height, width = (int(side * factor + 0.5) for side in (rows, columns))
        padded = (math.ceil(height / DIVISOR) * DIVISOR, math.ceil(width / DIVISOR) * DIVISOR)
        return Frame((rows, columns), (height, width), padded)

    def pixels(self, images_BCHW: Tensor) -> Tensor:
        """Return the model's input for pictures in [0, 1]."""
        levels = _scaled((images_BCHW * 255).round(), self.scaled).round().clamp(0, 255)
        below, right = (after - before for after, before in zip(self.padded, self.scaled, strict=True))
        levels = F.pad(levels, (0, right, 0, below), value=GREY)
        mean, std = (levels.new_tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
        return (levels - mean) / std

    def restored(self, masks_Qhw: Tensor) -> Tensor:
        """Return mask logits at the picture's own size: up to the padded input, the padding cut off, then back."""
        height, width = self.scaled
        inside = _scaled(masks_Qhw[None], self.padded)[:, :, :height, :width]
        return _scaled(inside, self.picture)[0]


def instances_of(
    classes_QK: Tensor, masks_Qhw: Tensor, frame: Frame, names: Sequence[str], least: float = 0.0
) -> list[Instance]:
    """Return mmdet's instances of one picture, the highest score first.

    The score is P(class) times the mean mask probability inside the mask, so a pair whose P(class) does not exceed
    `least` cannot either, and its mask is never enlarged. A box is tight, its last sides exclusive.

    Args:
        classes_QK: class logits of Q queries, the last one for "no object".
        masks_Qhw: mask logits at a quarter of the padded input.
        frame: the picture's sizes.
        names: the names of the classes without the last.
        least: scores up to this are left out; an empty mask has 0.
    """
    flat = classes_QK.float().softmax(dim=-1)[:, :-1].flatten()
    chance_N, place_N = flat.topk(min(MOST, len(flat)))
    likely = chance_N > least
    chance_N, place_N = chance_N[likely], place_N[likely]
    query, row_N = (place_N // len(names)).unique(return_inverse=True)
    logits_UHW = (
        frame.restored(masks_Qhw[query].float()) if len(query) else masks_Qhw.new_zeros(0, *frame.picture)
    )
    inside_UHW = logits_UHW > 0
    area_U = inside_UHW.sum(dim=(1, 2))
    sure_U = (logits_UHW.sigmoid() * inside_UHW).sum(dim=(1, 2)) / (area_U + 1e-6)
    score_N = chance_N * sure_U[row_N]
    boxes = []
    for mask_HW in inside_UHW.cpu():
        rows, columns = (mask_HW.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
        sides = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else None
        boxes.append(sides and tuple(map(float, sides)))
    found = [
        Instance(names[place % len(names)], box, score, inside_UHW[row].cpu())
        for place, row, score in zip(place_N.tolist(), row_N.tolist(), score_N.tolist(), strict=True)
        if score > least and (box := boxes[row]) is not None
    ]
    return sorted(found, key=lambda instance: -instance.score)


@dataclass(frozen=True)
class _Loaded:
    """A model, its card's resolution where there is one, and its provenance."""

    model: Any
    resolution: int | None
    about: Mapping[str, str]


class Mask2FormerDetector:
    """A `geneval.Detector` that computes in float32 without TF32, as GenEval's thresholds were chosen.

    Args:
        ref: an OpenMMLab .pth file, a folder, or a hub id. A folder's card may give a `resolution`, the shorter side
            that pictures are scaled to, for models that were not trained at 800.
        device: auto, cpu, cuda or cuda:N.
        least: instances with no higher score are left out.
        batch: pictures at a time.
        sides: what pictures are scaled to; None: the card's, or mmdet's (800, 1333).

    Raises:
        CheckpointError: the file or folder is missing, cut short, of another class, or has not COCO's 80 classes.
    """

    def __init__(
        self,
        ref: str | Path,
        *,
        device: str = "auto",
        least: float = 0.0,
        batch: int = BATCH,
        sides: Sides | None = None,
    ) -> None:
        self.name = str(ref)
        self.device = choose_device(device)
        self.least = least
        self.batch = batch
        loaded = _load_file(ref) if self.name.lower().endswith(SUFFIX) else _load_folder(ref)
        if sides is None:
            sides = Sides()
            if loaded.resolution is not None:
                longest = round(loaded.resolution * sides.longest / sides.shortest)
                sides = Sides(loaded.resolution, longest)
        self.sides = sides
        self.model = loaded.model.requires_grad_(False).eval().to(self.device)
        self.provenance: Mapping[str, str] = {
            **loaded.about,
            "preprocessing": (
                f"8-bit; within {self.sides.shortest}x{self.sides.longest} bilinear; padded to /{DIVISOR} with "
                f"{GREY:g}; ImageNet mean and std; float32"
            ),
            "instances": f"the {MOST} most probable query x class pairs; score above {least:g}",
        }

    def instances(self, images_BCHW: Tensor) -> list[list[Instance]]:
        """Return each picture's objects, the highest score first; pictures [B, 3, H, W] in [0, 1]."""
        require_images(images_BCHW)
        rows, columns = images_BCHW.shape[-2:]
        frame = Frame.of(rows, columns, self.sides)
        return [one for part in batches(images_BCHW, self.batch) for one in self._instances(part, frame)]

    @torch.inference_mode()
    def _instances(self, images_BCHW: Tensor, frame: Frame) -> list[list[Instance]]:
        pixels = frame.pixels(to_grey_levels(images_BCHW.float().to(self.device)))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # as cudnn's flag: no product is rounded to TF32
        try:
            with torch.backends.cudnn.flags(
                enabled=torch.backends.cudnn.enabled,
                benchmark=torch.backends.cudnn.benchmark,
                deterministic=torch.backends.cudnn.deterministic,
                allow_tf32=False,
            ):
                output = self.model(pixel_values=pixels)
        finally:
            torch.set_float32_matmul_precision(before)
        pairs = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        return [instances_of(*pair, frame, CLASSES, self.least) for pair in pairs]


def _load_file(ref: str | Path) -> _Loaded:
    path = Path(ref)
    state = openmmlab.read(path)
    config = openmmlab.config(state, path)
    weights = openmmlab.convert(state, path)
    model = _load(path, {"pretrained_model_name_or_path": None, "config": config, "state_dict": weights})
    _require_coco(path, int(config.num_labels), {})
    return _Loaded(model, None, {**origin(ref, path.parent, [path], "Apache-2.0"), "weights": "OpenMMLab's"})


def _load_folder(ref: str | Path) -> _Loaded:
    path = folder(ref, Layout.REWARD)
    kind = read_json(path / "config.json").get("model_type")
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"{path} holds a {kind!r} model, and GenEval's detector is a {MODEL_TYPE!r}, such as "
            "facebook/mask2former-swin-small-coco-instance. A semantic segmenter is given as the option 'segmenter'."
        )
    model = _load(path)
    labels = {int(n): str(label) for n, label in model.config.id2label.items()}
    _require_coco(path, len(labels), labels)
    about = origin(
        ref, path, weight_shards(path), "see the folder's README.md; facebook/mask2former-*: other"
    )
    named = "a hub folder's: not those that GenEval is published with"
    return _Loaded(model, read_card(path).resolution, {**about, "weights": named})


def _load(path: Path, arguments: Mapping[str, object] | None = None) -> Any:
    """Load the model, every part of it from the arguments or, where there are none, from the folder."""
    with quiet_loading():
        from transformers import Mask2FormerForUniversalSegmentation as Kind

        arguments = folder_arguments(Kind, path, torch.float32) if arguments is None else arguments
        model, missing, unexpected = from_pretrained(Kind, path, arguments)
    missing = [key for key in missing if not any(part in key for part in _MAY_LACK)]
    unexpected = [key for key in unexpected if not key.endswith(_MAY_HAVE)]
    refuse_misfits(missing, unexpected, path)
    return model


def _require_coco(path: Path, count: int, labels: Mapping[int, str]) -> None:
    """Require COCO's order, by which GenEval names classes. Labels without names are judged by their number."""
    ends = [labels.get(n, "") for n in (0, len(CLASSES) - 1)]
    named = bool(labels) and not all(end.startswith("LABEL_") for end in ends)
    if count != len(CLASSES) or (named and ends != [CLASSES[0], CLASSES[-1]]):
        shown = ", ".join(list(labels.values())[:SHOWN]) or "unnamed"
        raise CheckpointError(
            f"{path} has {count} classes ({shown} ...), and GenEval needs COCO's {len(CLASSES)}, from {CLASSES[0]} to "
            f"{CLASSES[-1]}: a checkpoint for instances of COCO, neither panoptic nor of another data set."
        )


def _scaled(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images_BCHW, size=size, mode="bilinear", align_corners=False)
