"""What runs write as they go, which can be cut back to a checkpoint's step: a resumed run's logs are an unbroken one's.

An alignment's steps are written as they come; every process writes its own pictures (they share a disk), the leading
one the logs. A fusion's are written by a thread of their own, in order, while the next step renders.

In both, a step is pictures, manifest lines and metrics, and a checkpoint comes last: a run that is killed anywhere goes
on from the newest whole checkpoint, drops what lies behind it and makes it anew, identically.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pixrl.algorithms.loss import Rollouts
from pixrl.algorithms.world import World
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.trainer import FusionRollouts, FusionScores
from pixrl.runs import checkpoint
from pixrl.runs.files import fsync_folder, remove, write_all_atomic, write_atomic
from pixrl.runs.folder import EVALUATIONS, JsonLines, ManifestRow, RunFolder, png_bytes
from pixrl.runs.reading import (
    SCORES,
    SIMILARITY,
    TRUE_FUSION,
    VERDICT,
    evaluated_places,
    samples_of,
    step_of_place,
)
from pixrl.types import Scores

TENSORBOARD = "tensorboard"


class AlignLog:
    """The record of one alignment; every process has one and makes the same calls."""

    def __init__(
        self, folder: RunFolder, world: World, *, images_every: int, keep: int, from_step: int, images: int
    ) -> None:
        """Open the logs of a run that goes on from a step; `cut_back` has dropped later ones.

        Args:
            folder: the run's.
            world: the process group.
            images_every: pictures are saved of the steps that it divides.
            keep: how many checkpoints are kept.
            from_step: the number of steps that are done.
            images: rows in the manifest.
        """
        self.folder = folder
        self.world = world
        self.images_every = images_every
        self.keep = keep
        self.images = images
        self._evaluations = JsonLines(folder.path / EVALUATIONS, folder.path)
        self._board: SummaryWriter | None = None
        if world.rank == 0:
            place = str(folder.path / TENSORBOARD)
            self._board = SummaryWriter(place, purge_step=from_step)

    def step(self, rollouts: Rollouts, scores: Mapping[str, Scores], metrics: Mapping[str, float]) -> None:
        """Write one training step: its pictures, one line each in the manifest, and one line of metrics."""
        keep = rollouts.step % self.images_every == 0
        samples = rollouts.samples
        starts = [self.images + group.place * samples.per_group for group in samples.groups]
        indices = [start + place for start in starts for place in range(samples.per_group)]
        files: Sequence[str | None] = [None] * len(indices)
        if keep and indices:
            files = self.folder.save_images(indices, rollouts.images_BCHW)
        rows = [row for part in self.world.gather(_rows(rollouts, scores, indices, files)) for row in part]
        self.images += len(rows)
        if self.world.rank == 0:
            self.folder.append_manifest(sorted(rows, key=lambda row: row.index))
            self.folder.log(rollouts.step, metrics)
            self._to_board(metrics, rollouts.step)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint; all processes wait for it."""
        if self.world.rank == 0:
            path = self.folder.path
            checkpoint.save(checkpoint.step_folder(path, step), tensors, state)
            self.folder.step_is_saved()
            checkpoint.keep_last(path, self.keep)
        self.world.gather(None)

    def wait(self) -> None:
        """Return at once: everything is written when it is handed over."""

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of the evaluation before training step `step`."""
        if self.world.rank == 0:
            finite = {name: x if math.isfinite(x) else None for name, x in figures.items()}
            self._evaluations.append([{"step": step, **finite}])
            self._to_board({f"evaluation/{name}": x for name, x in figures.items()}, step)

    def samples(self, step: int, numbers: Sequence[int], images_BCHW: Tensor) -> None:
        """Save an evaluation's pictures, samples/step-000100/0007.png; a number always has the same prompt and seed.

        Args:
            step: the training step before which they were drawn.
            numbers: those of this process's pictures.
            images_BCHW: the pictures in [0, 1].
        """
        place = samples_of(self.folder, step)
        place.mkdir(parents=True, exist_ok=True)
        write_all_atomic(
            {place / f"{n:04d}.png": png_bytes(one) for n, one in zip(numbers, images_BCHW, strict=True)}
        )
        fsync_folder(place)

    def sample_scores(self, step: int, scores: Mapping[str, Scores]) -> None:
        """Save the scores of an evaluation's pictures: each process gives those of its own, in the order of numbers."""
        own = {
            name: [x if math.isfinite(x) else None for x in one.values_B.tolist()]
            for name, one in scores.items()
        }
        parts = self.world.gather(own)
        if self.world.rank == 0:
            whole = {name: [x for part in parts for x in part[name]] for name in own}
            write_atomic(samples_of(self.folder, step) / SCORES, json.dumps(whole).encode())

    def close(self) -> None:
        """Close TensorBoard's event file."""
        if self._board is not None:
            self._board.close()

    def _to_board(self, metrics: Mapping[str, float], step: int) -> None:
        if self._board is None:
            return
        for name, value in metrics.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        self._board.flush()


