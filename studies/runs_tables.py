"""The tables of studies of runs: budgets and tasks, and of subjects the paper's tables, conflicts and orderings."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixrl import untrusted
from pixrl.metrics.intervals import Interval, student
from pixrl.report.align import images_of, updates_of
from pixrl.runs.config import AlignConfig
from studies.config import CrossedTable, PersonalizeStudyConfig, RunStudyConfig, budget_of
from studies.tables import Grid, Records, Row, layout_of, markdown, text_table, write

GENEVAL = "geneval"
HOLDS, REVERSED, OPEN, MISSING = "holds", "reversed", "not decided", "not measured"
SPENT = {
    "images": "pictures",
    "source": "they are",
    "scores": "scores learned from",
    "gradient_terms": "gradient terms",
    "updates": "updates",
}
"""Field of a budget -> heading of its column."""
LAYOUT = layout_of("runs")
SECTIONS = LAYOUT.sections


def write_tables(study: RunStudyConfig, records: Records, out: Path) -> str:
    """Write table.md and summary.json of a study of runs; return the Markdown."""
    configs = study.configs()
    config = study.judged(next(iter(configs.values())))  # all share the rewards
    grid = Grid(
        LAYOUT,
        records,
        study.names(),
        study.differences,
        {
            "variants": len(study.variants),
            "seeds": len({int(record["seed"]) for record in records}),
            "images": images_of(config),
            "updates": updates_of(config),
            "measured": study.measuring.in_words(),
            "per_prompt": study.measuring.per_prompt,
        },
        {setting.name: "held out" if setting.held_out else "trained" for setting in config.rewards},
    )
    tasks = _tasks(records, config)
    parts = grid.markdown()
    for name, columns in tasks.items():
        rows = grid.layout.rows(records, study.names(), list(columns))
        parts += [f"### {name}, by task", markdown(rows, "variant", columns)]
    budgets = {name: budget_of(one) for name, one in configs.items()}
    spent = [[name, *(str(getattr(budget, field)) for field in SPENT)] for name, budget in budgets.items()]
    parts += ["### What a run spends", text_table(["variant", *SPENT.values()], spent)]
    summary = {
        "runs": len(records),
        "images": images_of(config),
        "updates": updates_of(config),
        "budgets": {name: asdict(budget) for name, budget in budgets.items()},
        **grid.summary([name for columns in tasks.values() for name in columns]),
    }
    if isinstance(study, PersonalizeStudyConfig):
        parts += sections(study, records)
        summary["conflict"] = LAYOUT.summary(conflict_rows(study, records))
        summary["orderings"] = [
            {**one, "difference": LAYOUT.to_json(one["difference"]) if one["difference"].count else None}
            for one in orderings(study, records)
        ]
    return write(parts, summary, out)


def _tasks(records: Records, config: AlignConfig) -> dict[str, dict[str, str]]:
    """Map reward -> figure -> task, for GenEval rewards whose prompts name tasks."""
    found: dict[str, dict[str, str]] = {}
    for setting in config.rewards:
        if setting.reward != GENEVAL:
            continue
        tasks = [task for record in records for task in record["measured"]["rewards"][setting.name]["tasks"]]
        if tasks:
            found[setting.name] = {f"reward/{setting.name}/{task}": task for task in dict.fromkeys(tasks)}
    return found


def sections(study: PersonalizeStudyConfig, records: Records) -> list[str]:
    """Return the Markdown of what a study of subjects adds: its own tables, conflict of rewards, orderings."""
    config = study.judged(next(iter(study.configs().values())))
    uses = {setting.name: "held out" if setting.held_out else "trained" for setting in config.rewards}
    titles = Grid(LAYOUT, records, (), (), {}, uses).titles(SECTIONS["rewards"])
    parts = []
    for table in study.tables:
        rows = LAYOUT.rows(records, table.rows, list(titles))
        parts += [f"### {table.title}", markdown(rows, "variant", titles)]
    for crossed in study.crossed:
        parts += [f"### {crossed.title}", crossed_table(study, crossed, records)]
    conflicts = conflict_rows(study, records)
    if conflicts:
        layout = SECTIONS["conflict"]
        parts += [f"### {layout.title}", layout.note, markdown(conflicts, "variant", layout.columns)]
    if study.orderings:
        layout = SECTIONS["orderings"]
        cells = [
            [
                f"{one['better']} > {one['worse']}",
                untrusted.markdown(one["reward"]),
                one["difference"].text(),
                one["verdict"],
                untrusted.markdown(one["paper"]),
            ]
            for one in orderings(study, records)
        ]
        parts += [f"### {layout.title}", layout.note, text_table(list(layout.columns.values()), cells)]
    return parts


def crossed_table(study: PersonalizeStudyConfig, crossed: CrossedTable, records: Records) -> str:
    """Return a table of identity and prompt reward, side by side for every column."""
    figures = (study.identity, study.prompt)
    ((_, title),) = SECTIONS["crossed"].columns.items()
    heads = [title.format(column=column, reward=figure) for column in crossed.columns for figure in figures]
    cells = [
        [
            row,
            *(
                reward_interval(records, column[row], figure).text()
                for column in crossed.columns.values()
                for figure in figures
            ),
        ]
        for row in next(iter(crossed.columns.values()))
    ]
    return text_table([crossed.corner, *heads], cells)


def reward_interval(records: Records, variant: str, reward: str) -> Interval:
    """Return a variant's reward after training with its interval over seeds."""
    return LAYOUT.mean(records, variant, f"reward/{reward}")


def conflict_rows(study: PersonalizeStudyConfig, records: Records) -> dict[str, Row]:
    """Map each variant that has them -> conflict share, correlation, and the share that the correlation alone gives."""
    found = {}
    for name in study.variants:
        own = [record for record in records if record["variant"] == name]
        correlations = [[rho for _, rho in record["curves"].get("reward_correlation", [])] for record in own]
        known = [values for values in correlations if values]
        if known:
            expected = [math.fsum(map(expected_conflict, values)) / len(values) for values in known]
            found[name] = {
                "conflict_share": LAYOUT.mean(own, name, "conflict_share"),
                "reward_correlation": LAYOUT.mean(own, name, "reward_correlation"),
                "expected_share": student(expected),
            }
    return found


def expected_conflict(correlation: float) -> float:
    """Return the share of samples of two centred normal figures with this correlation whose signs differ: arccos(ρ)/π.

    Source: Sheppard 1899, the quadrant probability of the bivariate normal distribution.
    """
    return math.acos(max(-1.0, min(1.0, correlation))) / math.pi


def orderings(study: PersonalizeStudyConfig, records: Records) -> list[dict[str, Any]]:
    """Return each ordering of the paper by each of its rewards: the paired difference, and whether it holds here."""
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
        for difference in [LAYOUT.difference(records, one.better, one.worse, f"reward/{reward}")]
    ]


def verdict(difference: Interval) -> str:
    """Say in words what an interval of better - worse means."""
    if difference.count == 0:
        return MISSING
    if not difference.excludes_zero:
        return OPEN
    return HOLDS if difference.mean > 0 else REVERSED
