"""A study's results as files: one page, and tables for other programs."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixrl.human_study.results import Ballot, People, Results
from pixrl.human_study.study import TIE, Folder
from pixrl.metrics.intervals import Interval
from pixrl.report.page import FULL, inline, render
from pixrl.runs.files import write_atomic

PAGE, FIGURES, VOTES_TABLE = "results.html", "results.csv", "votes.csv"
EXAMPLES = 4
"""Comparisons that the page shows, those that people agree on most."""


def write(folder: Folder, results: Results, out: Path) -> None:
    """Write results.html, results.csv and votes.csv into `out`; none holds a participant's token."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / FIGURES, _csv(_figures(results)))
    write_atomic(out / VOTES_TABLE, _csv(_votes(folder, results)))
    write_atomic(out / PAGE, page(folder, results).encode())


def lines(results: Results) -> list[str]:
    """Return the results as lines for a terminal."""
    found = [people_sentence(results.people)]
    for one in results.criteria:
        found.append(f"{one.criterion}: {one.votes} votes, {one.ties} ties, alpha {_number(one.alpha)}")
        found += [
            f"  {standing.system}: wins {standing.win_rate.text()}, strength {standing.strength.text(2)}"
            for standing in one.standings
        ]
        found += [
            f"  {row.reward}: Pearson {row.pearson.text(2)}, Spearman {row.spearman.text(2)}, "
            f"agrees with {row.agreement.text()} of choices"
            for row in one.correlations
        ]
    return found


def people_sentence(people: People) -> str:
    """Say who is counted."""
    voted = len(people.kept) + len(people.failed) + len(people.unchecked)
    text = f"{voted} of {people.invited} participants voted; {len(people.kept)} are counted"
    out = [f"{len(people.failed)} failed attention checks"] if people.failed else []
    out += [f"{len(people.unchecked)} answered no attention check yet"] if people.unchecked else []
    return f"{text} ({', '.join(out)})." if out else f"{text}."


def page(folder: Folder, results: Results) -> str:
    """Return the results as one self-contained page."""
    study = folder.study
    strengths = [
        x
        for one in results.criteria
        for s in one.standings
        for x in (s.strength.low, s.strength.high, s.strength.mean)
        if math.isfinite(x)
    ]
    reach = max([1.0, *map(abs, strengths)])
    shown = [len(one) for one in study.sets]
    systems = list(study.systems)
    criteria = [
        {
            "name": one.criterion,
            "question": one.question,
            "votes": one.votes,
            "ties": one.ties,
            "alpha": one.alpha,
            "first": one.first_place,
            "rows": [
                {
                    "system": s.system,
                    "colour": systems.index(s.system) % 9,
                    "rate": s.win_rate,
                    "rate_bar": _bar(s.win_rate, 0.0, 1.0),
                    "strength": s.strength,
                    "strength_bar": _bar(s.strength, -reach, reach),
                }
                for s in one.standings
            ],
            "correlations": sorted(  # those without a figure come last
                one.correlations, key=lambda row: 2.0 if math.isnan(row.spearman.mean) else -row.spearman.mean
            ),
        }
        for one in results.criteria
    ]
    view: dict[str, Any] = {
        "title": study.settings.title,
        "design": "pairs" if shown[0] == 2 else f"the best of {shown[0]}",
        "prompts": len({item.prompt for item in study.items}),
        "pictures": len(study.pictures),
        "people": people_sentence(results.people),
        "chance": 1 / shown[0],
        "criteria": criteria,
        "examples": _examples(folder, results),
        "date": None,
    }
    return render("human_study.html.j2", view)


def _bar(interval: Interval, low: float, high: float) -> dict[str, float]:
    """Return where an interval begins, how wide it is and where its mean lies, in percent of an axis."""

    def place(x: float) -> float:
        return 100 * (min(max(x, low), high) - low) / (high - low)

    known = math.isfinite(interval.low)
    start = place(interval.low if known else interval.mean)
    return {
        "start": start,
        "width": place(interval.high if known else interval.mean) - start,
        "mean": place(interval.mean),
    }


