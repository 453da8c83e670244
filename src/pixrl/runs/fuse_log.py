"""Puts a fusion run's steps on the disk from a thread of its own, in order, while the next step renders.

A step is written as pictures, coefficients, manifest rows, metrics, checkpoint. The checkpoint comes last: a run that
is killed anywhere resumes from the newest whole checkpoint, drops what lies behind it and makes it anew, identically.
"""

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from pixrl.fusion.select import SCORE
from pixrl.fusion.trainer import FusionRollouts, FusionScores
from pixrl.runs import checkpoint
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import ManifestRow, RunFolder
from pixrl.runs.fuse_config import FuseConfig

COEFFICIENTS = "rollouts/coefficients"


class FuseLog:
    """The record of one fusion. At most one step is waiting to be written while the next one renders."""

    def __init__(self, folder: RunFolder, config: FuseConfig) -> None:
        self.folder = folder
        self.config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixrl-writer")
        self._pending: list[Future[None]] = []
        (folder.path / COEFFICIENTS).mkdir(parents=True, exist_ok=True)

    def step(self, rollouts: FusionRollouts, scores: FusionScores, metrics: Mapping[str, float]) -> None:
        """Hands a step over. Raises what went wrong with the one before (a full disk, say)."""
        self.wait()
        self._pending.append(self._thread.submit(self._write, rollouts, scores, dict(metrics)))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Hands a checkpoint over, as it is now."""
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._pending.append(self._thread.submit(self._save, step, copies, dict(state)))

    def wait(self) -> None:
        """Until everything handed over is on the disk."""
        while self._pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        """What was handed over is still written, unless something before it failed."""
        self._thread.shutdown(wait=True)

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
    """The coefficients of a step: with the seeds in the manifest they give its pictures back."""
    content = safetensors.torch.save({"coefficients_BND": coefficients_BND.detach().cpu().contiguous()})
    write_atomic(coefficients_file(folder, step), content)


def coefficients_file(folder: RunFolder, step: int) -> Path:
    """Where they lie."""
    return folder.path / COEFFICIENTS / f"step-{step:06d}.safetensors"


def cut_coefficients(folder: RunFolder, step: int) -> None:
    """Drops those of `step` and later, which are drawn anew."""
    for file in (folder.path / COEFFICIENTS).glob("step-[0-9]*.safetensors"):
        if int(file.stem.removeprefix("step-")) >= step:
            file.unlink()


def load_coefficients(folder: RunFolder, step: int) -> Tensor:
    """The inverse of `save_coefficients`."""
    content = coefficients_file(folder, step).read_bytes()
    return safetensors.torch.load(content)["coefficients_BND"]


def manifest_rows(
    rollouts: FusionRollouts, scores: FusionScores, config: FuseConfig, files: list[str]
) -> list[ManifestRow]:
    """One row a picture."""
    rows = []
    for i, file in enumerate(files):
        similarities = scores.feedback.similarities_BN[i].tolist()
        figures = {f"{SCORE}{concept}": s for concept, s in zip(config.concepts, similarities, strict=True)}
        figures["reward"] = float(scores.feedback.rewards_B[i])
        scored = not math.isnan(figures["reward"])
        figures["balance"] = max(similarities) - min(similarities) if scored else math.nan
        rows.append(
            ManifestRow(
                index=rollouts.first_index + i,
                step=rollouts.step,
                concepts=config.concepts,
                seed=rollouts.seeds[i],
                scores=figures,
                failed=scores.reasons[i],
                file=file,
                extra={"coefficients": summarize(rollouts.proposal.coefficients_BND[i], config.concepts)},
            )
        )
    return rows


def summarize(coefficients_ND: Tensor, concepts: tuple[str, ...]) -> dict[str, Any]:
    """Each concept's mean share over the columns, and how much the columns differ."""
    means = coefficients_ND.mean(dim=1).tolist()
    shares = {concept: round(mean, 4) for concept, mean in zip(concepts, means, strict=True)}
    spread = float(coefficients_ND.std(dim=1, correction=0).mean())
    outside = float(((coefficients_ND < 0) | (coefficients_ND > 1)).float().mean())
    return {"share": shares, "spread": round(spread, 4), "outside": round(outside, 4)}
