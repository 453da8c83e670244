"""Flow-GRPO's text reward (Liu et al. 2025): is the text that the prompt puts in double quotes written in the picture?

    reward = 1 - min(d, |target|) / |target|,   d = 0 if target is in the text read, else their edit distance

Spaces and case do not count. The original reads with PaddleOCR 2.9.1 (PP-OCRv4); here transformers' own models read,
and which one did is in every score's provenance: figures of different readers are not comparable.
  1. A prompt without quoted text fails; the original raises.
  2. What the reader raises is not caught and counted as 0: the score fails, with the reason.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pixrl.device import choose_device, choose_precision
from pixrl.errors import CheckpointError, ConfigError
from pixrl.hub import Layout, folder, read_json
from pixrl.rewards.base import Reward
from pixrl.rewards.pairs import score_pairs
from pixrl.rewards.preprocess import to_grey_levels
from pixrl.rewards.zoo.ocr_readers import GotReader, PaddleReader, Reader
from pixrl.types import RewardBatch, Scores

GOT, PADDLE = "got_ocr2", "pp_ocrv"
"""Beginnings of `model_type` in the readers' configs."""
AT_ONCE = 16


class OcrReward(Reward):
    """How much of the prompt's quoted text the picture shows, 0 to 1.

    Args:
        model: the folder or hub id of what reads: a PP-OCR recognizer (PaddlePaddle/PP-OCRv5_server_rec_safetensors),
            or a GOT-OCR2 (stepfun-ai/GOT-OCR-2.0-hf), which needs no detector.
        detector: the PP-OCR detector that finds the lines (PaddlePaddle/PP-OCRv5_server_det_safetensors).

    Raises:
        ConfigError: a recognizer without a detector, or a detector that would have no effect.
        CheckpointError: a checkpoint is missing, half written or of another class.
    """

    name = "ocr"

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

    @torch.inference_mode()
    def score(self, batch: RewardBatch) -> Scores:
        reasons = [self.lacks(prompt, {}, {}) for prompt in batch.prompts]
        return score_pairs(batch, self._score, at_once=AT_ONCE, provenance=self.provenance, reasons=reasons)

    def _score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        read = self.reader.read(to_grey_levels(images_BCHW.float()))
        return torch.tensor([text_reward(one, quoted(p)) for one, p in zip(read, prompts, strict=True)])


def make_reader(model: str | Path, detector: str | Path | None, device: str, dtype: str) -> Reader:
    """The reader that a checkpoint's config names.

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
    """What stands between the first two double quotes, without spaces and in lower case; empty where there is none."""
    parts = prompt.split('"')
    return plain(parts[1]) if len(parts) > 2 else ""


def plain(text: str) -> str:
    """Without spaces, in lower case."""
    return text.replace(" ", "").lower()


def text_reward(read: str, target: str) -> float:
    """1 where the target is in what was read, less by each edit that is needed, 0 from as many as it has letters.

    Args:
        read: what the reader read, all lines one after the other.
        target: a text that is not empty, as `quoted` gives it.
    """
    found = plain(read)
    distance = 0 if target in found else edit_distance(found, target)
    return 1 - min(distance, len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of one letter that turn a into b."""
    row = list(range(len(b) + 1))
    for above, letter in enumerate(a):
        kept = [cost + (letter != other) for cost, other in zip(row, b, strict=False)]
        after = [above + 1]
        for (_, over), same in zip(pairwise(row), kept, strict=True):
            after.append(min(after[-1] + 1, over + 1, same))
        row = after
    return row[-1]
