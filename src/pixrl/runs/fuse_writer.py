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
from pixrl.runs import checkpoint
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import ManifestRow, RunFolder
from pixrl.runs.fuse_config import FuseConfig
from pixrl.runs.fuse_loop import FusionStep

COEFFICIENTS = "rollouts/coefficients"


class StepWriter:
    """Writes one step at a time; at most one is waiting. Use as a context manager: leaving it waits for the disk."""

    def __init__(self, folder: RunFolder, config: FuseConfig) -> None:
        self.folder = folder
        self.config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixrl-writer")
        self._last: Future[None] | None = None
        (folder.path / COEFFICIENTS).mkdir(parents=True, exist_ok=True)

    def write(self, step: FusionStep, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Hands a step over. Raises what went wrong with the one before (a full disk, say)."""
        self.wait()
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._last = self._thread.submit(self._write, step, copies, dict(state))

    def wait(self) -> None:
        """Until everything handed over is on the disk."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def __enter__(self) -> "StepWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)

    def _write(self, step: FusionStep, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        indices = range(step.first_index, step.first_index + len(step))
        files = self.folder.save_images(indices, step.images_BCHW)
        save_coefficients(self.folder, step.step, step.proposal.coefficients_BND)
        self.folder.append_manifest(manifest_rows(step, self.config, files))
        self.folder.log(step.step, metrics(step))
        checkpoint.save(checkpoint.step_folder(self.folder.path, step.step + 1), tensors, state)
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


def manifest_rows(step: FusionStep, config: FuseConfig, files: list[str]) -> list[ManifestRow]:
    """One row a picture."""
    rows = []
    for i, file in enumerate(files):
        similarities = step.feedback.similarities_BN[i].tolist()
        scores = {f"{SCORE}{concept}": s for concept, s in zip(config.concepts, similarities, strict=True)}
        scores["reward"] = float(step.feedback.rewards_B[i])
        scored = not math.isnan(scores["reward"])
        scores["balance"] = max(similarities) - min(similarities) if scored else math.nan
        failed = step.reasons[i]
        rows.append(
            ManifestRow(
                index=step.first_index + i,
                step=step.step,
                concepts=config.concepts,
                seed=step.seeds[i],
                scores=scores,
                failed=failed,
                file=file,
                extra={"coefficients": summarize(step.proposal.coefficients_BND[i], config.concepts)},
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


def metrics(step: FusionStep) -> dict[str, float]:
    """The step's line in metrics.jsonl."""
    rewards_B = step.feedback.rewards_B
    scored_B = ~rewards_B.isnan()
    rewards = rewards_B[scored_B]
    similarities_BN = step.feedback.similarities_BN[scored_B]
    has = len(rewards) > 0
    spread = similarities_BN.amax(dim=1) - similarities_BN.amin(dim=1)
    total = sum(step.seconds.values())
    return {
        "reward/fusion/mean": float(rewards.mean()) if has else math.nan,
        "reward/fusion/std": float(rewards.std(correction=0)) if has else math.nan,
        "reward/fusion/best": float(rewards.max()) if has else math.nan,
        "similarity/mean": float(similarities_BN.mean()) if has else math.nan,
        "balance/mean": float(spread.mean()) if has else math.nan,
        "failed_share": step.failed / len(step),
        **step.figures,
        **{f"seconds/{phase}": seconds for phase, seconds in step.seconds.items()},
        "images_per_second": len(step) / total if total > 0 else math.nan,
    }
