"""What a study of personalizations adds to the tables: the paper's own, conflict of rewards, which orderings hold."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pixrl import untrusted
from pixrl.metrics.intervals import Interval, by_unit, paired, student
from pixrl.studies.align_table import UNIT, reward_titles
from pixrl.studies.fusion_table import markdown, rows_of
from pixrl.studies.personalize_config import CrossedTable, PersonalizeStudyConfig, Table

Records = Sequence[Mapping[str, Any]]
HOLDS, REVERSED, OPEN, MISSING = "holds", "reversed", "not decided", "not measured"
CONFLICT_NOTE = (
    "Conflict share: samples whose two advantages have opposite signs. It follows from the correlation ρ of the "
    "advantages: normal ones with that ρ conflict in arccos(ρ)/π of the samples, which is 50 % for ρ = 0. Means over "
    "training and seeds; of methods that train on their own pictures."
)
ORDERINGS_NOTE = (
    "Orderings of the paper, by paired differences over seeds (better − worse): an ordering holds, or is reversed, "
    "where the 95 % interval excludes zero. Of twenty pairs without a difference one is decided so by chance."
)


def sections(study: PersonalizeStudyConfig, records: Records) -> list[str]:
    """Markdown of everything that this module adds."""
    titles = reward_titles(study.judged(next(iter(study.configs().values()))))
    parts = []
    for table in study.tables:
        parts += [f"### {table.title}", paper_table(table, records, titles)]
    for crossed in study.crossed:
        parts += [f"### {crossed.title}", crossed_table(study, crossed, records)]
    conflicts = conflict_rows(study, records)
    if conflicts:
        parts += ["### Conflict of rewards", CONFLICT_NOTE, _conflict_table(conflicts)]
    if study.orderings:
        parts += ["### Orderings", ORDERINGS_NOTE, _orderings_table(orderings(study, records))]
    return parts


def paper_table(table: Table, records: Records, titles: Mapping[str, str]) -> str:
    """The rewards of its rows."""
    return markdown(rows_of(records, table.rows, list(titles), UNIT, student), "variant", titles)


def crossed_table(study: PersonalizeStudyConfig, crossed: CrossedTable, records: Records) -> str:
    """Identity and prompt reward, side by side for every column."""
    figures = (study.identity, study.prompt)
    heads = [f"{column}: {figure} ↑" for column in crossed.columns for figure in figures]
    head = " | ".join(map(untrusted.markdown, (crossed.corner, *heads)))
    lines = [f"| {head} |", f"|---|{'---|' * len(heads)}"]
    for row in next(iter(crossed.columns.values())):
        cells = [
            interval_of(records, cells[row], figure).text()
            for cells in crossed.columns.values()
            for figure in figures
        ]
        lines.append(f"| {untrusted.markdown(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval_of(records: Records, variant: str, reward: str) -> Interval:
    """A reward of a variant after training, over seeds."""
    return student(list(by_unit(records, variant, f"reward/{reward}", UNIT).values()))


def conflict_rows(study: PersonalizeStudyConfig, records: Records) -> dict[str, dict[str, Interval]]:
    """Variant -> share, correlation and the share that the correlation alone gives; those that have them."""
    found = {}
    for name in study.variants:
        own = [record for record in records if record["variant"] == name]
        correlations = [[rho for _, rho in record["curves"].get("reward_correlation", [])] for record in own]
        known = [values for values in correlations if values]
        if known:
            found[name] = {
                "conflict_share": student(list(by_unit(own, name, "conflict_share", UNIT).values())),
                "reward_correlation": student(list(by_unit(own, name, "reward_correlation", UNIT).values())),
                "expected_share": student([math.fsum(map(expected_conflict, v)) / len(v) for v in known]),
            }
    return found


def expected_conflict(correlation: float) -> float:
    """Share of samples of two centred normal figures with this correlation whose signs differ: arccos(ρ)/π.

    Source: Sheppard 1899, the quadrant probability of the bivariate normal distribution.
    """
    return math.acos(max(-1.0, min(1.0, correlation))) / math.pi


def _conflict_table(rows: Mapping[str, Mapping[str, Interval]]) -> str:
    titles = {
        "conflict_share": "conflict share",
        "reward_correlation": "correlation ρ",
        "expected_share": "arccos(ρ)/π",
    }
    return markdown(rows, "variant", titles)


def orderings(study: PersonalizeStudyConfig, records: Records) -> list[dict[str, Any]]:
    """Each ordering of the paper by each of its rewards: the paired difference, and whether it holds here."""
    return [
        {
            "better": one.better,
            "worse": one.worse,
            "reward": reward,
            "paper": one.paper,
            "difference": difference,
            "verdict": verdict(difference),
        }
        for one in study.orderings
        for reward in one.rewards
        for difference in [paired(records, one.better, one.worse, f"reward/{reward}", UNIT, student)]
    ]


def verdict(difference: Interval) -> str:
    """What an interval of better - worse says."""
    if difference.count == 0:
        return MISSING
    if not difference.excludes_zero:
        return OPEN
    return HOLDS if difference.mean > 0 else REVERSED


def _orderings_table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| ordering | by | difference | here | the paper |", "|---|---|---|---|---|"]
    for one in found:
        names = (f"{one['better']} > {one['worse']}", one["reward"], one["paper"])
        order, reward, paper = map(untrusted.markdown, names)
        lines.append(f"| {order} | {reward} | {one['difference'].text()} | {one['verdict']} | {paper} |")
    return "\n".join(lines)
