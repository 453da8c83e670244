"""The tables of an align study, as Markdown and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixrl.metrics.intervals import student
from pixrl.report.describe import images_of, updates_of
from pixrl.runs.config import AlignConfig
from pixrl.runs.files import write_atomic
from pixrl.studies.align_config import RunStudyConfig
from pixrl.studies.budget import budget_of, budget_table
from pixrl.studies.fusion_table import differences_of, markdown, rows_of, summary_of

UNIT = "seed"
GENEVAL = "geneval"
AFTER = {"diversity": "diversity ↑", "layouts": "layouts ↑"}
DURING = {
    "group_std": "group std",
    "group_std/end": "group std, last quarter",
    "zero_std_share": "zero-std share ↓",
    "zero_std_share/end": "zero-std share, last quarter ↓",
    "minutes": "minutes",
}
NOTE = (
    "Mean over seeds [95 % interval]: Student's t over seeds. The seed is what training is repeated with; prompts and "
    "evaluation noise are the same for every variant of a seed, and a bootstrap of so few seeds would come out far too "
    "narrow. Differences are paired by seed. Rewards, diversity and layouts are of held-out prompts after training; "
    "group std and zero-std share are of training itself, where its pictures are the trained model's own. Minutes are "
    "of training alone: collect, score, update."
)


def write_tables(
    study: RunStudyConfig,
    records: Sequence[Mapping[str, Any]],
    out: Path,
    sections: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> str:
    """Writes table.md and summary.json; returns the Markdown.

    Args:
        study: what was compared.
        records: one a run.
        out: the study's folder.
        sections: further Markdown, behind the tables that every study has.
        more: further entries of summary.json.
    """
    configs = study.configs()
    config = study.judged(next(iter(configs.values())))  # all share the rewards
    titles = {**reward_titles(config), **_measured(records, {**AFTER, **DURING})}
    tasks = _tasks(records, config)
    parts = [
        f"{_sizes(study, config, records)} {NOTE}",
        markdown(rows_of(records, study.names(), list(titles), UNIT, student), "variant", titles),
    ]
    differences = differences_of(records, study.differences, list(titles), UNIT, student)
    if differences:
        parts += [
            "Paired differences; bold where the interval excludes zero.",
            markdown(differences, "difference", titles, True),
        ]
    for name, columns in tasks.items():
        rows = rows_of(records, study.names(), list(columns), UNIT, student)
        parts += [f"### {name}, by task", markdown(rows, "variant", columns)]
    parts += ["### What a run spends", budget_table(configs), *sections]
    text = "\n\n".join(parts) + "\n"
    write_atomic(out / "table.md", text.encode())
    everything = [*titles, *(name for columns in tasks.values() for name in columns)]
    summary = {
        "runs": len(records),
        "images": images_of(config),
        "updates": updates_of(config),
        "budgets": {name: asdict(budget_of(one)) for name, one in configs.items()},
        "variants": summary_of(rows_of(records, study.names(), everything, UNIT, student), UNIT),
        "differences": summary_of(differences, UNIT),
        **(more or {}),
    }
    write_atomic(out / "summary.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return text


def _measured(records: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> dict[str, str]:
    """The columns that any run has a figure for; there are no layouts without a segmenter."""
    known = {name for record in records for name, value in record["figures"].items() if value is not None}
    return {name: title for name, title in titles.items() if name in known}


def _sizes(study: RunStudyConfig, config: AlignConfig, records: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({int(record["seed"]) for record in records})
    return (
        f"{len(study.variants)} variants × {len(seeds)} seed(s), {images_of(config)} images and {updates_of(config)} "
        f"updates a run; measured on {study.measuring.in_words()} × {study.measuring.per_prompt} pictures."
    )


def reward_titles(config: AlignConfig) -> dict[str, str]:
    """The column of each reward: `identity, trained ↑`."""
    return {
        f"reward/{s.name}": f"{s.name}, {'held out' if s.held_out else 'trained'} ↑" for s in config.rewards
    }


def _tasks(records: Sequence[Mapping[str, Any]], config: AlignConfig) -> dict[str, dict[str, str]]:
    """Reward -> figure -> task, for GenEval rewards whose prompts name tasks."""
    found: dict[str, dict[str, str]] = {}
    for setting in config.rewards:
        if setting.reward != GENEVAL:
            continue
        tasks = [task for record in records for task in record["measured"]["rewards"][setting.name]["tasks"]]
        if tasks:
            found[setting.name] = {f"reward/{setting.name}/{task}": task for task in dict.fromkeys(tasks)}
    return found
