"""A run as the parts of its page: HTML made of the figures that its report has (`report/figures.py`).

Each part is made again only when what it shows has changed.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pixrl.report import figures
from pixrl.report.charts import reward_chart, sparkline
from pixrl.report.page import THUMBNAIL, inline, render
from pixrl.runs.folder import ManifestRow
from pixrl.studio.folders import RunData

LARGE = 1024
"""Longest side in pixels of a picture that was clicked on."""
AT_ONCE = 12
"""Pairs of pictures that are shown at first, and more at a click."""
IN_ORDER = "in order"
CHILDREN = 48
"""Pictures of a fusion's newest batch that are shown, at most."""
SPARK = 120
"""The newest steps that the small curves of the head show."""
LATEST = (("group_std", "group std"), ("zero_std_share", "zero-std share"), ("diversity", "diversity"))
"""The figures beside the rewards that a run's head shows."""


@dataclass(frozen=True)
class ShownPicture:
    """A picture of a run on the page: how it is asked for, and what shows it."""

    file: str
    html: Markup


class RunPage:
    """The page of one run."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Hashable, str]] = {}

    def head(self, data: RunData) -> str:
        """Return name, state, progress, the latest figures, warnings, and what the guard found."""
        changes = [] if data.shape is None or data.error else self._changes(data)
        found = [] if data.shape is None or data.error else figures.guard_findings(data.folder)
        left = data.seconds_left()
        return self._part(
            "head",
            (data.version, data.state, data.error, left),
            lambda: render(
                "studio/head.html.j2",
                {
                    "title": data.path.name if data.name == "." else data.name,
                    "state": data.state.value,
                    "what": what(data),
                    "error": data.error,
                    "done": data.done,
                    "total": data.total,
                    "unit": data.unit,
                    "left": "" if left is None else f"about {duration(left)} left",
                    "images": f"{len(data.manifest):,}",
                    "latest": latest(data),
                    "warnings": figures.warnings(changes),
                    "guard": found,
                    "failures": figures.failures(data.manifest),
                },
            ),
        )

    def rewards(self, data: RunData) -> str:
        """Return the changes of the fixed prompts, and the curves of the rewards, trained on and held out."""
        return self._part("rewards", (data.version, data.error), lambda: self._rewards(data))

    def learning(self, data: RunData) -> str:
        """Return the curves of everything else that was logged."""
        learned = data.shape is not None and data.shape.learned

        def make() -> str:
            panels = figures.panels(data.metrics, data.evaluated, learned=learned)
            return _curves("How it learns", panels)

        return "" if data.error else self._part("learning", data.version, make)

    def group(self, data: RunData) -> str:
        """Return the newest pictures of training: a group by variant and noise, or a batch of children."""
        return self._part("group", (data.version, data.error), lambda: _group(data))

    def pairs(self, data: RunData, order: str, count: int) -> str:
        """Return the pictures of the fixed prompts before and after, sorted, with their scores.

        Args:
            data: the run.
            order: one of `orders_of`.
            count: how many are shown.
        """
        key = (data.evaluations_version, data.error, order, count)

        def make() -> str:
            view: dict[str, Any] = {"run": data.name, "pairs": [], "step": 0, "shown": 0, "total": 0}
            if data.shape is not None and not data.error:
                found = figures.scored_pairs(data.folder, data.shape)
                reward, _, way = order.partition(": ")
                if way:
                    found = figures.by_change(found, reward, falls=way.startswith("most fallen"))
                shown = [_pair(data, pair) for pair in found[:count]]
                step = data.evaluated[-1]["step"] if data.evaluated else 0
                view |= {"pairs": shown, "step": step, "shown": len(shown), "total": len(found)}
            return render("studio/pairs.html.j2", view)

        return self._part("pairs", key, make)

    def _rewards(self, data: RunData) -> str:
        if data.error:
            return ""
        if data.shape is None:
            drawn = [figures.number(row.scores.get("reward")) for row in data.manifest]
            if len(drawn) < 2:
                return _curves("Rewards", [])
            chart = reward_chart(drawn, max(1, int((data.recipe or {}).get("batch", 1))))
            note = "Of every picture, the mean of a batch, and the best so far."
            return _curves("Rewards", [figures.Panel("Reward", note, Markup(chart))])
        panels = figures.reward_panels(data.shape, data.metrics, data.evaluated)
        return _curves("Rewards", panels, self._changes(data), data.evaluated)

    def _changes(self, data: RunData) -> list[figures.Change]:
        key = data.evaluations_version
        known = self._made.get("changes")
        if known is None or known[0] != key:
            assert data.shape is not None
            self._known_changes = figures.changes_of(data.folder, data.shape)
            self._made["changes"] = (key, "")
        return self._known_changes

    def _part(self, name: str, key: Hashable, make: Callable[[], str]) -> str:
        known = self._made.get(name)
        if known is None or known[0] != key:
            self._made[name] = known = (key, make())
        return known[1]


def run_list(runs: Sequence[RunData], selected: str | None) -> str:
    """Return the list of runs, each of which can be clicked on."""
    rows = [
        {
            "name": data.name,
            "title": data.path.name if data.name == "." else data.name,
            "state": data.state.value,
            "done": data.done,
            "total": data.total,
            "unit": data.unit,
        }
        for data in runs
    ]
    return render("studio/list.html.j2", {"runs": rows, "selected": selected})


def orders_of(data: RunData) -> list[str]:
    """Return the orders of a run's pairs: by how far each reward rose or fell, and as they were drawn."""
    names = [] if data.shape is None else list(data.shape.roles)
    return [*(f"{name}: {way} first" for name in names for way in ("most risen", "most fallen")), IN_ORDER]


