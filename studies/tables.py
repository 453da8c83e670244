"""The one table maker of all studies: records to table.md and summary.json, by the layouts of tables.yaml."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pixrl import untrusted
from pixrl.config import Settings, parse_yaml
from pixrl.metrics.intervals import Interval, bootstrap, by_unit, paired, student
from pixrl.runs.files import write_atomic

LAYOUTS = Path(__file__).with_name("tables.yaml")
INTERVALS = {"bootstrap": bootstrap, "student": student}
DIFFERENCES = "Paired differences; bold where the interval excludes zero."
Records = Sequence[Mapping[str, Any]]
Row = dict[str, Interval]


class TableLayout(Settings):
    """One table: its heading, what is said above it, and its columns."""

    title: str = ""
    note: str = ""
    needs: str = ""
    """The key of the study's words without which the table is left out."""
    columns: dict[str, str]
    """Figure of the records -> heading."""
    measured: bool = False
    """Whether columns that no record has a figure for are left out."""


class StudyLayout(Settings):
    """The tables of one kind of study."""

    unit: Literal["pair", "seed"]
    """The unit that intervals are over; several records of a unit are averaged."""
    interval: Literal["bootstrap", "student"]
    minus: str
    """The word between the names of a difference in summary.json."""
    caption: str
    tables: tuple[TableLayout, ...]
    sections: dict[str, TableLayout] = Field(default_factory=dict)
    """Further tables, whose rows are worked out in code."""

    def rows(self, records: Records, variants: Sequence[str], names: Sequence[str]) -> dict[str, Row]:
        """Map variant -> figure -> mean over units with its interval."""
        return {v: {name: self.mean(records, v, name) for name in names} for v in variants}

    def mean(self, records: Records, variant: str, name: str) -> Interval:
        """Return the mean of a variant's figure over units with its interval."""
        return INTERVALS[self.interval](list(by_unit(records, variant, name, self.unit).values()))

    def difference(self, records: Records, first: str, second: str, name: str) -> Interval:
        """Return the paired difference of two variants over units."""
        return paired(records, first, second, name, self.unit, INTERVALS[self.interval])

    def to_json(self, one: Interval) -> dict[str, float | int | None]:
        """Return an interval as JSON; bounds that are not known are None."""
        low, high = (None if math.isnan(x) else x for x in (one.low, one.high))
        return {"mean": one.mean, "low": low, "high": high, f"{self.unit}s": one.count}

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        """Return rows as JSON; figures that no unit has are left out."""
        return {
            name: {figure: self.to_json(one) for figure, one in row.items() if one.count}
            for name, row in rows.items()
        }


@cache
def layout_of(name: str) -> StudyLayout:
    """Return the layout of studies of `fusions` or of `runs`."""
    return StudyLayout.model_validate(parse_yaml(LAYOUTS.read_text(encoding="utf-8"), str(LAYOUTS))[name])


class Grid:
    """The tables of variants over units that every study has."""

    def __init__(
        self,
        layout: StudyLayout,
        records: Records,
        variants: Sequence[str],
        differences: Sequence[tuple[str, str]],
        words: Mapping[str, Any],
        rewards: Mapping[str, str] | None = None,
    ) -> None:
        """Keep what the tables are made of.

        Args:
            layout: of this kind of study.
            records: one a run.
            variants: the rows.
            differences: pairs of variants.
            words: for captions and titles.
            rewards: reward -> `trained` or `held out`, for columns with {reward}.
        """
        self.layout, self.records, self.variants = layout, records, variants
        self.differences, self.words, self.rewards = differences, words, rewards or {}

    def titles(self, table: TableLayout) -> dict[str, str]:
        """Map the figures of a table's columns -> their headings."""
        known = {n for record in self.records for n, value in record["figures"].items() if value is not None}
        found: dict[str, str] = {}
        for name, title in table.columns.items():
            if "{reward}" in name:
                each = self.rewards.items()
                found |= {name.format(reward=r): title.format(reward=r, use=use) for r, use in each}
            elif not table.measured or name in known:
                found[name] = title
        return found

    def difference_rows(self, names: Sequence[str], minus: str = "−") -> dict[str, Row]:
        """Map 'first − second' -> figure -> the paired difference."""
        return {
            f"{a} {minus} {b}": {name: self.layout.difference(self.records, a, b, name) for name in names}
            for a, b in self.differences
        }

    def markdown(self) -> list[str]:
        """Return the caption and all tables with their differences."""
        parts = [self.layout.caption.format(**self.words)]
        for table in self.layout.tables:
            if table.needs and self.words.get(table.needs) is None:
                continue
            if table.title:
                parts.append(f"### {table.title.format(**self.words)}")
            titles = self.titles(table)
            parts.append(
                markdown(self.layout.rows(self.records, self.variants, list(titles)), "variant", titles)
            )
            if self.differences:
                rows = self.difference_rows(list(titles))
                parts += [DIFFERENCES, markdown(rows, "difference", titles, mark=True)]
        return parts

    def summary(self, more: Sequence[str] = ()) -> dict[str, Any]:
        """Return the numbers of all tables as JSON; `more` figures are added for the variants alone."""
        names = [name for table in self.layout.tables for name in self.titles(table)]
        rows = self.layout.rows(self.records, self.variants, [*names, *more])
        return {
            "variants": self.layout.summary(rows),
            "differences": self.layout.summary(self.difference_rows(names, self.layout.minus)),
        }


def markdown(rows: Mapping[str, Row], corner: str, titles: Mapping[str, str], mark: bool = False) -> str:
    """Return a Markdown table of intervals; with `mark`, values whose interval excludes zero are bold."""
    cells = [
        [name, *(f"**{x.text()}**" if mark and x.excludes_zero else x.text() for x in row.values())]
        for name, row in rows.items()
    ]
    return text_table([corner, *titles.values()], cells)


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; its headings and its first column may be anybody's words."""
    lines = [f"| {' | '.join(map(untrusted.markdown, heads))} |", f"|---|{'---|' * (len(heads) - 1)}"]
    lines += [f"| {' | '.join([untrusted.markdown(first), *rest])} |" for first, *rest in rows]
    return "\n".join(lines)


def write(parts: Sequence[str], summary: Mapping[str, Any], out: Path) -> str:
    """Write table.md and summary.json; return the Markdown."""
    text = "\n\n".join(parts) + "\n"
    write_atomic(out / "table.md", text.encode())
    write_atomic(out / "summary.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return text