def _rows(
    rollouts: Rollouts, scores: Mapping[str, Scores], indices: Sequence[int], files: Sequence[str | None]
) -> list[ManifestRow]:
    samples = rollouts.samples
    prompts, variants = samples.prompts, samples.variant_B.tolist()
    subjects = [{"subject": one["subject"]} if "subject" in one else {} for one in samples.metadata]
    return [
        ManifestRow(
            index=index,
            step=rollouts.step,
            prompt=prompts[row],
            seed=samples.seeds[row],
            variant=variants[row],
            scores={name: one.values_B[row].item() for name, one in scores.items()},
            failed=_reason(scores, row),
            file=files[row],
            extra=subjects[row],
        )
        for row, index in enumerate(indices)
    ]


def _reason(scores: Mapping[str, Scores], row: int) -> str | None:
    reasons = [f"{name}: {one.reasons[row]}" for name, one in scores.items() if one.reasons[row] is not None]
    return "; ".join(reasons) or None


def cut_back(folder: RunFolder, step: int, images: int) -> None:
    """Drop all that was written after the checkpoint of `step`, evaluations too: the resumed run draws it again.

    `images`: the number of manifest rows at that checkpoint.
    """
    folder.cut_back(step, images)
    log = JsonLines(folder.path / EVALUATIONS, folder.path)
    log.keep(sum(row["step"] < step for row in log.read()))
    for place in evaluated_places(folder):
        if step_of_place(place) >= step:
            remove(place)


COEFFICIENTS = "rollouts/coefficients"


class FuseLog:
    """The record of one fusion, written by a thread; at most one step waits while the next one renders."""

    def __init__(self, folder: RunFolder, config: FuseConfig) -> None:
        self.folder = folder
        self.config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixrl-writer")
        self._pending: list[Future[None]] = []
        self._is_broken = False
        (folder.path / COEFFICIENTS).mkdir(parents=True, exist_ok=True)

    def step(self, rollouts: FusionRollouts, scores: FusionScores, metrics: Mapping[str, float]) -> None:
        """Hand a step over to the writer. Raises what went wrong with the step before, such as a full disk."""
        self.wait()
        self._hand_over(self._write, rollouts, scores, dict(metrics))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Hand a copy of the state over to the writer, as a checkpoint."""
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._hand_over(self._save, step, copies, dict(state))

    def wait(self) -> None:
        """Wait until everything that was handed over is on the disk."""
        while self._pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        """End the writer after it has written what was handed over, unless something before it failed."""
        self._thread.shutdown(wait=True)

    def _hand_over(self, write: Callable[..., None], *given: object) -> None:
        def in_order() -> None:
            # nothing is written behind what could not be: a checkpoint says that all of its step is there
            if not self._is_broken:
                self._is_broken = True
                write(*given)
                self._is_broken = False

        self._pending.append(self._thread.submit(in_order))

    def _write(self, rollouts: FusionRollouts, scores: FusionScores, metrics: Mapping[str, float]) -> None:
        indices = range(rollouts.first_index, rollouts.first_index + len(rollouts))
        files = self.folder.save_images(indices, rollouts.images_BCHW)
        save_coefficients(self.folder, rollouts.step, rollouts.proposal.coefficients_BND)
        self.folder.append_manifest(manifest_rows(rollouts, scores, self.config, files))
        self.folder.log(rollouts.step, metrics)

    def _save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        checkpoint.save(checkpoint.step_folder(self.folder.path, step), tensors, state)
        self.folder.step_is_saved()
        checkpoint.keep_last(self.folder.path, 2)


def save_coefficients(folder: RunFolder, step: int, coefficients_BND: Tensor) -> None:
    """Save the mixing coefficients of a step, which with the manifest's seeds render its pictures again."""
    content = safetensors.torch.save({"coefficients_BND": coefficients_BND.detach().cpu().contiguous()})
    write_atomic(coefficients_file(folder, step), content)


