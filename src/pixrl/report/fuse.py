"""The report of a fusion, one HTML page that needs nothing but itself, and the index page of a folder of fusions.

Each page ends with how to make the run again: its command line, the same in Python, the facts of machine and models.
"""

import json
import math
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from pixrl.config import Settings
from pixrl.fusion.config import COMPARE, FuseConfig, resolve_options
from pixrl.fusion.select import similarities_of, truths_of
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs.fuse import FinishedRun
from pixrl.jobs.fuse_many import FinishedRuns
from pixrl.metrics.fusion import FusionFigures, figures
from pixrl.metrics.true_fusion import FusionVerdict
from pixrl.report import charts
from pixrl.report.align import drawing
from pixrl.report.figures import ParentShare, number, parent_shares
from pixrl.report.page import FULL, THUMBNAIL, Embedded, inline, render
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import ManifestRow
from pixrl.runs.log import COEFFICIENTS
from pixrl.runs.reading import VERDICT

SHOWN = 8
"""Pictures of a fusion on the index page."""
_FLAGS = ("model", "sampler", "budget", "exemplars", "seed", "alpha", "keep", "presence", "balance", "device")
"""Settings of `pixrl fuse` that are options of the command; the others are given by --set."""


@dataclass(frozen=True)
class Child:
    """One picture of the run with its scores and coefficients, as the page shows it."""

    index: int
    step: int
    seed: int
    image: Embedded
    parts: tuple[ParentShare, ...]
    reward: float
    balance: float
    candidate: bool
    failed: str | None
    spread: float
    coefficients: str
    verdict: str
    """What the picture is, in words; empty where nothing told."""

    @property
    def total(self) -> float:
        """The sum of the similarities to all concepts."""
        return sum(part.similarity for part in self.parts)


@dataclass(frozen=True)
class Parent:
    """One concept of the fusion, drawn alone."""

    concept: str
    place: int
    prompt: str
    images: tuple[Embedded, ...]
    usable: int
    percent: float | None
    similarity: float | None

    @classmethod
    def of(cls, run: FinishedRun, place: int, best: "Child | None") -> "Parent":
        """Return the concept at a place of the recipe, with its share of the best child where there is one."""
        concept = run.config.concepts[place]
        world = fuse_job.read_world(run.folder)
        files = fuse_job.exemplar_files(run.folder, concept)
        part = None if best is None else best.parts[place]
        return cls(
            concept=concept,
            place=place,
            prompt=world.prompts[concept],
            images=tuple(inline(file, THUMBNAIL, run.folder.path) for file in files[:3]),
            usable=world.usable_exemplars[concept],
            percent=None if part is None else part.percent,
            similarity=None if part is None else part.similarity,
        )


def write_fuse_report(run: FinishedRun, refresh: float | None = None) -> Path:
    """Write report.html into the run's folder; return its path.

    `refresh`: seconds after which the page loads itself again.
    """
    write_atomic(run.folder.report_path, render("fuse.html.j2", fuse_view(run), refresh).encode())
    return run.folder.report_path


def fuse_view(run: FinishedRun) -> dict[str, Any]:
    """Return everything that the page's template shows."""
    config, selection = run.config, run.selection
    children = [child_of(run, row, THUMBNAIL) for row in run.rows]
    rewards = [child.reward for child in children]
    scored = [child for child in children if child.failed is None]
    failures = [child for child in children if child.failed is not None]
    shown = list(selection.indices) or [near.index for near in selection.nearest]
    best = child_of(run, run.rows[shown[0]], FULL) if shown else None
    parents = [Parent.of(run, place, best) for place in range(len(config.concepts))]
    middle = (len(parents) + 1) // 2
    limits = selection.thresholds
    environment, facts = run_facts(run)
    return {
        "concepts": config.concepts,
        "images": len(run.rows),
        "budget": config.budget,
        "pool": selection.images if selection.pool else 0,
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
        "children": sorted(
            scored,
            key=lambda child: (not child.candidate, -child.total if child.candidate else -child.reward),
        ),
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
        "verdicts": verdict_words(run),
        "learns_from": str(config.reward),
        "reward_chart": Markup(charts.reward_chart(rewards, config.batch, config.learning_images)),
        **_scatter(run, children),
        "facts": facts,
        "date": environment.get("date", ""),
        "command": command_line(run),
        "python": python_lines(run),
        "folder": run.folder.path.name,
    }


