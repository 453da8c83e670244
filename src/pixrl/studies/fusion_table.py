"""The tables of a study, as Markdown and JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrl import untrusted
from pixrl.metrics.intervals import Interval, Intervals, bootstrap, by_unit, paired
from pixrl.runs.files import write_atomic

COLUMNS = {
    "reward": "reward ↑",
    "late_reward": "reward, last quarter ↑",
    "similarity": "avg. similarity ↑",
    "balance": "balance ↓",
    "candidate_rate": "candidate rate ↑",
    "best_total": "best ΣS ↑",
    "best_reward": "best reward ↑",
    "selected_reward": "selected: reward ↑",
    "selected_similarity": "selected: similarity ↑",
    "selected_balance": "selected: balance ↓",
}
HELDOUT = ("reward", "late_reward", "similarity", "balance", "candidate_rate", "best_total", "selected_reward",
           "selected_similarity", "selected_balance")  # fmt: skip
NOTE = (
    "Mean over pairs [95 % interval]. Seeds are averaged within a pair; intervals are percentile bootstraps over "
    "pairs (10,000 resamples). 'reward' to 'best reward' are of all pictures of a run; 'selected' is of the one "
    "picture that the two-stage selection takes first, or of the best reward where none qualifies."
)


def write_tables(
    study: Mapping[str, Any], records: Sequence[Mapping[str, Any]], out: Path, calibration: Mapping[str, Any]
) -> str:
    """Writes table.md and summary.json; returns the Markdown."""
    variants = list(study["variants"])
    pairs = sorted({str(record["pair"]) for record in records})
    seeds = sorted({int(record["seed"]) for record in records})
    parts = [
        f"{len(pairs)} pairs × {len(seeds)} seeds × {len(variants)} variants, {len(records)} runs. {NOTE}",
        "### By the reward's encoder",
        markdown(rows_of(records, variants, list(COLUMNS)), "variant", COLUMNS),
        *_differences(study, records, list(COLUMNS), COLUMNS),
    ]
    held = [f"heldout_{name}" for name in HELDOUT]
    if study["heldout"] is not None:
        titles = {f"heldout_{name}": COLUMNS[name] for name in HELDOUT}
        parts += [
            f"### By {study['heldout']}, which was not the reward",
            markdown(rows_of(records, variants, held), "variant", titles),
            *_differences(study, records, held, titles),
        ]
    text = "\n\n".join(parts) + "\n"
    write_atomic(out / "table.md", text.encode())
    summary = _summary(study, records, [*COLUMNS, *held]) | {"calibration": calibration}
    write_atomic(out / "summary.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return text


def rows_of(
    records: Sequence[Mapping[str, Any]],
    variants: Sequence[str],
    names: Sequence[str],
    unit: str = "pair",
    interval: Intervals = bootstrap,
) -> dict[str, dict[str, Interval]]:
    """Variant -> figure -> mean over units with its interval."""
    return {
        variant: {name: interval(list(by_unit(records, variant, name, unit).values())) for name in names}
        for variant in variants
    }


def differences_of(
    records: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    unit: str = "pair",
    interval: Intervals = bootstrap,
) -> dict[str, dict[str, Interval]]:
    """'first − second' -> figure -> mean of the paired difference over units with its interval."""
    return {
        f"{first} − {second}": {name: paired(records, first, second, name, unit, interval) for name in names}
        for first, second in pairs
    }


def summary_of(rows: Mapping[str, Mapping[str, Interval]], unit: str = "pair") -> dict[str, Any]:
    """The same as JSON; figures that no unit has are left out, and so are bounds that are not known."""
    return {
        name: {figure: _to_json(one, unit) for figure, one in row.items() if one.count}
        for name, row in rows.items()
    }


def _to_json(one: Interval, unit: str) -> dict[str, float | int | None]:
    low, high = (None if math.isnan(x) else x for x in (one.low, one.high))
    return {"mean": one.mean, "low": low, "high": high, f"{unit}s": one.count}


def markdown(
    rows: Mapping[str, Mapping[str, Interval]], corner: str, titles: Mapping[str, str], mark: bool = False
) -> str:
    """A table; with `mark`, values whose interval excludes zero are bold."""
    lines = [
        f"| {corner} | {' | '.join(map(untrusted.markdown, titles.values()))} |",
        f"|---|{'---|' * len(titles)}",
    ]
    for name, row in rows.items():
        cells = [
            f"**{cell.text()}**" if mark and cell.excludes_zero else cell.text() for cell in row.values()
        ]
        lines.append(f"| {untrusted.markdown(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(
    study: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    names: list[str],
    titles: Mapping[str, str],
) -> list[str]:
    rows = differences_of(records, study["differences"], names)
    if not rows:
        return []
    return [
        "Paired differences; bold where the interval excludes zero.",
        markdown(rows, "difference", titles, True),
    ]


def _summary(
    study: Mapping[str, Any], records: Sequence[Mapping[str, Any]], names: list[str]
) -> dict[str, Any]:
    differences = {
        f"{a} - {b}": row
        for (a, b), row in zip(
            study["differences"],
            differences_of(records, study["differences"], names).values(),
            strict=True,
        )
    }
    return {
        "runs": len(records),
        "seconds_per_run": sum(float(r["seconds"]) for r in records) / max(1, len(records)),
        "variants": summary_of(rows_of(records, list(study["variants"]), names)),
        "differences": summary_of(differences),
    }
