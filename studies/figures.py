"""The figures of studies of runs, as SVG files: curves over pictures drawn, and of subjects also these:

| file                      | the paper's      | what                                                              |
|---------------------------|------------------|-------------------------------------------------------------------|
| `curves-training.svg`     | Fig. 2           | identity and prompt reward of training pictures                   |
| `curves-fixed.svg`        | Fig. 2           | the same of fixed prompts of held-out subjects                    |
| `tradeoff.svg`            | Figs. 1 and 6    | identity against prompt reward after training, every variant      |
| `tradeoff-TABLE.svg`      | Fig. 6           | the same of one table's rows; of a crossed table a path a column  |
| `reward-conflict.svg`     | Fig. 7           | share of conflicting samples, and beside it the correlation       |
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pixrl.jobs.fuse import slug
from pixrl.report.figures import WINDOW, smooth
from pixrl.runs.files import write_atomic
from studies.config import BASE, CrossedTable, PersonalizeStudyConfig, RunStudyConfig
from studies.runs_tables import reward_interval
from studies.style import INK, PALETTE, Curve, Mark, Panel, figure, svg

FIGURES = "figures"
BASE_COLOUR = 7
SEEDS = "mean over seeds; shaded: all seeds"
CROSSES = "mean over seeds; bars: 95 % intervals, Student's t"
INDEPENDENT = "independent rewards"
Records = Sequence[Mapping[str, Any]]


def write_figures(study: RunStudyConfig, records: Records, out: Path) -> list[Path]:
    """Write figures/*.svg and return their paths; a figure that no record has anything for is left out."""
    found = curve_figures(study, records)
    if isinstance(study, PersonalizeStudyConfig):
        found |= subject_figures(study, records)
    place = out / FIGURES
    place.mkdir(exist_ok=True)
    written = {place / f"{name}.svg": made for name, made in found.items() if made is not None}
    for path, made in written.items():
        write_atomic(path, svg(made))
    return list(written)


def curve_figures(study: RunStudyConfig, records: Records) -> dict[str, Figure | None]:
    """Map file -> figure of one curve: what training logged, and every reward on training and on fixed prompts."""
    logged = {
        "group-std": ("group_std", "Group standard deviation"),
        "zero-std-share": ("zero_std_share", "Share of groups without a signal"),
        "training-diversity": ("diversity", "Diversity of training groups"),
    }
    fixed = {}
    for s in study.recipe((BASE, study.seeds[0])).rewards:  # all variants share them
        fixed[f"reward-{s.name}"] = (f"fixed/{s.name}", f"{s.name} on fixed prompts")
        logged[f"training-{s.name}"] = (f"reward/{s.name}/mean", f"{s.name} on training prompts")
    return {
        file: _curves(study, records, {"": curve}, title, smoothed=wanted is logged)
        for wanted in (logged, fixed)
        for file, (curve, title) in wanted.items()
    }


def subject_figures(study: PersonalizeStudyConfig, records: Records) -> dict[str, Figure | None]:
    """Map file -> figure of identity against prompt reward, and of whether the two agree."""
    rewards = (study.identity, study.prompt)
    training, fixed = (
        {reward: form.format(reward) for reward in rewards} for form in ("reward/{}/mean", "fixed/{}")
    )
    title = "Rewards of fixed prompts of held-out subjects"
    found = {
        "curves-training": _curves(study, records, training, "Rewards of training pictures", smoothed=True),
        "curves-fixed": _curves(study, records, fixed, title, smoothed=False),
        "reward-conflict": conflict(study, records),
    }
    if len(study.names()) <= len(PALETTE):
        found["tradeoff"] = tradeoff(study, records, study.names(), "Identity against prompt")
    for table in study.tables:
        found[f"tradeoff-{slug(table.title)}"] = tradeoff(study, records, table.rows, table.title)
    for crossed in study.crossed:
        found[f"tradeoff-{slug(crossed.title)}"] = crossed_tradeoff(study, records, crossed)
    return found


def curves_of(variants: Sequence[str], records: Records, name: str, smoothed: bool) -> list[Curve]:
    """Return the mean over seeds of a curve with the range of the seeds, for each variant that has it."""
    found = []
    for place, variant in enumerate(variants):
        seeds = [record["curves"].get(name, []) for record in records if record["variant"] == variant]
        runs = [smooth([(x, y) for x, y in points]) if smoothed else points for points in seeds if points]
        band = over_seeds(runs)
        if band:
            line = [(x, mean) for x, mean, _, _ in band]
            colour = PALETTE[place % len(PALETTE)]
            found.append(Curve(variant, line, colour, [(x, low, high) for x, _, low, high in band]))
    return found


def over_seeds(runs: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float, float, float]]:
    """Return (x, mean, least, greatest) over runs wherever all of them have a point."""
    tables = [{point[0]: point[1] for point in run} for run in runs]
    shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    rows = ((x, [table[x] for table in tables]) for x in shared)
    return [(x, sum(values) / len(values), min(values), max(values)) for x, values in rows]


def conflict(study: PersonalizeStudyConfig, records: Records) -> Figure | None:
    """Plot how often the advantages of identity and prompt reward have opposite signs, and how they correlate."""
    names = {"conflict share": "conflict_share", "correlation of the advantages": "reward_correlation"}
    levels = {"conflict share": 0.5, "correlation of the advantages": 0.0}
    note = "share of samples whose two advantages have opposite signs; "
    title = "Do identity and prompt reward agree?"
    return _curves(study, records, names, title, smoothed=True, note=note, levels=levels)


def _curves(
    study: RunStudyConfig,
    records: Records,
    names: Mapping[str, str],
    title: str,
    *,
    smoothed: bool,
    note: str = "",
    levels: Mapping[str, float] | None = None,
) -> Figure | None:
    """Plot side by side the curve `names[label]` under each label, with a dotted level where `levels` has one."""
    panels = []
    for label, name in names.items():
        curves = curves_of(study.drawn(), records, name, smoothed=smoothed)
        if not curves:
            return None
        if levels is not None:
            places = [x for curve in curves for x, _ in curve.points]
            ends = [(x, levels[label]) for x in (min(places), max(places))]
            curves.append(Curve(INDEPENDENT, ends, INK, dotted=True))
        panels.append(Panel("pictures drawn", label, curves))
    running = f"running mean of {WINDOW} steps, " if smoothed else ""
    return figure(panels, title, f"{note}{running}{SEEDS}")


def tradeoff(
    study: PersonalizeStudyConfig, records: Records, names: Sequence[str], title: str
) -> Figure | None:
    """Plot a dot with its intervals for each variant that was measured."""
    colours = colours_of(study, names)
    marks = marks_of(study, records, {name: (name, colours[name]) for name in names})
    return figure([Panel(*_axes(study), marks)], title, CROSSES) if marks else None


def crossed_tradeoff(study: PersonalizeStudyConfig, records: Records, crossed: CrossedTable) -> Figure | None:
    """Plot a path for each column with a dot for each row; the ends of the paths are named by their rows."""
    content: list[Curve | Mark] = []
    for colour, (column, cells) in enumerate(crossed.columns.items()):
        wanted = {name: (row, colour) for row, name in cells.items()}
        marks = [replace(mark, listed=False) for mark in marks_of(study, records, wanted)]
        if marks:
            content.append(Curve(column, [(mark.x[0], mark.y[0]) for mark in marks], PALETTE[colour]))
            ends = {marks[0].label, marks[-1].label}
            content += [replace(mark, caption=mark.label if mark.label in ends else "") for mark in marks]
    note = f"{CROSSES}; ends of paths: {crossed.corner}"
    return figure([Panel(*_axes(study), content)], crossed.title, note) if content else None


def marks_of(
    study: PersonalizeStudyConfig, records: Records, wanted: Mapping[str, tuple[str, int]]
) -> list[Mark]:
    """Return the marks of the variants that were measured; `wanted` has a label and the number of a colour for each."""
    found = []
    for name, (label, colour) in wanted.items():
        x, y = (reward_interval(records, name, reward) for reward in (study.prompt, study.identity))
        if x.count and y.count:
            found.append(Mark(label, (x.mean, x.low, x.high), (y.mean, y.low, y.high), PALETTE[colour]))
    return found


def colours_of(study: PersonalizeStudyConfig, names: Sequence[str]) -> dict[str, int]:
    """Number the colours: a variant with a curve has the curve's, the base grey, and others what is left."""
    drawn = {name: place for place, name in enumerate(study.drawn())}
    found = {name: drawn[name] for name in names if name in drawn}
    free = [colour for colour in range(len(PALETTE)) if colour not in found.values()]
    if BASE in names and BASE_COLOUR in free:
        found[BASE] = BASE_COLOUR
        free.remove(BASE_COLOUR)
    return {name: found[name] if name in found else free.pop(0) for name in names}


def _axes(study: PersonalizeStudyConfig) -> tuple[str, str]:
    named = {"prompt": study.prompt, "identity": study.identity}
    x, y = (reward if reward == role else f"{reward} ({role})" for role, reward in named.items())
    return x, y
