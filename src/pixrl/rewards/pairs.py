"""What rewards that look at a picture together with a text share: which pairs are shown, in which batches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixrl.device import quiet_loading
from pixrl.errors import CheckpointError
from pixrl.libraries import require
from pixrl.rewards.clip import flag_failures
from pixrl.rewards.preprocess import require_images
from pixrl.types import RewardBatch, Scores

ScorePairs = Callable[[Tensor, Sequence[str]], Tensor]
"""Pictures [B, 3, H, W] and B texts to scores [B]."""


def score_pairs(
    batch: RewardBatch,
    score: ScorePairs,
    *,
    at_once: int,
    provenance: Mapping[str, str],
    reasons: Sequence[str | None] | None = None,
) -> Scores:
    """Scores of (picture, prompt) pairs; one with a reason, or with a picture that is not finite, fails unseen.

    Args:
        batch: pictures and prompts.
        score: what scores at most `at_once` pairs.
        at_once: pairs in one call.
        provenance: of the scores.
        reasons: why a pair cannot be scored, known beforehand; None where it can.

    Raises:
        ShapeError: the pictures are not float [B, 3, H, W].
    """
    require_images(batch.images_BCHW)
    finite = batch.images_BCHW.isfinite().flatten(1).all(dim=1).tolist()
    known = [None] * len(finite) if reasons is None else reasons
    given = [
        reason or (None if ok else "the picture is not finite")
        for reason, ok in zip(known, finite, strict=True)
    ]
    values_B = torch.full((len(given),), torch.nan)
    shown = [row for row, reason in enumerate(given) if reason is None]
    for start in range(0, len(shown), at_once):
        rows = shown[start : start + at_once]
        values_B[rows] = score(batch.images_BCHW[rows], [batch.prompts[row] for row in rows]).float().cpu()
    return flag_failures(values_B, given, provenance)


def load_tokenizer(folder: Path, kind: str = "AutoTokenizer") -> Any:
    """A transformers tokenizer from a local folder; `kind` is its class, for folders that hold a vocabulary alone.

    Raises:
        CheckpointError: the folder has none that can be read.
        RunError: it is a SentencePiece file, and that library is missing; says which extra to install.
    """
    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        require("sentencepiece", "rewards", f"The tokenizer spiece.model in {folder}")
    with quiet_loading():
        import transformers

        try:
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
            raise CheckpointError(f"{folder}: its tokenizer could not be loaded: {error}") from error
