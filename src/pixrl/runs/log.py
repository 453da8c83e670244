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
from pixrl.errors import CheckpointError
from pixrl.fusion.select import SCORE
from pixrl.fusion.trainer import FusionRollouts, FusionScores
from pixrl.runs import checkpoint
from pixrl.runs.config import FuseConfig
from pixrl.runs.files import fsync_folder, remove, write_all_atomic, write_atomic
from pixrl.runs.folder import EVALUATIONS, JsonLines, ManifestRow, RunFolder, png_bytes
from pixrl.types import Scores

SCORES = "scores.json"
"""Beside an evaluation's pictures."""
TENSORBOARD = "tensorboard"
STEP = "step-"


class AlignLog:
    """The logs of one run; every process has one, and calls it alike."""

    def __init__(
        self, folder: RunFolder, world: World, *, images_every: int, keep: int, from_step: int, images: int
    ) -> None:
        """Goes on from step `from_step` with `images` rows in the manifest; what lay behind is cut off (`cut_back`).

        `keep`: how many checkpoints are kept.
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
        """One training step: its pictures, one line each in the manifest, and one line of metrics."""
        keep = rollouts.step % self.images_every == 0
        indices = self._indices(rollouts)
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
        """A checkpoint; nobody runs ahead of it."""
        if self.world.rank == 0:
            path = self.folder.path
            checkpoint.save(checkpoint.step_folder(path, step), tensors, state)
            self.folder.step_is_saved()
            checkpoint.keep_last(path, self.keep)
        self.world.gather(None)

    def wait(self) -> None:
        """Everything is written as soon as it is handed over."""

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """One evaluation, made before training step `step`."""
        if self.world.rank == 0:
            finite = {name: x if math.isfinite(x) else None for name, x in figures.items()}
            self._evaluations.append([{"step": step, **finite}])
            self._to_board({f"evaluation/{name}": x for name, x in figures.items()}, step)

    def samples(self, step: int, numbers: Sequence[int], images_BCHW: Tensor) -> None:
        """Pictures of an evaluation: samples/step-000100/0007.png, the same number is the same prompt and seed."""
        place = samples_of(self.folder, step)
        place.mkdir(parents=True, exist_ok=True)
        write_all_atomic(
            {place / f"{n:04d}.png": png_bytes(one) for n, one in zip(numbers, images_BCHW, strict=True)}
        )
        fsync_folder(place)

    def sample_scores(self, step: int, scores: Mapping[str, Scores]) -> None:
        """Scores of an evaluation's pictures, this process's part of them in the order of their numbers."""
        own = {
            name: [x if math.isfinite(x) else None for x in one.values_B.tolist()]
            for name, one in scores.items()
        }
        parts = self.world.gather(own)
        if self.world.rank == 0:
            whole = {name: [x for part in parts for x in part[name]] for name in own}
            write_atomic(samples_of(self.folder, step) / SCORES, json.dumps(whole).encode())

    def close(self) -> None:
        """All events are on the disk."""
        if self._board is not None:
            self._board.close()

    def _indices(self, rollouts: Rollouts) -> list[int]:
        samples = rollouts.samples
        first = [self.images + group.place * samples.per_group for group in samples.groups]
        return [start + place for start in first for place in range(samples.per_group)]

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
    """Drops what lies behind the checkpoint of `step`, evaluations and their pictures too: it is drawn anew."""
    folder.cut_back(step, images)
    log = JsonLines(folder.path / EVALUATIONS, folder.path)
    log.keep(sum(row["step"] < step for row in log.read()))
    for place in evaluated_places(folder):
        if step_of_place(place) >= step:
            remove(place)


def evaluated_places(folder: RunFolder) -> list[Path]:
    """The folders of evaluations' pictures, oldest first."""
    found = folder.samples_dir.glob(f"{STEP}[0-9]*")
    return sorted((place for place in found if place.name.removeprefix(STEP).isdigit()), key=step_of_place)


def step_of_place(place: Path) -> int:
    """Before which training step the pictures in a folder of an evaluation were drawn."""
    return int(place.name.removeprefix(STEP))


def samples_of(folder: RunFolder, step: int) -> Path:
    """The folder of an evaluation's pictures."""
    return folder.samples_dir / f"{STEP}{step:06d}"


def sample_scores(folder: RunFolder, step: int) -> dict[str, list[float | None]]:
    """Reward -> scores of an evaluation's pictures by number, None where there is none; {} of a run that kept none.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = samples_of(folder, step) / SCORES
    if not file.is_file():
        return {}
    try:
        scores: dict[str, list[float | None]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged ({error}). Delete it: the report then goes without intervals."
        ) from None
    return scores


def evaluations(path: Path) -> list[dict[str, Any]]:
    """All evaluations of a run folder, in order: `step` and figures by name, None where there is none."""
    return JsonLines(Path(path) / EVALUATIONS, Path(path)).read()


COEFFICIENTS = "rollouts/coefficients"


class FuseLog:
    """The record of one fusion. At most one step is waiting to be written while the next one renders."""

    def __init__(self, folder: RunFolder, config: FuseConfig) -> None:
        self.folder = folder
        self.config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixrl-writer")
        self._pending: list[Future[None]] = []
        self._is_broken = False
        (folder.path / COEFFICIENTS).mkdir(parents=True, exist_ok=True)

    def step(self, rollouts: FusionRollouts, scores: FusionScores, metrics: Mapping[str, float]) -> None:
        """Hands a step over. Raises what went wrong with the one before (a full disk, say)."""
        self.wait()
        self._hand_over(self._write, rollouts, scores, dict(metrics))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Hands a checkpoint over, as it is now."""
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._hand_over(self._save, step, copies, dict(state))

    def wait(self) -> None:
        """Until everything handed over is on the disk."""
        while self._pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        """What was handed over is still written, unless something before it failed."""
        self._thread.shutdown(wait=True)

    def _hand_over(self, write: Callable[..., None], *given: object) -> None:
        self._pending.append(self._thread.submit(self._in_order, write, *given))

    def _in_order(self, write: Callable[..., None], *given: object) -> None:
        """Nothing is written behind what could not be: a checkpoint says that all of its step is there."""
        if self._is_broken:
            return
        self._is_broken = True
        write(*given)
        self._is_broken = False

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