def _examples(folder: Folder, results: Results) -> list[dict[str, Any]]:
    """Return the comparisons of the last criterion with most votes for one picture, a prompt once."""
    if not results.criteria:
        return []
    kept, last = set(results.people.kept), results.criteria[-1].criterion
    found: dict[tuple[str, ...], list[str]] = {}
    for answer in results.answers:
        if answer.check is None and answer.criterion == last and answer.participant in kept:
            found.setdefault(tuple(sorted(answer.pictures)), []).append(answer.choice)
    pictures, items = folder.study.pictures, folder.study.items

    def lead(choices: Sequence[str]) -> tuple[float, int]:
        top = max(choices.count(name) for name in choices if name != TIE) if set(choices) - {TIE} else 0
        return top - len(choices) / 2, top

    shown: dict[str, dict[str, Any]] = {}
    for names, choices in sorted(found.items(), key=lambda one: lead(one[1]), reverse=True):
        prompt = items[pictures[names[0]].item].prompt
        if prompt in shown or not all(folder.file_of(name).is_file() for name in names):
            continue
        ranked = sorted(names, key=lambda name: (-choices.count(name), pictures[name].system))
        shown[prompt] = {
            "prompt": prompt,
            "pictures": [
                {
                    "image": inline(folder.file_of(name), FULL // 2),
                    "system": pictures[name].system,
                    "votes": choices.count(name),
                    "best": n == 0,
                }
                for n, name in enumerate(ranked)
            ],
        }
        if len(shown) == EXAMPLES:
            break
    return list(shown.values())


def _csv(rows: Sequence[Sequence[object]]) -> bytes:
    def cell(x: object) -> object:  # what a spreadsheet would take for a formula begins with an apostrophe
        if isinstance(x, float):
            return "" if math.isnan(x) else repr(x)
        return f"'{x}" if isinstance(x, str) and x[:1] in ("=", "+", "-", "@") else x

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([[cell(x) for x in row] for row in rows])
    return buffer.getvalue().encode()


def _figures(results: Results) -> list[list[object]]:
    rows: list[list[object]] = [["criterion", "figure", "of", "mean", "low", "high", "count"]]

    def add(criterion: str, figure: str, of: str, x: Interval) -> None:
        rows.append([criterion, figure, of, x.mean, x.low, x.high, x.count])

    for one in results.criteria:
        for standing in one.standings:
            add(one.criterion, "win_rate", standing.system, standing.win_rate)
            add(one.criterion, "strength", standing.system, standing.strength)
        rows.append([one.criterion, "alpha", "", one.alpha, "", "", one.votes])
        rows.append([one.criterion, "first_place", "", one.first_place, "", "", one.votes - one.ties])
        for row in one.correlations:
            add(one.criterion, "pearson", row.reward, row.pearson)
            add(one.criterion, "spearman", row.reward, row.spearman)
            add(one.criterion, "agreement", row.reward, row.agreement)
    return rows


def _votes(folder: Folder, results: Results) -> list[list[object]]:
    study, kept = folder.study, set(results.people.kept)
    head = ["participant", "counted", "check", "prompt", "criterion", "shown", "chosen", "seconds"]
    of = {name: picture.system for name, picture in study.pictures.items()}
    of |= {name: f"{of[original]} (spoilt)" for name, original in study.spoilt.items()}

    def row(answer: Ballot) -> list[object]:
        seconds = math.nan if answer.seconds is None else answer.seconds
        return [
            answer.participant + 1,
            int(answer.participant in kept),
            int(answer.check is not None),
            study.items[answer.item].prompt,
            answer.criterion,
            " | ".join(of[name] for name in answer.pictures),
            of.get(answer.choice, TIE),
            seconds,
        ]

    return [list(head), *map(row, results.answers)]


def _number(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.2f}"
