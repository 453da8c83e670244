"""The figures of an align study, as SVG files: rewards, group std and zero-std share over pictures drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrl.report.align import WINDOW, smooth
from pixrl.report.charts import COLOURS, Curve, lines_chart, standalone
from pixrl.runs.files import write_atomic
from pixrl.studies.align_config import RunStudyConfig

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
