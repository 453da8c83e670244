"""The report of a fusion: one HTML page that needs nothing but itself."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pixrl.fusion.select import SCORE, similarities_of
from pixrl.metrics.fusion import FusionFigures, figures
from pixrl.report import charts
from pixrl.report.page import FULL, THUMBNAIL, Picture, inline, render
from pixrl.report.reproduce import command_line, python_lines, run_facts
from pixrl.runs import fuse as fuse_job
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import ManifestRow
from pixrl.runs.fuse import FinishedRun
from pixrl.runs.log import COEFFICIENTS


@dataclass(frozen=True)
class ParentShare:
    """One parent's part in a child."""

    concept: str
    similarity: float
    percent: float
    bar: float
    """Width of its bar: the share cut to [0, 100] and made to sum to 100."""


@dataclass(frozen=True)
class Child:
    """One picture of the run, as the page shows it."""

    index: int
    step: int
    seed: int
    image: Picture
    parts: tuple[ParentShare, ...]
    reward: float
    balance: float
    candidate: bool
    failed: str | None
    spread: float
    coefficients: str

    @property
    def total(self) -> float:
        return sum(part.similarity for part in self.parts)


@dataclass(frozen=True)
class Parent:
    """A concept alone."""

    concept: str
    place: int
    prompt: str
    images: tuple[Picture, ...]
    usable: int
    percent: float | None
    similarity: float | None


def write_fuse_report(run: FinishedRun) -> Path:
    """Writes report.html into the run's folder."""
    write_atomic(run.folder.report_path, render("fuse.html.j2", fuse_view(run)).encode())
    return run.folder.report_path


def fuse_view(run: FinishedRun) -> dict[str, Any]:
    """Everything the page shows."""
    config, selection = run.config, run.selection
    children = [child_of(run, row, THUMBNAIL) for row in run.rows]
    scored = [child for child in children if child.failed is None]
    failures = [child for child in children if child.failed is not None]
    shown = list(selection.indices) or [near.index for near in selection.nearest]
    best = child_of(run, run.rows[shown[0]], FULL) if shown else None
    parents = [_parent(run, place, best) for place in range(len(config.concepts))]
    middle = (len(parents) + 1) // 2
    limits = selection.thresholds
    environment, facts = run_facts(run)
    return {
        "concepts": config.concepts,
        "images": selection.images,
        "sampler": str(config.sampler),
        "model": config.model,
        "seed": config.seed,
        "alpha": f"{config.alpha:g}",
        "qualified": bool(selection.indices),
        "candidates": selection.candidates,
        "best": best,
        "short": "" if selection.indices or best is None else _short(run),
        "left": parents[:middle],
        "right": parents[middle:],
        "chosen": [children[index] for index in selection.indices],
        "children": sorted(scored, key=_rank),
        "failures": failures,
        "reasons": Counter(child.failed for child in failures).most_common(),
        "lineage": [children[index] for index in shown],
        "exemplar_seeds": fuse_job.read_world(run.folder).exemplar_seeds,
        "presence": limits.presence,
        "balance": limits.balance,
        "presence_source": limits.presence_source,
        "balance_source": limits.balance_source,
        "outcome": selection.summary(run.folder.path),
        "figures": run_figures(run),
        "reward_chart": Markup(charts.reward_chart([child.reward for child in children], config.batch)),
        **_scatter(run, children),
        "facts": facts,
        "date": environment.get("date", ""),
        "command": command_line(run),
        "python": python_lines(run),
        "folder": run.folder.path.name,
    }


def run_figures(run: FinishedRun) -> FusionFigures:
    """The figures of a finished run at its own thresholds."""
    similarities_BN = similarities_of(run.rows, run.config.concepts)
    limits = run.selection.thresholds
    return figures(similarities_BN, run.config.alpha, limits.presence, limits.balance, run.selection.indices)


def child_of(run: FinishedRun, row: ManifestRow, side: int) -> Child:
    """A manifest row as the page shows it."""
    limits = run.selection.thresholds
    values = [_number(row.scores.get(f"{SCORE}{concept}")) for concept in run.config.concepts]
    summary = row.extra.get("coefficients", {"share": {}, "spread": math.nan})
    shares = [100 * summary["share"].get(concept, math.nan) for concept in run.config.concepts]
    bars = [max(share, 0.0) if math.isfinite(share) else 0.0 for share in shares]
    whole = sum(bars) or 1.0
    balance = _number(row.scores.get("balance"))
    assert row.file is not None
    return Child(
        index=row.index,
        step=row.step,
        seed=row.seed,
        image=inline(run.folder.path / row.file, side),
        parts=tuple(
            ParentShare(concept, value, share, 100 * bar / whole)
            for concept, value, share, bar in zip(run.config.concepts, values, shares, bars, strict=True)
        ),
        reward=_number(row.scores.get("reward")),
        balance=balance,
        candidate=row.failed is None and min(values) > limits.presence and balance < limits.balance,
        failed=row.failed,
        spread=summary["spread"],
        coefficients=f"{COEFFICIENTS}/step-{row.step:06d}.safetensors, row {row.index - row.step * run.config.batch}",
    )


def _parent(run: FinishedRun, place: int, best: Child | None) -> Parent:
    concept = run.config.concepts[place]
    world = fuse_job.read_world(run.folder)
    files = fuse_job.exemplar_files(run.folder, concept)
    part = None if best is None else best.parts[place]
    return Parent(
        concept=concept,
        place=place,
        prompt=world.prompts[concept],
        images=tuple(inline(file, THUMBNAIL) for file in files[:3]),
        usable=world.usable_exemplars[concept],
        percent=None if part is None else part.percent,
        similarity=None if part is None else part.similarity,
    )


def _rank(child: Child) -> tuple[bool, float]:
    return (not child.candidate, -child.total if child.candidate else -child.reward)


def _short(run: FinishedRun) -> str:
    near = run.selection.nearest[0]
    misses = [
        f"it lacks {value:.3f} in {name}"
        if name == "presence"
        else f"it is {value:.3f} too far out of balance"
        for name, value in (("presence", near.presence), ("balance", near.balance))
        if value > 0
    ]
    return " and ".join(misses) or "it lies exactly on a threshold"


def _scatter(run: FinishedRun, children: list[Child]) -> dict[str, Any]:
    """S1 against S2 for two concepts; the least similarity against the imbalance for more."""
    concepts, limits = run.config.concepts, run.selection.thresholds
    chosen = set(run.selection.indices)
    last = max(len(children) - 1, 1)
    pair = len(concepts) == 2
    points = [
        charts.Point(
            x=child.parts[0].similarity if pair else child.balance,
            y=child.parts[1].similarity if pair else min(part.similarity for part in child.parts),
            progress=child.index / last,
            marked=child.index in chosen,
            label=f"{child.index}: reward {child.reward:.3f}",
        )
        for child in children
        if child.failed is None
    ]
    p, b = limits.presence, limits.balance
    if pair:
        region = [(p, p), (p + b, p), (2, 2 - b), (2, 2), (2 - b, 2), (p, p + b)]
        labels = (f"S1, similarity to {concepts[0]}", f"S2, {concepts[1]}")
        title = "Similarity to each parent"
    else:
        region = [(b, p), (b, 2), (-1, 2), (-1, p)]
        labels = ("largest − smallest similarity", "smallest similarity")
        title = "Presence and balance"
    chart = charts.scatter_chart(points, *labels, region)
    note = "Right: the shaded region holds the candidates. Early pictures are faint, late ones strong, selected orange."
    return {"scatter_chart": Markup(chart), "scatter_title": title, "scatter_note": note}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
