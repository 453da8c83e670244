"""The report of an alignment, finished or not: one HTML page that needs nothing but itself."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pixrl.hub import TOY_PREFIX
from pixrl.report import describe as words
from pixrl.report.align_panels import Panel, panels, reward_panels
from pixrl.report.changes import changes_of, warnings
from pixrl.report.page import THUMBNAIL, Picture, inline, render
from pixrl.report.samples import before_and_after, subjects_in_words
from pixrl.runs.config import ALIGN, PERSONALIZE, AlignConfig, read_config, require_kind
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import ManifestRow, RunFolder
from pixrl.runs.record import comparable_evaluations, start_if_any

SHOWN = 32
"""Pairs of the gallery."""
DONE = {ALIGN: "aligned", PERSONALIZE: "personalized"}
"""What a kind of run does to a model, in headings."""


@dataclass(frozen=True)
class Pair:
    """The same prompt and noise before and after, beside the subject that both were shown."""

    prompt: str
    seed: int
    before: Picture
    after: Picture
    reference: Picture | None = None


@dataclass(frozen=True)
class Cell:
    """One picture of a group."""

    image: Picture
    caption: str


@dataclass(frozen=True)
class ShownGroup:
    """A training group: rows are semantic variants, columns noises."""

    step: int
    prompt: str
    reward: str
    columns: int
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def write_align_report(path: Path) -> Path:
    """Writes report.html into an align run's folder, whether it is finished or not.

    Raises:
        RunError: it is no align run.
        CheckpointError: its logs or its recipe are damaged.
    """
    folder = RunFolder.open(path)
    require_kind(folder)
    write_atomic(folder.report_path, render("align.html.j2", align_view(folder)).encode())
    return folder.report_path


def align_view(folder: RunFolder) -> dict[str, Any]:
    """Everything the page shows."""
    config = read_config(folder)
    metrics, evaluated, manifest = folder.metrics(), comparable_evaluations(folder), folder.manifest()
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    pairs = gallery_pairs(folder)
    finished = len(metrics) >= config.steps and any(row["step"] == config.steps for row in evaluated)
    changes = changes_of(folder, config)
    return {
        "model": config.model,
        "done_to_it": DONE[folder.kind],
        "subjects": subjects_in_words(folder, config),
        "parts": words.method_parts(config),
        "done": len(metrics),
        "steps": config.steps,
        "finished": finished,
        "images": len(manifest),
        "changes": changes,
        "intervals": any(change.interval for change in changes),
        "evaluated": [evaluated[0]["step"], evaluated[-1]["step"]] if evaluated else [],
        "warnings": [*warnings(changes), *_without_base(start_if_any(folder))],
        "pairs": pairs[:SHOWN],
        "more": max(len(pairs) - SHOWN, 0),
        "unseen": is_unseen(config, start_if_any(folder)),
        "shown": "subjects" if folder.kind == PERSONALIZE else "prompts",
        "slot": "trained" if config.optimizer.ema is None else "averaged",
        "reward_panels": _marked(reward_panels(config, metrics, evaluated)),
        "panels": _marked(panels(metrics, evaluated, learned=config.loss.learns_from_scores)),
        "group": newest_group(folder.path, config, manifest),
        "group_note": words.training_pictures(config),
        "phases": phases(metrics),
        "failures": failures(manifest),
        "facts": words.facts(config, start_if_any(folder)),
        "machine": words.machine_facts(environment),
        "recipe": folder.recipe_text(),
        "commands": words.commands(folder.path, finished, folder.kind),
        "date": environment["date"],
    }


def _without_base(start: Mapping[str, Any]) -> Iterator[str]:
    if since := start.get("evaluated_from", 0):
        yield (
            f"From step {since} on the evaluation draws other pictures than it drew of the base, so nothing is set "
            "beside the base. The plan below says what changed."
        )


def is_unseen(config: AlignConfig, start: Mapping[str, Any] | None = None) -> bool:
    """Whether the prompts of the evaluation are others than those of training: as start.json counted, or by source."""
    if start is not None and "trained_on" in start:
        return bool(start["trained_on"] == 0)
    source = config.prompts.source
    other = config.evaluation.source not in (None, source)
    return other or source.startswith(TOY_PREFIX)


def gallery_pairs(folder: RunFolder) -> list[Pair]:
    """Held-out prompts by the base and by the newest evaluated weights, from the same noise."""
    return [
        Pair(
            entry["prompt"],
            entry["seed"],
            inline(before, THUMBNAIL),
            inline(after, THUMBNAIL),
            inline(folder.path / entry["reference"], THUMBNAIL) if "reference" in entry else None,
        )
        for entry, before, after in before_and_after(folder)
    ]


def newest_group(run: Path, config: AlignConfig, manifest: Sequence[ManifestRow]) -> ShownGroup | None:
    """The first whole group of the newest step whose pictures were kept; None where there is none."""
    size, noises = words.group_size(config), config.exploration.noises
    kept = [row for row in manifest if row.file is not None]
    newest = [row for row in kept if row.step == kept[-1].step][:size]
    if len(newest) < size:
        return None
    reward = next(setting.name for setting in config.rewards if not setting.held_out)
    cells = [Cell(inline(run / str(row.file), THUMBNAIL), _score(row, reward)) for row in newest]
    rows = tuple(
        ("the prompt itself" if newest[at].variant == 0 else f"variant {newest[at].variant}",
         tuple(cells[at : at + noises]))
        for at in range(0, size, noises)
    )  # fmt: skip
    return ShownGroup(newest[0].step, str(newest[0].prompt), reward, noises, rows)


def phases(metrics: Sequence[Mapping[str, float]]) -> list[tuple[str, float, float]]:
    """Phase, seconds in all, and percent of all phases."""
    prefix = "seconds/"
    names = dict.fromkeys(name for row in metrics for name in row if name.startswith(prefix))
    seconds = {name.removeprefix(prefix): math.fsum(row.get(name, 0.0) for row in metrics) for name in names}
    whole = math.fsum(seconds.values()) or 1.0
    return [(name, spent, 100 * spent / whole) for name, spent in seconds.items()]


def failures(manifest: Sequence[ManifestRow]) -> list[tuple[str, int]]:
    """Reasons of failed scores and how often, the most frequent first."""
    counts: dict[str, int] = {}
    for row in manifest:
        if row.failed is not None:
            counts[row.failed] = counts.get(row.failed, 0) + 1
    return sorted(counts.items(), key=lambda entry: -entry[1])


def _score(row: ManifestRow, reward: str) -> str:
    value = row.scores.get(reward)
    return "–" if value is None else f"{value:.3f}"


def _marked(found: Sequence[Panel]) -> list[dict[str, Any]]:
    return [{"title": one.title, "note": one.note, "svg": Markup(one.svg)} for one in found]
