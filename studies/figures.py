"""The figures of studies of runs, as SVG files: curves over pictures drawn, and of subjects also these:

| file                      | the paper's      | what                                                              |
|---------------------------|------------------|-------------------------------------------------------------------|
| `curves-training.svg`     | Fig. 2           | identity and prompt reward of training pictures                   |
| `curves-fixed.svg`        | Fig. 2           | the same of fixed prompts of held-out subjects                    |
| `tradeoff.svg`            | Figs. 1 and 6    | identity against prompt reward after training, every variant      |
| `tradeoff-TABLE.svg`      | Fig. 6           | the same of one table's rows; of a crossed table a path a column  |
| `reward-conflict.svg`     | Fig. 7           | share of conflicting samples, and beside it the correlation       |
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrl.report.align import WINDOW, smooth
from pixrl.report.charts import COLOURS, Curve, Mark, lines_chart, marks_chart, standalone
from pixrl.runs.files import write_atomic
from pixrl.runs.fuse import slug
from studies.config import BASE, CrossedTable, PersonalizeStudyConfig, RunStudyConfig
from studies.runs_tables import reward_interval

FIGURES = "figures"
_BANDS = "mean over seeds; shaded: all seeds"


def write_figures(study: RunStudyConfig, records: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """figures/*.svg; a figure that no record has anything for is left out."""
    place = out / FIGURES
    place.mkdir(exist_ok=True)
    steps, checks = f"running mean of {WINDOW} steps, {_BANDS}", _BANDS
    wanted = [
        ("group-std", "group_std", "Group standard deviation", steps),
        ("zero-std-share", "zero_std_share", "Share of groups without a signal", steps),
        ("training-diversity", "diversity", "Diversity of training groups", steps),
    ]
    for s in next(iter(study.configs().values())).rewards:  # all variants share them
        wanted.append((f"reward-{s.name}", f"fixed/{s.name}", f"{s.name} on fixed prompts", checks))
        wanted.append((f"training-{s.name}", f"reward/{s.name}/mean", f"{s.name} on training prompts", steps))
    written = []
    for file, curve, title, note in wanted:
        curves = curves_of(study.drawn(), records, curve, smoothed=note == steps)
        if curves:
            chart = lines_chart(curves, "pictures drawn", "")
            legend = [(one.css, one.label) for one in curves]
            written.append(place / f"{file}.svg")
            write_atomic(written[-1], standalone(chart, title, legend, note).encode())
    return written


def curves_of(
    variants: Sequence[str], records: Sequence[Mapping[str, Any]], name: str, smoothed: bool
) -> list[Curve]:
    """One a variant: the mean over seeds of a curve, with the range of the seeds."""
    found = []
    for place, variant in enumerate(variants):
        seeds = [record["curves"].get(name, []) for record in records if record["variant"] == variant]
        runs = [smooth([(x, y) for x, y in points]) if smoothed else points for points in seeds if points]
        band = over_seeds(runs)
        if band:
            css = f"k{place % COLOURS}"
            line = [(x, mean) for x, mean, _, _ in band]
            found.append(Curve(variant, line, css, [(x, low, high) for x, _, low, high in band]))
    return found


def over_seeds(runs: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float, float, float]]:
    """x, mean, least and greatest at every x that all runs have."""
    tables = [{point[0]: point[1] for point in run} for run in runs]
    shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    rows = ((x, [table[x] for table in tables]) for x in shared)
    return [(x, sum(values) / len(values), min(values), max(values)) for x, values in rows]


Records = Sequence[Mapping[str, Any]]
BASE_COLOUR = 7
PICTURES = "pictures drawn"
SEEDS = "mean over seeds; shaded: all seeds"
CROSSES = "mean over seeds; bars: 95 % intervals, Student's t"
INDEPENDENT = "independent rewards"


def write_personalize_figures(study: PersonalizeStudyConfig, records: Records, out: Path) -> list[Path]:
    """All of them; one that no record has anything for is left out."""
    found = {
        "curves-training": _training(study, records),
        "curves-fixed": _fixed(study, records),
        "reward-conflict": _conflict(study, records),
    }
    if len(study.names()) <= COLOURS:
        found["tradeoff"] = tradeoff(study, records, study.names(), "Identity against prompt")
    for table in study.tables:
        found[f"tradeoff-{slug(table.title)}"] = tradeoff(study, records, table.rows, table.title)
    for crossed in study.crossed:
        found[f"tradeoff-{slug(crossed.title)}"] = _crossed(study, records, crossed)
    place = out / FIGURES
    place.mkdir(exist_ok=True)
    written = []
    for name, text in found.items():
        if text is not None:
            written.append(place / f"{name}.svg")
            write_atomic(written[-1], text.encode())
    return written


def tradeoff(study: PersonalizeStudyConfig, records: Records, names: Sequence[str], title: str) -> str | None:
    """A dot a variant; None where none was measured."""
    colours = colours_of(study, names)
    marks = marks_of(study, records, {name: (name, colours[name]) for name in names})
    if not marks:
        return None
    legend = [(f"spot f{mark.colour}", mark.label) for mark in marks]
    return standalone(marks_chart(marks, *_axes(study)), title, legend, CROSSES)


def marks_of(
    study: PersonalizeStudyConfig, records: Records, wanted: Mapping[str, tuple[str, int]], caption: str = ""
) -> list[Mark]:
    """The marks of variants that were measured; `wanted`: variant -> label and colour."""
    found = []
    for name, (label, colour) in wanted.items():
        x, y = (reward_interval(records, name, reward) for reward in (study.prompt, study.identity))
        if x.count and y.count:
            found.append(Mark(label, (x.mean, x.low, x.high), (y.mean, y.low, y.high), colour, caption))
    return found


def colours_of(study: PersonalizeStudyConfig, names: Sequence[str]) -> dict[str, int]:
    """Those of the curves where a variant has one, the base grey, and what is left for the others."""
    drawn = {name: place for place, name in enumerate(study.drawn())}
    own = {name: drawn[name] for name in names if name in drawn}
    free = [colour for colour in range(COLOURS) if colour not in own.values()]
    if BASE in names and BASE_COLOUR in free:
        own[BASE] = BASE_COLOUR
        free.remove(BASE_COLOUR)
    return {name: own[name] if name in own else free.pop(0) for name in names}


def _crossed(study: PersonalizeStudyConfig, records: Records, crossed: CrossedTable) -> str | None:
    """A path a column, its dots named by their rows."""
    marks, legend = [], []
    for colour, (column, cells) in enumerate(crossed.columns.items()):
        own = [
            mark
            for row, name in cells.items()
            for mark in marks_of(study, records, {name: (f"{column}, {row}", colour)}, row)
        ]
        marks += own
        legend += [(f"spot f{colour}", column)] if own else []
    if not marks:
        return None
    chart = marks_chart(marks, *_axes(study), joined=True)
    return standalone(chart, crossed.title, legend, f"{CROSSES}; dots are named by {crossed.corner}")


def _axes(study: PersonalizeStudyConfig) -> tuple[str, str]:
    named = {"prompt": study.prompt, "identity": study.identity}
    x, y = (reward if reward == role else f"{reward} ({role})" for role, reward in named.items())
    return x, y


def _training(study: PersonalizeStudyConfig, records: Records) -> str | None:
    names = {reward: f"reward/{reward}/mean" for reward in (study.identity, study.prompt)}
    note = f"running mean of {WINDOW} steps, {SEEDS}"
    return _beside(study, records, names, "Rewards of training pictures", note, smoothed=True)


def _fixed(study: PersonalizeStudyConfig, records: Records) -> str | None:
    names = {reward: f"fixed/{reward}" for reward in (study.identity, study.prompt)}
    return _beside(
        study, records, names, "Rewards of fixed prompts of held-out subjects", SEEDS, smoothed=False
    )


def _beside(
    study: PersonalizeStudyConfig,
    records: Records,
    names: Mapping[str, str],
    title: str,
    note: str,
    *,
    smoothed: bool,
    levels: Mapping[str, float] | None = None,
) -> str | None:
    """One panel a curve of the records, side by side, each with a dotted level where `levels` has one."""
    panels: list[str] = []
    labels: dict[str, str] = {}
    for label, name in names.items():
        curves = curves_of(study.drawn(), records, name, smoothed=smoothed)
        if not curves:
            return None
        labels |= {curve.css: curve.label for curve in curves}
        if levels is not None:
            curves.append(_level(curves, levels[label]))
            labels["best"] = INDEPENDENT
        panels.append(lines_chart(curves, PICTURES, label))
    return standalone(panels, title, list(labels.items()), note)


def _level(curves: Sequence[Curve], level: float) -> Curve:
    """A straight line over the range of curves."""
    places = [x for curve in curves for x, _ in curve.values if math.isfinite(x)]
    return Curve(INDEPENDENT, [(min(places), level), (max(places), level)], "best")


def _conflict(study: PersonalizeStudyConfig, records: Records) -> str | None:
    names = {"conflict share": "conflict_share", "correlation of the advantages": "reward_correlation"}
    levels = {"conflict share": 0.5, "correlation of the advantages": 0.0}
    note = (
        f"share of samples whose two advantages have opposite signs; running mean of {WINDOW} steps, {SEEDS}"
    )
    title = "Do identity and prompt reward agree?"
    return _beside(study, records, names, title, note, smoothed=True, levels=levels)