def run_figures(run: FinishedRun) -> FusionFigures:
    """Return the figures of a finished run at its own thresholds."""
    similarities_BN = similarities_of(run.rows, run.config.concepts)
    limits = run.selection.thresholds
    truths = truths_of(run.rows, run.config.concepts)
    thresholds = (limits.presence, limits.balance)
    return figures(similarities_BN, run.config.alpha, *thresholds, run.selection.indices, truths)


def verdict_words(run: FinishedRun) -> str:
    """Return how many of the pictures are what, and by what; an empty text where nothing told."""
    counts = Counter(truth.verdict for truth in truths_of(run.rows, run.config.concepts))
    if not counts:
        return ""
    told = ", ".join(f"{verdict.words} {counts[verdict]}" for verdict in FusionVerdict if counts[verdict])
    return f"{told}; by {fuse_job.read_world(run.folder).truth}"


def child_of(run: FinishedRun, row: ManifestRow, side: int, page: Path | None = None) -> Child:
    """Return a manifest row as a page shows it; its picture is scaled to `side` pixels.

    `page`: the folder of the page; None: the run's.
    """
    limits = run.selection.thresholds
    parts = parent_shares(row, run.config.concepts)
    least = min(part.similarity for part in parts)
    balance = number(row.scores.get("balance"))
    assert row.file is not None
    place = row.index - run.config.first_index(row.step)
    return Child(
        index=row.index,
        step=row.step,
        seed=row.seed,
        image=inline(run.folder.path / row.file, side, page or run.folder.path),
        parts=parts,
        reward=number(row.scores.get("reward")),
        balance=balance,
        candidate=row.failed is None and least > limits.presence and balance < limits.balance,
        failed=row.failed,
        spread=row.extra.get("coefficients", {}).get("spread", math.nan),
        coefficients=f"{COEFFICIENTS}/step-{row.step:06d}.safetensors, row {place}",
        verdict=FusionVerdict(row.extra[VERDICT]).words if VERDICT in row.extra else "",
    )


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
    """Plot S1 against S2 for two concepts; the least similarity against the imbalance for more."""
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


def write_many_report(runs: FinishedRuns, refresh: float | None = None) -> Path:
    """Write report.html of the folder and of every finished run in it; return the folder's.

    `refresh`: seconds after which the folder's page loads itself again.
    """
    for run in runs.runs:
        write_fuse_report(run)
    write_atomic(runs.folder.report_path, render("many.html.j2", many_view(runs), refresh).encode())
    return runs.folder.report_path


def many_view(runs: FinishedRuns) -> dict[str, Any]:
    """Return everything that the index page's template shows."""
    compared = runs.folder.kind == COMPARE
    rows = [_row(runs, run) for run in runs.runs]
    if compared:
        rows.sort(key=lambda row: -row["figures"].reward)
    budget = runs.config.fuse.get("budget")
    model = runs.config.fuse.get("model")
    curves = [charts.Curve(row["name"], row["means"], f"k{i % 9}") for i, row in enumerate(rows)]
    what = f"{len(rows)} samplers" if compared else f"{len(rows)} fusions by {runs.config.samplers[0]}"
    return {
        "heading": "Samplers side by side" if compared else f"{len(rows)} fusions",
        "concepts": runs.config.concepts[0] if compared else None,
        "subtitle": f"{what} on {model}, {budget} pictures each, seed {runs.config.fuse.get('seed')}; "
        f"the same exemplars and the same selection for all.",
        "curves": Markup(charts.lines_chart(curves, "pictures", "mean reward"))
        if compared and rows
        else None,
        "rows": rows,
        "told": any(row["told"] for row in rows),
        "failures": list(runs.failures.items()),
        "notes": runs.config.notes,
        "command": many_command(runs),
        "date": "",
    }


