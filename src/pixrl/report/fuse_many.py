"""The index page of a folder of fusions: samplers side by side, or all pairs of a list."""

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pixrl.report import charts
from pixrl.report.fuse import child_of, run_figures, write_fuse_report
from pixrl.report.page import THUMBNAIL, inline, render
from pixrl.report.reproduce import many_command
from pixrl.runs import fuse as fuse_job
from pixrl.runs.files import write_atomic
from pixrl.runs.fuse import FinishedRun
from pixrl.runs.fuse_many import COMPARE, FinishedRuns

SHOWN = 8


def write_many_report(runs: FinishedRuns) -> Path:
    """Writes report.html of the folder, and of every finished run in it."""
    for run in runs.runs:
        write_fuse_report(run)
    write_atomic(runs.folder.report_path, render("many.html.j2", many_view(runs)).encode())
    return runs.folder.report_path


def many_view(runs: FinishedRuns) -> dict[str, Any]:
    """Everything the page shows."""
    compared = runs.folder.kind == COMPARE
    rows = [_row(runs, run) for run in runs.runs]
    if compared:
        rows.sort(key=lambda row: -row["figures"].reward)
    budget = runs.config.fuse.get("budget")
    model = runs.config.fuse.get("model")
    what = f"{len(rows)} samplers" if compared else f"{len(rows)} fusions by {runs.config.samplers[0]}"
    return {
        "heading": "Samplers side by side" if compared else f"{len(rows)} fusions",
        "concepts": runs.config.concepts[0] if compared else None,
        "subtitle": f"{what} on {model}, {budget} pictures each, seed {runs.config.fuse.get('seed')}; "
        f"the same exemplars and the same selection for all.",
        "curves": Markup(_curves(rows)) if compared and rows else None,
        "rows": rows,
        "failures": list(runs.failures.items()),
        "notes": runs.config.notes,
        "command": many_command(runs),
        "date": "",
    }


def _row(runs: FinishedRuns, run: FinishedRun) -> dict[str, Any]:
    selection = run.selection
    shown = list(selection.indices) or [near.index for near in selection.nearest]
    children = [child_of(run, run.rows[index], THUMBNAIL) for index in shown[:SHOWN]]
    means = _batch_means(run)
    parents = []
    for concept in run.config.concepts:
        files = fuse_job.exemplar_files(run.folder, concept)
        parents += [{"concept": concept, "image": inline(file, THUMBNAIL)} for file in files[:1]]
    return {
        "name": str(run.config.sampler),
        "concepts": run.config.concepts,
        "image": children[0].image if children else None,
        "qualified": bool(selection.indices),
        "figures": run_figures(run),
        "means": means,
        "spark": Markup(charts.sparkline([mean for _, mean in means])),
        "link": f"{run.folder.path.relative_to(runs.folder.path).as_posix()}/report.html",
        "parents": parents,
        "children": children,
    }


def _batch_means(run: FinishedRun) -> list[tuple[float, float]]:
    """Pictures made, and the mean reward of the batch, for every batch with a score."""
    batches: dict[int, list[float]] = {}
    for row in run.rows:
        reward = row.scores.get("reward")
        if reward is not None:
            batches.setdefault(row.step, []).append(reward)
    return [((step + 1) * run.config.batch, math.fsum(b) / len(b)) for step, b in sorted(batches.items())]


def _curves(rows: list[dict[str, Any]]) -> str:
    curves = [charts.Curve(row["name"], row["means"], f"k{i % 9}") for i, row in enumerate(rows)]
    return charts.lines_chart(curves, "pictures", "mean reward")
