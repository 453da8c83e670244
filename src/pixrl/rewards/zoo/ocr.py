"""Flow-GRPO's text reward (Liu et al. 2025): is the text that the prompt puts in double quotes written in the picture?

    reward = 1 - min(d, |target|) / |target|,   d = 0 if target is in the text read, else their edit distance

Spaces and case do not count. The original reads with PaddleOCR 2.9.1 (PP-OCRv4); here transformers' own models read,
PP-OCR (lines, then letters) or GOT-OCR2, and which one did is in every score's provenance: figures of different readers
are not comparable. PP-OCR's image processors need torchvision and OpenCV, so their arithmetic is here, in torch and
scipy; the numbers come from the checkpoints' preprocessor_config.json.
  1. A prompt without quoted text fails; the original raises.
  2. What the reader raises is not caught and counted as 0: the score fails, with the reason.
  3. Lines are found as upright boxes. The original's may be turned; for upright text both are the same box.
  4. Crops that lie on their side (1.5 times as high as wide) are turned, and lines that are read with less than 0.5
     confidence are dropped, both as in PaddleOCR.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from pixrl.device import Precision, choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError, ConfigError
from pixrl.hub import folder
from pixrl.hub_check import Layout, read_json
from pixrl.rewards.base import Options, Read, Reward
from pixrl.rewards.preprocess import score_pairs, to_grey_levels
from pixrl.rewards.weights import describe, load_folder, part
from pixrl.types import RewardBatch, Scores

GOT, PADDLE = "got_ocr2", "pp_ocrv"
"""The beginnings of `model_type` in the readers' configs."""
AT_ONCE = 16
LONGEST, STEP = 960, 32
"""The detector sees sides up to LONGEST, both rounded to multiples of STEP."""
THRESHOLD, BOX_THRESHOLD, UNCLIP = 0.3, 0.6, 1.5
LEAST_SIDE = 3
"""The least side of a line's box, in pixels of the detector's map."""
MOST_BOXES = 1000
SAME_LINE = 10
"""The rows within which boxes are read from left to right."""
HEIGHT, NARROWEST, WIDEST = 48, 320, 3200
"""The size of a crop as the recognizer sees it: rows; columns it is filled up to; most columns."""
ON_ITS_SIDE = 1.5
LEAST_CONFIDENCE = 0.5
BLANK = 0
CROPS_AT_ONCE = 32
GOT_LENGTH = 128
"""The most tokens that GOT-OCR2 writes."""
GOT_END = "<|im_end|>"
_TOUCHING = np.ones((3, 3), dtype=int)

Box = tuple[int, int, int, int]
"""A box in pixels: left, top, right, bottom, the last two exclusive."""


