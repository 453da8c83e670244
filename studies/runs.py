"""How a cell of an align or a personalize study is run and measured, and what is written of the whole study.

Each run is a run folder under DIR/runs/; one that was broken off goes on from its checkpoint. With `--set reuse=OTHER`
finished runs of another study's folder with the same recipe and seed are measured instead of trained again.
"""

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pixrl.jobs import align as align_job
from pixrl.jobs.fuse import slug
from pixrl.metrics.diversity import DiversityMeter
from pixrl.models.slots import Slot
from pixrl.report.align import images_of, updates_of, write_align_report
from pixrl.runs.config import AlignConfig, kind_of, read_config
from pixrl.runs.data import with_full_paths
from pixrl.runs.folder import RunFolder
from pixrl.runs.loaded import LoadedRun, load_run, plan_batches
from pixrl.runs.measure import (
    Drawing,
    Evaluation,
    evaluate,
    evaluated_slot,
    load_meter,
    open_run,
)
from pixrl.runs.place import is_run
from pixrl.runs.reading import evaluations
from studies.config import BASE, PersonalizeStudyConfig, RunStudyConfig
from studies.figures import write_figures
from studies.grid import Record, Task
from studies.pictures import write_gallery, write_projection, write_spectrum
from studies.runs_tables import write_tables

RUNS = "runs"
OWN = ("group_std", "zero_std_share", "diversity", "conflict_share", "reward_correlation", "advantage_mean")
"""Figures of metrics.jsonl that a record keeps step by step where they are of the trained model's own pictures."""
SUMMED_UP = ("group_std", "zero_std_share", "conflict_share", "reward_correlation")
"""Those figures of `OWN` whose means over training a record has."""
LATE = 0.25
"""The share of steps, at the end of training, of which 'end' is the mean."""


def run_task(study: RunStudyConfig, task: Task, out: Path) -> Record:
    """Train one variant with one seed, unless it is the base, then measure it."""
    name, seed = task
    config = study.recipe(task)
    if name == BASE:
        measured = measure(study, load_run(study.judged(config)), Slot.REFERENCE, seed)
        training: dict[str, Any] = {"run": None, "images": 0, "updates": 0, "training": {}, "curves": {}}
    else:
        run = finished_run(study.reuse, config) or train(config, out / RUNS / slug(name) / f"seed-{seed}")
        measured = measure(study, open_run(run, study.measuring.rewards), evaluated_slot(config), seed)
        training = training_record(config, RunFolder.open(run).metrics(), evaluations(run))
        training["run"] = Path(os.path.relpath(run, out.absolute())).as_posix()
    figures = measured.figures() | training.pop("training")
    return {"variant": name, "seed": seed, "figures": figures, "measured": measured.to_json(), **training}


def finished_run(study: Path | None, config: AlignConfig) -> Path | None:
    """Find a run of another study's folder that has this very recipe, seed included, and came to its end."""
    if study is None:
        return None
    for path in sorted(study.absolute().glob(f"{RUNS}/*/seed-{config.seed}")):
        folder = RunFolder.open(path)
        known = (config, with_full_paths(config))
        same = folder.kind == kind_of(config) and read_config(folder) in known
        if same and evaluations(path)[-1:] and evaluations(path)[-1]["step"] == config.steps:
            return path
    return None


def train(config: AlignConfig, path: Path) -> Path:
    """Train from the start, or from where the run was broken off, to the end, and write the report."""
    if is_run(path):
        align_job.go_on(path)
    else:
        align_job.start(config, path)
    write_align_report(path)
    return path.absolute()


def measure(study: RunStudyConfig, shop: LoadedRun, slot: Slot, seed: int) -> Evaluation:
    """Measure a slot by the prompts and noise that all variants of a seed, and the base, have in common."""
    m = study.measuring
    micro_batches, _ = plan_batches(shop)
    drawing = Drawing(m.per_prompt, m.steps, m.solver, seed, micro_batches.rollout)
    prompts = m.choose(shop.held_out)
    return evaluate(shop.policy, slot, prompts, drawing, shop.rewards, _meter(m.features, m.segmenter))


def training_record(
    config: AlignConfig, metrics: Sequence[Mapping[str, float]], evaluated: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what is kept of a run's logs: totals, means over training, and curves over pictures drawn.

    Rewards, group std and conflicts of sft and rpo are left out: their pictures are targets or the frozen base's, and
    say nothing of what is learned.
    """
    per_step, own = config.prompts.per_step * config.group_size, config.loss.draws_its_own
    of_pictures = [*OWN, *(f"reward/{setting.name}/mean" for setting in config.rewards)]
    names = ["kl", *(of_pictures if own else [])]
    curves = {
        name: [
            [(row["step"] + 1) * per_step, row[name]]
            for row in metrics
            if math.isfinite(row.get(name, math.nan))  # a step whose updates were all skipped has no kl
        ]
        for name in names
    }
    fixed = {
        f"fixed/{setting.name}": [
            [row["step"] * per_step, row[key]] for row in evaluated if row.get(key) is not None
        ]
        for setting in config.rewards
        for key in [f"{setting.name}/mean"]
    }
    seconds = math.fsum(x for row in metrics for name, x in row.items() if name.startswith("seconds/"))
    return {
        "images": images_of(config),
        "updates": updates_of(config),
        "training": (training_figures(metrics) if own else {}) | {"minutes": seconds / 60},
        "curves": curves | fixed,
    }


def training_figures(metrics: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Return the means over all of training, and over its last quarter, of what was logged of `SUMMED_UP`."""
    late = metrics[len(metrics) - max(1, round(len(metrics) * LATE)) :]
    return {
        f"{name}{suffix}": _mean([row.get(name, math.nan) for row in rows])
        for name in SUMMED_UP
        if any(name in row for row in metrics)
        for suffix, rows in (("", metrics), ("/end", late))
    }


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


@cache
def _meter(features: str, segmenter: str | None) -> DiversityMeter:
    return load_meter(features, segmenter)


def finish(study: RunStudyConfig, records: list[Record], out: Path) -> None:
    """Draw the projection, and of subjects the spectrum and the gallery, where they are asked for."""
    if study.projection is not None:
        write_projection(study, out, _meter(study.measuring.features, study.measuring.segmenter))
    if isinstance(study, PersonalizeStudyConfig):
        write_spectrum(study, out)
        write_gallery(study, records, out)


def write_results(study: RunStudyConfig, records: list[Record], out: Path) -> str:
    """Write table.md, summary.json and figures/ from the records so far; return the Markdown."""
    write_figures(study, records, out)
    return write_tables(study, records, out)