def large(path: Path) -> str:
    """Return a picture as a data URI, up to `LARGE` pixels; an empty text where it is damaged."""
    try:
        return inline(path, LARGE)
    except (OSError, ValueError):
        return ""


def what(data: RunData) -> str:
    """Return in a few words what a run does."""
    recipe: Mapping[str, Any] = data.recipe or {}
    if data.shape is None:
        concepts = " + ".join(map(str, recipe.get("concepts", ())))
        return f"{concepts}, by {recipe.get('sampler')} on {recipe.get('model')}" if concepts else ""
    parts = f"{recipe['exploration']['kind']} exploration, {recipe['loss']['kind']} loss"
    return f"{data.kind} {recipe['model']}: {parts}, seed {recipe['seed']}"


def latest(data: RunData) -> list[tuple[str, float, Markup]]:
    """Return the newest value of each reward and of what tells how it learns, with a small curve."""
    names = [(f"reward/{name}/mean", name) for name in (data.shape.roles if data.shape is not None else ())]
    names += [
        one for one in LATEST if data.shape is not None and (data.shape.learned or one[0] == "diversity")
    ]
    if data.shape is None:
        logged = [name for row in data.metrics[-1:] for name in row if name.startswith("reward/")]
        names = [(name, name.replace("reward/", "").replace("/", " ")) for name in logged]
    found = []
    for name, label in names:
        values = [row[name] for row in data.metrics[-SPARK:] if name in row]
        if values:
            smoothed = [y for _, y in figures.smooth(list(enumerate(values)), figures.window_of(len(values)))]
            found.append((label, values[-1], Markup(sparkline(smoothed))))
    return found


def duration(seconds: float) -> str:
    """Return a length of time in words, such as 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _curves(
    heading: str,
    panels: Sequence[figures.Panel],
    changes: Sequence[figures.Change] = (),
    evaluated: Sequence[Mapping[str, Any]] = (),
) -> str:
    step = evaluated[-1]["step"] if evaluated else 0
    return render(
        "studio/curves.html.j2", {"heading": heading, "panels": panels, "changes": changes, "step": step}
    )


def _group(data: RunData) -> str:
    view: dict[str, Any] = {"run": data.name, "group": None, "children": [], "note": "", "concepts": ()}
    if data.error:
        return ""
    if data.shape is None:
        concepts = tuple(map(str, (data.recipe or {}).get("concepts", ())))
        kept = [row for row in data.manifest if row.file is not None]
        newest = [row for row in kept if row.step == kept[-1].step][:CHILDREN]
        view |= {"children": [_child(data, row, concepts) for row in newest], "concepts": concepts}
    else:
        group = figures.newest_group(data.path, data.shape, data.manifest, lambda path: _picture(data, path))
        view |= {"group": group, "note": data.shape.pictures}
    return render("studio/group.html.j2", view)


def _child(data: RunData, row: ManifestRow, concepts: Sequence[str]) -> dict[str, Any]:
    return {
        "index": row.index,
        "step": row.step,
        "image": _picture(data, data.path / str(row.file)),
        "parts": figures.parent_shares(row, concepts),
        "reward": figures.number(row.scores.get("reward")),
    }


def _pair(data: RunData, pair: figures.ScoredPair) -> dict[str, Any]:
    pictures = [_picture(data, file) for file in pair.pictures]
    scores = []
    for name, (before, after) in pair.scores.items():
        gain = pair.gain(name)
        text = "–" if math.isnan(gain) else f"{gain:+.3f}" if gain else "="
        scores.append((name, before, after, text, "up" if gain > 0 else "down" if gain < 0 else ""))
    return {
        "prompt": pair.prompt,
        "files": " ".join(one.file for one in pictures),
        "reference": pictures[0].html if pair.reference is not None else None,
        "before": pictures[-2].html,
        "after": pictures[-1].html,
        "scores": scores,
    }


def _picture(data: RunData, path: Path) -> ShownPicture:
    """Show a picture among others; a damaged one as a frame that says so."""
    file = path.relative_to(data.path).as_posix()
    try:
        shown = Markup('<img src="{}" alt="">').format(inline(path, THUMBNAIL))
    except (OSError, ValueError):
        shown = Markup('<div class="gone">damaged picture</div>')
    return ShownPicture(file, shown)