class OcrReward(Reward):
    """The share of the prompt's quoted text that the picture shows, from 0 to 1.

    Args:
        model: the folder or hub id of the reader: a PP-OCR recognizer (PaddlePaddle/PP-OCRv5_server_rec_safetensors),
            or a GOT-OCR2 (stepfun-ai/GOT-OCR-2.0-hf), which needs no detector.
        detector: the PP-OCR detector that finds the lines (PaddlePaddle/PP-OCRv5_server_det_safetensors).

    Raises:
        ConfigError: a recognizer without a detector, or a detector that would have no effect.
        CheckpointError: a checkpoint is missing, half written or of another class.
    """

    name = "ocr"
    examples: ClassVar[Mapping[str, object]] = {"model": "stepfun-ai/GOT-OCR-2.0-hf"}

    def __init__(
        self,
        model: str | Path,
        detector: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.reader = make_reader(model, detector, device, dtype)
        self.provenance: Mapping[str, str] = self.reader.provenance

    @classmethod
    def lacks(cls, prompt: str, metadata: Mapping[str, object], options: Mapping[str, object]) -> str | None:
        return None if quoted(prompt) else "the prompt has no text in double quotes"

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        return {"model": Read(), "detector": Read()}

    @torch.inference_mode()
    def score(self, batch: RewardBatch) -> Scores:
        reasons = [self.lacks(prompt, {}, {}) for prompt in batch.prompts]
        return score_pairs(batch, self._score, at_once=AT_ONCE, provenance=self.provenance, reasons=reasons)

    def _score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        read = self.reader.read(to_grey_levels(images_BCHW.float()))
        return torch.tensor([text_reward(one, quoted(p)) for one, p in zip(read, prompts, strict=True)])


def make_reader(model: str | Path, detector: str | Path | None, device: str, dtype: str) -> "Reader":
    """Load the reader that a checkpoint's config names.

    Raises:
        ConfigError: see `OcrReward`.
        CheckpointError: see `OcrReward`.
    """
    path = folder(model, Layout.TRANSFORMERS)
    kind = str(read_json(path / "config.json").get("model_type"))
    place = choose_device(device)
    precision = choose_precision(place, dtype)
    if kind == GOT:
        if detector is not None:
            raise ConfigError(
                "ocr: GOT-OCR2 reads whole pictures, so detector would have no effect. Take it out."
            )
        return GotReader(model, path, place, precision)
    if not kind.startswith(PADDLE) or not kind.endswith("_rec"):
        raise CheckpointError(
            f"{path} holds a {kind!r} model; ocr reads with a PP-OCR recognizer "
            "(PaddlePaddle/PP-OCRv5_server_rec_safetensors) or a GOT-OCR2 (stepfun-ai/GOT-OCR-2.0-hf)."
        )
    if detector is None:
        raise ConfigError(
            "ocr: a PP-OCR recognizer reads lines, so it needs what finds them, for example "
            "detector: PaddlePaddle/PP-OCRv5_server_det_safetensors"
        )
    found = folder(detector, Layout.TRANSFORMERS)
    kind = str(read_json(found / "config.json").get("model_type"))
    if not kind.startswith(PADDLE) or not kind.endswith("_det"):
        raise CheckpointError(
            f"{found} holds a {kind!r} model; detector takes a PP-OCR one (pp_ocrv5_..._det)."
        )
    return PaddleReader(model, path, detector, found, place, precision)


def quoted(prompt: str) -> str:
    """Return the text between the first two double quotes, without spaces and in lower case; "" where there is none."""
    parts = prompt.split('"')
    return plain(parts[1]) if len(parts) > 2 else ""


def plain(text: str) -> str:
    """Return a text without spaces, in lower case."""
    return text.replace(" ", "").lower()


def text_reward(read: str, target: str) -> float:
    """Return 1 where the target was read, less by each needed edit, and 0 from as many as it has letters.

    Args:
        read: the text that the reader found, all lines one after the other.
        target: a text that is not empty, as `quoted` gives it.
    """
    found = plain(read)
    distance = 0 if target in found else edit_distance(found, target)
    return 1 - min(distance, len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Return Levenshtein's distance: the fewest insertions, deletions and replacements that turn a into b."""
    row = list(range(len(b) + 1))
    for above, letter in enumerate(a):
        kept = [cost + (letter != other) for cost, other in zip(row, b, strict=False)]
        after = [above + 1]
        for (_, over), same in zip(pairwise(row), kept, strict=True):
            after.append(min(after[-1] + 1, over + 1, same))
        row = after
    return row[-1]


class Reader(Protocol):
    """The interface of readers, which read all text in a picture."""

    provenance: Mapping[str, str]

    def read(self, images_BCHW: Tensor) -> list[str]:
        """Return the text of each picture [3, H, W] in [0, 1], its lines one after the other."""


@dataclass(frozen=True)
class PaddleInput:
    """The settings of a PP-OCR preprocessor_config.json."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    characters: tuple[str, ...]
    longest: int

    @classmethod
    def of(cls, folder: Path, mean: Sequence[float], std: Sequence[float]) -> "PaddleInput":
        """Read the settings from a folder; mean and deviation are the given ones where it does not state them."""
        config = read_json(folder / "preprocessor_config.json")
        kind = config.get("limit_type", "max")
        if kind != "max":
            raise CheckpointError(
                f"{folder}: limit_type {kind!r} is not supported; PP-OCR's detectors have 'max'."
            )
        numbers = [config.get("image_mean", list(mean)), config.get("image_std", list(std))]
        if not all(isinstance(three, list) and len(three) == 3 for three in numbers):
            raise CheckpointError(f"{folder}: image_mean and image_std must be three numbers each.")
        characters = config.get("character_list", [])
        if not isinstance(characters, list):
            raise CheckpointError(f"{folder}: character_list must be a list.")
        mean_std = [tuple(float(one) for one in three) for three in numbers if isinstance(three, list)]
        longest = int(str(config.get("limit_side_len", LONGEST)))
        return cls(mean_std[0], mean_std[1], tuple(str(one) for one in characters), longest)

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Return (picture - mean) / std, channels in RGB."""
        mean, std = (images_BCHW.new_tensor(x).view(1, 3, 1, 1) for x in (self.mean, self.std))
        return (images_BCHW - mean) / std


class PaddleReader:
    """A reader of a PP-OCR detector and recognizer (v5 or v6, mobile or server)."""

    licences: ClassVar[Mapping[str, str]] = {
        "PaddlePaddle/PP-OCRv5_mobile_det_safetensors": "Apache-2.0",
        "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors": "Apache-2.0",
        "PaddlePaddle/PP-OCRv5_server_det_safetensors": "Apache-2.0",
        "PaddlePaddle/PP-OCRv5_server_rec_safetensors": "Apache-2.0",
    }

    def __init__(
        self,
        model: str | Path,
        path: Path,
        detector: str | Path,
        detector_path: Path,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.device, self.precision = device, precision
        self.to_detector = PaddleInput.of(detector_path, (0.406, 0.456, 0.485), (0.225, 0.224, 0.229))
        self.to_recognizer = PaddleInput.of(path, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        with quiet_loading():
            from transformers import AutoModelForObjectDetection, AutoModelForTextRecognition

            found = load_folder(AutoModelForObjectDetection, detector_path, precision.weights)
            read = load_folder(AutoModelForTextRecognition, path, precision.weights)
        self.detector, self.recognizer = found.to(device), read.to(device)
        letters, outputs = len(self.to_recognizer.characters), int(read.config.head_out_channels)
        if letters != outputs:
            raise CheckpointError(
                f"{path}: character_list of preprocessor_config.json has {letters} letters, the model {outputs}."
            )
        self.provenance: Mapping[str, str] = {
            **describe(model, path, self.licences),
            **part("detector", describe(detector, detector_path, self.licences)),
            "preprocessing": f"lines above {BOX_THRESHOLD:g}, {HEIGHT} rows high; 8-bit",
        }

    def read(self, images_BCHW: Tensor) -> list[str]:
        images_BCHW = images_BCHW.to(self.device)
        rows, columns = images_BCHW.shape[-2:]
        maps_BHW = self.text_maps(images_BCHW).cpu().numpy()
        lines = [
            [upright(image[:, top:bottom, left:right]) for left, top, right, bottom in boxes]
            for image, boxes in zip(
                images_BCHW, (find_lines(one, rows, columns) for one in maps_BHW), strict=True
            )
        ]
        letters = iter(self.recognize([crop for crops in lines for crop in crops]))
        return ["".join(next(letters) for _ in crops) for crops in lines]

    def text_maps(self, images_BCHW: Tensor) -> Tensor:
        """Return [B, h, w]: the probability that a pixel is text, at the detector's size."""
        rows, columns = images_BCHW.shape[-2:]
        size = detector_size(rows, columns, self.to_detector.longest)
        resized = F.interpolate(images_BCHW, size, mode="bilinear", antialias=True)
        pixels = self.to_detector.normalize(resized).flip(1)  # the model takes BGR
        with self.precision.context(self.device):
            maps = self.detector(pixel_values=pixels.to(self.precision.weights)).last_hidden_state
        return torch.as_tensor(maps[:, 0].float())

    def recognize(self, crops: Sequence[Tensor]) -> list[str]:
        """Return the text of each crop [3, H, W], "" where it is too unsure; crops of one width go together."""
        fitted = [self._fit(crop) for crop in crops]
        by_width: dict[int, list[int]] = {}
        for place, crop in enumerate(fitted):
            by_width.setdefault(crop.shape[-1], []).append(place)
        texts = [""] * len(crops)
        for places in by_width.values():
            for start in range(0, len(places), CROPS_AT_ONCE):
                part = places[start : start + CROPS_AT_ONCE]
                pixels = torch.stack([fitted[place] for place in part]).to(self.precision.weights)
                with self.precision.context(self.device):
                    output = self.recognizer(pixel_values=pixels).last_hidden_state
                for place, one in zip(part, output.float().cpu(), strict=True):
                    texts[place] = decode(one, self.to_recognizer.characters)
        return texts

    def _fit(self, crop_CHW: Tensor) -> Tensor:
        """Scale to 48 rows with the ratio kept; fill up to at least 320 columns with zeros."""
        width = line_width(*crop_CHW.shape[-2:])
        resized = F.interpolate(crop_CHW[None], (HEIGHT, width), mode="bilinear", antialias=True)
        return F.pad(self.to_recognizer.normalize(resized)[0], (0, max(NARROWEST - width, 0)))


class GotReader:
    """A reader by GOT-OCR2, a language model that writes down the text of whole pictures, greedily."""

    licences: ClassVar[Mapping[str, str]] = {
        "stepfun-ai/GOT-OCR-2.0-hf": "Apache-2.0",
    }

    def __init__(self, model: str | Path, path: Path, device: torch.device, precision: Precision) -> None:
        self.device, self.precision = device, precision
        with quiet_loading():
            from transformers import AutoProcessor, GotOcr2ForConditionalGeneration

            try:
                self.processor: Any = AutoProcessor.from_pretrained(
                    path, backend="pil", local_files_only=True
                )
            except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
                raise CheckpointError(f"{path}: its processor could not be loaded: {error}") from error
            loaded = load_folder(GotOcr2ForConditionalGeneration, path, precision.weights)
        self.model = loaded.to(device)
        self._end = int(self.processor.tokenizer.convert_tokens_to_ids(GOT_END))
        self._pad = int(self.processor.tokenizer.pad_token_id or 0)
        patch = loaded.config.vision_config.patch_size
        side = loaded.config.vision_config.image_size // patch
        self._tokens = (side // 4) ** 2
        self.provenance: Mapping[str, str] = {
            **describe(model, path, self.licences),
            "preprocessing": f"GOT-OCR2's own, whole picture; at most {GOT_LENGTH} tokens, greedy",
        }

    def read(self, images_BCHW: Tensor) -> list[str]:
        levels = (images_BCHW.cpu() * 255).round().to(torch.uint8)
        given = self.processor(list(levels), num_image_tokens=self._tokens, return_tensors="pt").to(
            self.device
        )
        with self.precision.context(self.device):
            written = self.model.generate(
                input_ids=given.input_ids,
                attention_mask=given.attention_mask,
                pixel_values=given.pixel_values.to(self.precision.weights),
                do_sample=False,
                max_new_tokens=GOT_LENGTH,
                eos_token_id=self._end,
                pad_token_id=self._pad,
            )
        new = written[:, given.input_ids.shape[1] :]
        texts: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.replace("\n", "") for text in texts]


def detector_size(rows: int, columns: int, longest: int = LONGEST) -> tuple[int, int]:
    """Return the rows and columns at which the detector sees a picture."""
    ratio = min(1.0, longest / max(rows, columns))
    high, wide = (max(round(int(side * ratio) / STEP) * STEP, STEP) for side in (rows, columns))
    return high, wide


def find_lines(map_HW: np.ndarray, rows: int, columns: int) -> list[Box]:
    """Return boxes of text in a picture of so many rows and columns, in reading order, from the detector's map."""
    found: list[Box] = []
    labels, count = ndimage.label(map_HW > THRESHOLD, structure=_TOUCHING)
    for down, across in ndimage.find_objects(labels)[: min(count, MOST_BOXES)]:
        corners = (across.start, down.start, across.stop - 1, down.stop - 1)
        if map_HW[down, across].mean() < BOX_THRESHOLD:
            continue
        grown = unclip(corners)
        if grown is not None:
            found.append(_scaled(grown, map_HW.shape, rows, columns))
    return reading_order([box for box in found if box[0] < box[2] and box[1] < box[3]])


def unclip(corners: tuple[int, int, int, int]) -> tuple[float, float, float, float] | None:
    """Grow a box on every side by 1.5 x area / perimeter, the detector being trained on shrunk ones; None if tiny.

    Args:
        corners: left, top, right, bottom: the first and last pixel of each axis.
    """
    left, top, right, bottom = corners
    width, height = right - left, bottom - top
    if min(width, height) < LEAST_SIDE:
        return None
    by = width * height * UNCLIP / (2 * (width + height))
    if min(width, height) + 2 * by < LEAST_SIDE + 2:
        return None
    return left - by, top - by, right + by, bottom + by


def _scaled(box: tuple[float, float, float, float], shape: tuple[int, ...], rows: int, columns: int) -> Box:
    """Scale a box from the detector's map to the picture, inside it."""
    across, down = columns / shape[1], rows / shape[0]
    left, right = (min(max(round(side * across), 0), columns) for side in (box[0], box[2]))
    top, bottom = (min(max(round(side * down), 0), rows) for side in (box[1], box[3]))
    return left, top, right, bottom


def reading_order(boxes: Sequence[Box]) -> list[Box]:
    """Sort boxes from top to bottom, and left to right where tops are less than 10 rows apart, as PaddleOCR does."""
    ordered = sorted(boxes, key=lambda box: (box[1], box[0]))
    for last in range(1, len(ordered)):
        for place in range(last, 0, -1):
            one, other = ordered[place - 1], ordered[place]
            if abs(other[1] - one[1]) >= SAME_LINE or other[0] >= one[0]:
                break
            ordered[place - 1], ordered[place] = other, one
    return ordered


def upright(crop_CHW: Tensor) -> Tensor:
    """Turn a crop by 90 degrees where it is at least 1.5 times as high as wide."""
    height, width = crop_CHW.shape[-2:]
    return torch.rot90(crop_CHW, 1, (1, 2)) if height >= ON_ITS_SIDE * width else crop_CHW


def line_width(rows: int, columns: int) -> int:
    """Return the columns of a crop scaled to 48 rows: rounded up where it is narrower than 320, else down."""
    exact = HEIGHT * columns / rows
    return min(math.ceil(exact) if exact < NARROWEST else int(exact), WIDEST)


def decode(probabilities_TV: Tensor, characters: Sequence[str]) -> str:
    """Decode CTC greedily: the most probable letter at every step, repeats and blanks left out.

    The text is empty where the letters' mean probability is below 0.5.
    """
    best, letters = probabilities_TV.max(dim=-1)
    kept = letters != BLANK
    kept[1:] &= letters[1:] != letters[:-1]
    if not kept.any() or best[kept].mean() < LEAST_CONFIDENCE:
        return ""
    return "".join(characters[letter] for letter in letters[kept].tolist())