def _row(runs: FinishedRuns, run: FinishedRun) -> dict[str, Any]:
    selection = run.selection
    shown = list(selection.indices) or [near.index for near in selection.nearest]
    page = runs.folder.path
    children = [child_of(run, run.rows[index], THUMBNAIL, page) for index in shown[:SHOWN]]
    batches: dict[int, list[float]] = {}
    for entry in run.rows:
        if (reward := entry.scores.get("reward")) is not None:
            batches.setdefault(entry.step, []).append(reward)
    means = [(run.config.first_index(step + 1), math.fsum(b) / len(b)) for step, b in sorted(batches.items())]
    parents = []
    for concept in run.config.concepts:
        files = fuse_job.exemplar_files(run.folder, concept)
        parents += [{"concept": concept, "image": inline(file, THUMBNAIL, page)} for file in files[:1]]
    return {
        "name": str(run.config.sampler),
        "concepts": run.config.concepts,
        "image": children[0].image if children else None,
        "qualified": bool(selection.indices),
        "figures": run_figures(run),
        "told": bool(truths_of(run.rows, run.config.concepts)),
        "means": means,
        "spark": Markup(charts.sparkline([mean for _, mean in means])),
        "link": f"{run.folder.path.relative_to(runs.folder.path).as_posix()}/report.html",
        "parents": parents,
        "children": children,
    }


def command_line(run: FinishedRun) -> str:
    """Return the `pixrl fuse` command of a run, with the settings that differ from the defaults."""
    return shlex.join(["pixrl", "fuse", *run.config.typed, *_arguments(run.config)])


def many_command(runs: FinishedRuns) -> str:
    """Return the `pixrl fuse` command of a folder of fusions."""
    config = runs.config
    base = FuseConfig.model_validate({**config.fuse, "sampler": config.samplers[0]})
    usual = resolve_options(base.sampler, {}).model_dump(mode="json")
    given = {n: v for n, v in config.options.items() if v != usual.get(n)}
    extra = [f"--set=options.{name}={_yaml(value)}" for name, value in given.items()]
    if runs.folder.kind == COMPARE:
        arguments = [a for a in _arguments(base) if not a.startswith("--sampler")]
        compared = ["--compare", ",".join(config.samplers)]
        concepts = next(config.children())[1].typed
        return shlex.join(["pixrl", "fuse", *concepts, *compared, *arguments, *extra])
    return shlex.join(["pixrl", "fuse", "--pairs", "FILE", *_arguments(base), *extra])


def python_lines(run: FinishedRun) -> str:
    """Return the Python that makes the run again."""
    config = run.config
    given = dict(_changed(config, FuseConfig(sampler=config.sampler)))
    given.pop("sampler", None)
    parts = [repr(list(config.typed)), f"budget={config.budget}", f"seed={config.seed}"]
    parts += [f"sampler={str(config.sampler)!r}", f"model={config.model!r}"]
    parts += [
        f"{k}={v!r}" for k, v in given.items() if k not in ("budget", "seed", "model", "concepts", "pictures")
    ]
    return f"import pixrl\nresult = pixrl.fuse({', '.join(parts)})"


def run_facts(run: FinishedRun) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the content of environment.json, and (name, value) rows of facts for the page."""
    world = fuse_job.read_world(run.folder)
    path = run.folder.path / "environment.json"
    environment: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    mixing = run.config.mixed_by
    rest = mixing.model_dump(mode="json", exclude_none=True, exclude={"kind"})
    facts = [
        ("generator", f"{world.model} ({world.fingerprint}){drawing(run.config)}"),
        ("similarity", world.clip),
        ("foreground", f"{world.segmenter}, on white"),
        ("mixing", ", ".join([mixing.kind, *(f"{name} {value}" for name, value in rest.items())])),
        ("pooled features", str(run.config.pooled)),
        ("noise", str(run.config.noise)),
    ]
    options = {k: v for k, v in run.config.options.items() if v is not None}
    if options:
        facts.append((f"{run.config.sampler} options", ", ".join(f"{k} {v}" for k, v in options.items())))
    return environment, [(key, value) for key, value in facts if value]


def _arguments(config: FuseConfig) -> list[str]:
    changed = _changed(config, FuseConfig())
    flags = [f"--{name}={changed[name]}" for name in _FLAGS if name in changed]
    sets = [(k, v) for k, v in changed.items() if k not in (*_FLAGS, "options", "concepts", "pictures")]
    defaults: Settings = resolve_options(config.sampler, {})
    usual = defaults.model_dump(mode="json")
    sets += [(f"options.{k}", v) for k, v in config.options.items() if v != usual.get(k)]
    return flags + [f"--set={name}={_yaml(value)}" for name, value in sets]


def _changed(config: FuseConfig, usual: FuseConfig) -> dict[str, Any]:
    before = usual.model_dump(mode="json")
    return {
        name: value for name, value in config.model_dump(mode="json").items() if value != before.get(name)
    }


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
