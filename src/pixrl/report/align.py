"""The report of an alignment, finished or not: one HTML page that needs nothing but itself.

Its figures and charts are those of `figures.py`, which the studio shows too; what only a report says is here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixrl.hub import TOY_PREFIX
from pixrl.report import describe
from pixrl.report.figures import (
    SHOWN,
    changes_of,
    failures,
    gallery_pairs,
    guard_findings,
    newest_group,
    panels,
    phases,
    reward_panels,
    warnings,
)
from pixrl.report.page import THUMBNAIL, inline, render
from pixrl.runs.config import ALIGN, PERSONALIZE, AlignConfig, read_config, require_kind
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import RunFolder
from pixrl.runs.reading import comparable_evaluations, start_if_any
from pixrl.runs.record import shape_of

DONE = {ALIGN: "aligned", PERSONALIZE: "personalized"}
"""What a kind of run does to a model, for headings."""


def write_align_report(path: Path, refresh: float | None = None) -> Path:
    """Write report.html into an align run's folder, whether it is finished or not; return the page's path.

    `refresh`: seconds after which the page loads itself again.

    Raises:
        RunError: it is no align run.
        CheckpointError: its logs or its recipe are damaged.
    """
    folder = RunFolder.open(path)
    require_kind(folder)
    write_atomic(folder.report_path, render("align.html.j2", align_view(folder), refresh).encode())
    return folder.report_path


def align_view(folder: RunFolder) -> dict[str, Any]:
    """Return everything that the page's template shows."""
    config = read_config(folder)
    shape = shape_of(config)
    metrics, evaluated, manifest = folder.metrics(), comparable_evaluations(folder), folder.manifest()
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    start = start_if_any(folder)
    pairs = gallery_pairs(folder)
    finished = len(metrics) >= config.steps and any(row["step"] == config.steps for row in evaluated)
    changes = changes_of(folder, shape)
    doubts = warnings(changes)
    if since := start.get("evaluated_from", 0):
        doubts.append(
            f"From step {since} on the evaluation draws other pictures than it drew of the base, so nothing is set "
            "beside the base. The plan below says what changed."
        )
    return {
        "model": config.model,
        "done_to_it": DONE[folder.kind],
        "subjects": describe.subjects_in_words(folder, config),
        "parts": describe.method_parts(config),
        "done": len(metrics),
        "steps": config.steps,
        "finished": finished,
        "images": len(manifest),
        "changes": changes,
        "intervals": any(change.interval for change in changes),
        "evaluated": [evaluated[0]["step"], evaluated[-1]["step"]] if evaluated else [],
        "warnings": doubts,
        "pairs": pairs[:SHOWN],
        "more": max(len(pairs) - SHOWN, 0),
        "unseen": is_unseen(config, start),
        "shown": "subjects" if folder.kind == PERSONALIZE else "prompts",
        "slot": "trained" if config.optimizer.ema is None else "averaged",
        "reward_panels": reward_panels(shape, metrics, evaluated),
        "panels": panels(metrics, evaluated, learned=shape.learned),
        "group": newest_group(
            folder.path, shape, manifest, lambda file: inline(file, THUMBNAIL, folder.path)
        ),
        "group_note": shape.pictures,
        "phases": phases(metrics),
        "failures": failures(manifest),
        "guard": guard_findings(folder),
        "facts": describe.facts(config, start),
        "machine": describe.machine_facts(environment),
        "recipe": folder.recipe_text(),
        "commands": describe.commands(folder.path, finished, folder.kind),
        "date": environment["date"],
    }


def is_unseen(config: AlignConfig, start: Mapping[str, Any] | None = None) -> bool:
    """Return whether the evaluation's prompts are others than those of training.

    Where `start`, the content of start.json, counted those that are trained on, it decides; else the sources do.
    """
    if start is not None and "trained_on" in start:
        return bool(start["trained_on"] == 0)
    source = config.prompts.source
    return config.evaluation.source not in (None, source) or source.startswith(TOY_PREFIX)
