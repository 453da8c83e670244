"""GenEval's figures: the share of correct pictures in each of the six tasks, and the mean of the six.

Ghosh et al. 2023. The published layout of pictures is a folder a prompt, `00000/metadata.jsonl` with its entry and
`00000/samples/0000.png`, four pictures a prompt; `score_folder` reads it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from pixrl.data.pictures import list_pictures, read_picture, to_tensors
from pixrl.data.toy import TAGS
from pixrl.errors import InputError, did_you_mean
from pixrl.rewards.base import Reward
from pixrl.text import parse_json, read_text
from pixrl.types import RewardBatch, Scores

ENTRY, SAMPLES = "metadata.jsonl", "samples"
BATCH = 16


@dataclass(frozen=True)
class GenEvalScores:
    """The figures of some pictures; what failed to be scored is left out of every share and counted."""

    tasks: Mapping[str, float]
    """The share of correct pictures in each of the six tasks, in GenEval's order; nan where none was scored."""
    overall: float
    """The mean of the six, which is GenEval's score; nan where a task has none."""
    images: int
    failed: int
    correct_images: float
    """The share of scored pictures that are correct."""
    correct_prompts: float
    """The share of the prompts with a scored picture that have a correct one."""

    def lines(self) -> list[str]:
        """Return the figures as lines for people."""
        rows = [f"{task:<14} {share:.4f}" for task, share in self.tasks.items()]
        return [
            *rows,
            f"{'overall':<14} {self.overall:.5f}",
            f"{self.failed} of {self.images} pictures failed",
        ]


def geneval_scores(scores: Scores, metadata: Sequence[Mapping[str, object]]) -> GenEvalScores:
    """Return the figures of strict scores.

    Args:
        scores: of the `geneval` reward, 0 or 1 a picture.
        metadata: each picture's entry; entries of one prompt are equal.

    Raises:
        InputError: the scores are graded, there is not one entry a picture, or an entry names none of the six tasks.
    """
    values = scores.values_B.tolist()
    if len(metadata) != len(values):
        raise InputError(f"{len(values)} scores need one GenEval entry each, got {len(metadata)}.")
    if any(value not in (0.0, 1.0) for value in values if not math.isnan(value)):
        raise InputError(
            "GenEval counts correct pictures, 0 or 1, and these scores are graded: use graded: false."
        )
    by_task: dict[str, list[float]] = {task: [] for task in TAGS}
    by_prompt: dict[str, list[float]] = {}
    for value, entry in zip(values, metadata, strict=True):
        task = str(entry.get("tag"))
        if task not in by_task:
            raise InputError(
                f"Unknown GenEval task {task!r}.{did_you_mean(task, TAGS)} There are {', '.join(TAGS)}."
            )
        if not math.isnan(value):
            by_task[task].append(value)
            by_prompt.setdefault(json.dumps(dict(entry), sort_keys=True), []).append(value)
    tasks = {task: _mean(found) for task, found in by_task.items()}
    return GenEvalScores(
        tasks=tasks,
        overall=_mean(list(tasks.values())),
        images=len(values),
        failed=sum(math.isnan(value) for value in values),
        correct_images=_mean([value for found in by_task.values() for value in found]),
        correct_prompts=_mean([max(found) for found in by_prompt.values()]),
    )


def score_folder(path: Path, reward: Reward, batch: int = BATCH) -> GenEvalScores:
    """Score pictures in GenEval's published layout and return their figures.

    Args:
        path: the folder of numbered folders.
        reward: a strict `geneval` reward.
        batch: pictures of one size that are scored together.

    Raises:
        InputError: the folder has no such prompts, or a picture or an entry cannot be read.
    """
    pictures = [(file, entry) for entry, files in _prompts(path) for file in files]
    values: list[Tensor] = []
    reasons: list[str | None] = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        tensors = to_tensors([read_picture(file) for file, _ in part])
        for _, rows in groupby(range(len(part)), key=lambda row: tensors[row].shape):
            own = list(rows)
            entries = [part[row][1] for row in own]
            texts = [str(entry.get("prompt", "")) for entry in entries]
            scores = reward.score(RewardBatch(torch.stack([tensors[row] for row in own]), texts, entries))
            values.append(scores.values_B)
            reasons.extend(scores.reasons)
    return geneval_scores(Scores(torch.cat(values), tuple(reasons)), [entry for _, entry in pictures])


def _prompts(path: Path) -> Iterator[tuple[Mapping[str, object], list[Path]]]:
    """Yield each prompt's entry and pictures, in the order of the folders' numbers."""
    folders = (
        sorted(one for one in path.iterdir() if one.is_dir() and one.name.isdigit()) if path.is_dir() else []
    )
    if not folders:
        raise InputError(
            f"{path} has no numbered folders. GenEval's layout is 00000/{ENTRY} and 00000/{SAMPLES}/0000.png, one "
            "folder a prompt."
        )
    for folder in folders:
        entry = parse_json(read_text(folder / ENTRY), str(folder / ENTRY))
        files = list_pictures(folder / SAMPLES) if (folder / SAMPLES).is_dir() else []
        if not isinstance(entry, dict) or not files:
            what = "no pictures in its samples" if isinstance(entry, dict) else f"no GenEval entry in {ENTRY}"
            raise InputError(f"{folder} has {what}.")
        yield entry, files


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