def coefficients_file(folder: RunFolder, step: int) -> Path:
    """Return the file of the mixing coefficients of a step."""
    return folder.path / COEFFICIENTS / f"step-{step:06d}.safetensors"


def cut_coefficients(folder: RunFolder, step: int) -> None:
    """Delete the coefficients of `step` and later, which the resumed run draws again."""
    for file in (folder.path / COEFFICIENTS).glob("step-[0-9]*.safetensors"):
        if int(file.stem.removeprefix("step-")) >= step:
            file.unlink()


def load_coefficients(folder: RunFolder, step: int) -> Tensor:
    """Read the coefficients [B, N, D] that `save_coefficients` wrote."""
    content = coefficients_file(folder, step).read_bytes()
    return safetensors.torch.load(content)["coefficients_BND"]


def manifest_rows(
    rollouts: FusionRollouts, scores: FusionScores, config: FuseConfig, files: list[str]
) -> list[ManifestRow]:
    """Make the manifest rows of a step's pictures; `files` are their paths in the run's folder."""
    rows = []
    for i, file in enumerate(files):
        similarities = scores.feedback.similarities_BN[i].tolist()
        figures = {
            f"{SIMILARITY}{concept}": s for concept, s in zip(config.concepts, similarities, strict=True)
        }
        figures["reward"] = float(scores.feedback.rewards_B[i])
        scored = not math.isnan(figures["reward"])
        figures["balance"] = max(similarities) - min(similarities) if scored else math.nan
        extra: dict[str, Any] = {
            "coefficients": summarize(rollouts.proposal.coefficients_BND[i], config.concepts)
        }
        if scores.truths:
            truth = scores.truths[i]
            figures[TRUE_FUSION] = truth.balance
            shares = zip(config.concepts, truth.shares, strict=True)
            figures |= {f"{TRUE_FUSION}/{concept}": share for concept, share in shares}
            extra[VERDICT] = truth.verdict.value
        rows.append(
            ManifestRow(
                index=rollouts.first_index + i,
                step=rollouts.step,
                concepts=config.concepts,
                seed=rollouts.seeds[i],
                scores=figures,
                failed=scores.reasons[i],
                file=file,
                extra=extra,
            )
        )
    return rows


def summarize(coefficients_ND: Tensor, concepts: tuple[str, ...]) -> dict[str, Any]:
    """Summarize the coefficients of one picture for its manifest row.

    Returns:
        `share`: each concept's mean over the D columns; `spread`: the standard deviation over columns, averaged over
        concepts; `outside`: the part of all coefficients outside [0, 1].
    """
    means = coefficients_ND.mean(dim=1).tolist()
    shares = {concept: round(mean, 4) for concept, mean in zip(concepts, means, strict=True)}
    spread = float(coefficients_ND.std(dim=1, correction=0).mean())
    outside = float(((coefficients_ND < 0) | (coefficients_ND > 1)).float().mean())
    return {"share": shares, "spread": round(spread, 4), "outside": round(outside, 4)}
