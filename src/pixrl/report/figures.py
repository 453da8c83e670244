"""The figures of an alignment, finished or not, as its report and the studio show them: read from its folder, no torch.

What the run changed on the prompts of its evaluation (`changes_of`: every figure before and after, and how much of it
is chance), pictures before and after, the newest group, and charts of what was logged (`panels`).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from markupsafe import Markup

from pixrl.metrics.intervals import Interval, bootstrap, gains_by_prompt
from pixrl.report.charts import Curve, lines_chart
from pixrl.runs.folder import ManifestRow, RunFolder
from pixrl.runs.reading import (
    HELD_OUT,
    MEASURED,
    SIMILARITY,
    TRAINED,
    RunShape,
    base_and_last,
    before_and_after,
    evaluated_places,
    read_findings,
    sample_scores,
    step_of_place,
)

SHOWN = 32
"""Number of pairs in the gallery."""
MOST_RISEN, MOST_FALLEN = 6, 2
"""Number of pairs shown because a reward rose or fell most."""


WINDOW = 9
"""Steps of the running mean that is drawn over noisy figures, in runs that are long enough."""


SHARE = 5
"""The running mean covers at most one in so many of a run's steps."""


FALL = 0.005
"""A reward that fell by less, as a share of its size before, is not pointed out."""


KEPT = 0.8
"""Diversity below this share of the base's is pointed out."""


Rows = Sequence[Mapping[str, Any]]
P = TypeVar("P")
"""What shows a picture: a data URI in reports, which need nothing but themselves."""


@dataclass(frozen=True)
class Cell(Generic[P]):
    """One picture of a group and its reward."""

    image: P
    """What `show` made of its file."""
    caption: str


@dataclass(frozen=True)
class ShownGroup(Generic[P]):
    """A training group: rows are semantic variants of the prompt, columns are noises."""

    step: int
    prompt: str
    reward: str
    columns: int
    rows: tuple[tuple[str, tuple[Cell[P], ...]], ...]


@dataclass(frozen=True)
class Panel:
    """One chart with its heading and a note."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class PanelSpec:
    """The content of a panel: figures of metrics.jsonl by name, each with its legend."""

    title: str
    note: str
    names: Mapping[str, str]
    smooth: bool = False
    signal: bool = False
    """Whether the figure describes what advantages are made from, which a run that learns from no score has not."""

    def panel(self, metrics: Rows) -> Panel | None:
        """Return the panel; None where nothing was logged for it, or nothing failed."""
        found = {label: _points(metrics, name) for name, label in self.names.items()}
        curves = [
            Curve(label, points, css)
            for (label, points), css in zip(found.items(), ("mean", "k0"), strict=False)
            if points
        ]
        window = window_of(max((len(curve.values) for curve in curves), default=0))
        if self.smooth and window > 1:
            faint = [Curve("each step", curve.values, "faint") for curve in curves]
            curves = [*faint, *(Curve(f"mean of {window}", _smoothed(c.values), "mean") for c in curves)]
        idle = all(y == 0 for curve in curves for _, y in curve.values)
        if not curves or (idle and self.title == "Failed scores"):
            return None
        positive = all(y >= 0 for curve in curves for _, y in curve.values)
        floor = 0.0 if positive else -math.inf
        return Panel(
            self.title,
            self.note,
            Markup(lines_chart(curves, "step", "", legend=len(curves) > 1, floor=floor)),
        )


SPECS = (
    PanelSpec("Group standard deviation", "Of the rewards within a group: the learning signal.",
              {"group_std": "group std"}, smooth=True, signal=True),
    PanelSpec("Groups without a signal", "Share of groups whose rewards are all equal; they teach nothing.",
              {"zero_std_share": "zero-std share"}, smooth=True, signal=True),
    PanelSpec("Do the rewards agree?", "Samples whose two advantages have opposite signs (half of them where rewards "
              "are independent), and the correlation of the advantages.",
              {"conflict_share": "conflict share", "reward_correlation": "correlation"}, signal=True),
    PanelSpec("Mean advantage", "What shaping adds to all samples alike.", {"advantage_mean": "mean"}, signal=True),
    PanelSpec("Pairs told apart", "Share of preference pairs whose winner the trained policy prefers.",
              {"pair_accuracy": "accuracy"}),
    PanelSpec("Clipped share", "Of ratios outside the trusted range.", {"clip_share": "clipped"}),
    PanelSpec("KL to the reference", "How far the trained policy has moved.", {"kl": "KL"}),
    PanelSpec("Distance to the old policy", "Mean square of the difference of velocities.",
              {"old_distance": "distance"}),
    PanelSpec("Gradient norm", "Before clipping.", {"grad_norm": "norm"}),
    PanelSpec("Perturbations", "Cosine of variants to the prompt and to each other.",
              {"anchor_cosine": "to the prompt", "pairwise_cosine": "to each other"}),
    PanelSpec("Failed scores", "Share of a step's pictures.", {"failed_share": "failed"}),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One figure of the evaluation's prompts, before and after training."""

    name: str
    role: str
    before: float
    after: float
    interval: Interval | None = None
    """95 % interval of the gain over prompts; None where it is not known."""

    @property
    def gain(self) -> float:
        """The figure after minus the figure before."""
        return self.after - self.before

    @property
    def is_decided(self) -> bool:
        """Whether another choice of such prompts would leave the direction as it is, as far as is known."""
        return self.interval is None or self.interval.excludes_zero

    @property
    def fell(self) -> bool:
        """Whether the figure fell by enough to be pointed out."""
        return self.is_decided and self.gain < -FALL * abs(self.before)

    @property
    def css(self) -> str:
        """The class of the gain in the style sheet: `up` or `down` where it is known to have moved, else empty."""
        if self.interval is None or not self.interval.excludes_zero:
            return ""
        return "up" if self.gain > 0 else "down"

    def gain_text(self) -> str:
        """Return the gain with its interval, such as `+0.030 [0.012, 0.049]`."""
        if math.isnan(self.gain):
            return "–"
        bounds = "" if self.interval is None else f" [{self.interval.low:+.3f}, {self.interval.high:+.3f}]"
        return f"{self.gain:+.3f}{bounds}"


@dataclass(frozen=True)
class ParentShare:
    """The part of one concept in a picture of a fusion."""

    concept: str
    similarity: float
    percent: float
    bar: float
    """Width of its bar: the shares cut at 0 and scaled to sum to 100."""


def parent_shares(row: ManifestRow, concepts: Sequence[str]) -> tuple[ParentShare, ...]:
    """Return each concept's similarity to a picture of a fusion, and its share of the mixing coefficients."""
    summary = row.extra.get("coefficients", {"share": {}})
    shares = [100 * summary["share"].get(concept, math.nan) for concept in concepts]
    bars = [max(share, 0.0) if math.isfinite(share) else 0.0 for share in shares]
    whole = sum(bars) or 1.0
    return tuple(
        ParentShare(concept, number(row.scores.get(f"{SIMILARITY}{concept}")), share, 100 * bar / whole)
        for concept, share, bar in zip(concepts, shares, bars, strict=True)
    )


@dataclass(frozen=True)
class ScoredPair:
    """One prompt and noise before and after training: its pictures' files, and its scores where they were kept."""

    number: int
    prompt: str
    seed: int
    before: Path
    after: Path
    reference: Path | None
    scores: Mapping[str, tuple[float, float]]
    """Reward -> score before and after, nan where there is none."""

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The reference if there is one, the picture before and the picture after."""
        return (*([] if self.reference is None else [self.reference]), self.before, self.after)

    def gain(self, reward: str) -> float:
        """Return the score after minus the score before; nan where one is not known."""
        before, after = self.scores.get(reward, (math.nan, math.nan))
        return after - before


def scored_pairs(folder: RunFolder, shape: RunShape) -> list[ScoredPair]:
    """Return the evaluation's pictures of the base and of the newest evaluated weights, with their scores."""
    steps = [row["step"] for row in base_and_last(folder)]
    sides = [sample_scores(folder, step) for step in steps]

    def score(side: Mapping[str, Sequence[float | None]], name: str, at: int) -> float:
        values = side.get(name, ())
        return number(values[at]) if at < len(values) else math.nan

    found = []
    for entry, before, after in before_and_after(folder):
        at = entry["number"]
        scores = {name: (score(sides[0], name, at), score(sides[1], name, at)) for name in shape.roles}
        reference = folder.path / entry["reference"] if "reference" in entry else None
        found.append(ScoredPair(at, entry["prompt"], entry["seed"], before, after, reference, scores))
    return found


def by_change(pairs: Sequence[ScoredPair], reward: str, *, falls: bool = False) -> list[ScoredPair]:
    """Sort pairs by how far a reward rose, or fell; those without both scores come last, in their order."""
    known = [pair for pair in pairs if not math.isnan(pair.gain(reward))]
    rest = [pair for pair in pairs if math.isnan(pair.gain(reward))]
    return [*sorted(known, key=lambda pair: pair.gain(reward), reverse=not falls), *rest]


@dataclass(frozen=True)
class Movement:
    """How many of the pictures that were kept rose and fell by a reward, and those that did most."""

    reward: str
    rose: int
    fell: int
    same: int
    most: tuple[ScoredPair, ...]
    """Those that rose most, then those that fell most."""


def movement(pairs: Sequence[ScoredPair], reward: str) -> Movement | None:
    """Return what a reward did to the pictures that were kept; None where it is known of none, or changed none."""
    gains = [pair.gain(reward) for pair in pairs if not math.isnan(pair.gain(reward))]
    rose, fell = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    if not rose + fell:
        return None
    most = by_change(pairs, reward)[: min(rose, MOST_RISEN)]
    most += by_change(pairs, reward, falls=True)[: min(fell, MOST_FALLEN)]
    return Movement(reward, rose, fell, len(gains) - rose - fell, tuple(most))


def first_trained(shape: RunShape) -> str:
    """Return the first reward that is trained."""
    return next(name for name, role in shape.roles.items() if role != HELD_OUT)


def newest_group(
    run: Path, shape: RunShape, manifest: Sequence[ManifestRow], show: Callable[[Path], P]
) -> ShownGroup[P] | None:
    """Return the first whole group of the newest step whose pictures were kept; None where there is none.

    `show` makes of a picture's file what the page shows.
    """
    size, noises = shape.group_size, shape.noises
    kept = [row for row in manifest if row.file is not None]
    newest = [row for row in kept if row.step == kept[-1].step][:size]
    if len(newest) < size:
        return None
    reward = first_trained(shape)
    scores = [row.scores.get(reward) for row in newest]
    cells = [
        Cell(show(run / str(row.file)), "–" if score is None else f"{score:.3f}")
        for row, score in zip(newest, scores, strict=True)
    ]
    rows = tuple(
        ("the prompt itself" if newest[at].variant == 0 else f"variant {newest[at].variant}",
         tuple(cells[at : at + noises]))
        for at in range(0, size, noises)
    )  # fmt: skip
    return ShownGroup(newest[0].step, str(newest[0].prompt), reward, noises, rows)


def phases(metrics: Sequence[Mapping[str, float]]) -> list[tuple[str, float, float]]:
    """Return for each phase of a step its name, its seconds in all, and its percentage of all phases."""
    prefix = "seconds/"
    names = dict.fromkeys(name for row in metrics for name in row if name.startswith(prefix))
    seconds = {name.removeprefix(prefix): math.fsum(row.get(name, 0.0) for row in metrics) for name in names}
    whole = math.fsum(seconds.values()) or 1.0
    return [(name, spent, 100 * spent / whole) for name, spent in seconds.items()]


def guard_findings(folder: RunFolder) -> list[tuple[int, str]]:
    """Return the evaluations in which the guard found something, by step, and what it found."""
    steps = map(step_of_place, evaluated_places(folder))
    found = [(step, [one.text() for one in read_findings(folder, step) if one.found]) for step in steps]
    return [(step, "; ".join(texts)) for step, texts in found if texts]


def failures(manifest: Sequence[ManifestRow]) -> list[tuple[str, int]]:
    """Return the reasons of failed scores with their counts, the most frequent first."""
    return Counter(row.failed for row in manifest if row.failed is not None).most_common()


def reward_panels(shape: RunShape, metrics: Rows, evaluated: Rows) -> list[Panel]:
    """Return one panel a reward: its mean on the pictures of training and on fixed prompts at fixed seeds."""
    found = []
    for name, role in shape.roles.items():
        training = _points(metrics, f"reward/{name}/mean")
        held_out = _points(evaluated, f"{name}/mean")
        smoothed = _smoothed(training)
        means = dict(smoothed)
        deviations = dict(_smoothed(_points(metrics, f"reward/{name}/std")))
        band = [(x, means[x] - deviations[x], means[x] + deviations[x]) for x in means if x in deviations]
        curves = [
            Curve("training prompts", smoothed, "faint", band),
            Curve("fixed prompts", held_out, "mean"),
        ]
        if training or held_out:
            said = "Only measured: no score is learned from" if role == MEASURED else role.capitalize()
            note = _joined(
                f"{said}.",
                shape.pictures,
                smoothed_note(len(training)),
                "Shaded: one standard deviation of a step's pictures.",
            )
            svg = lines_chart([c for c in curves if c.values], "step", "", legend=True)
            found.append(Panel(name, note, Markup(svg)))
    return found


def panels(metrics: Rows, evaluated: Rows, *, learned: bool = True) -> list[Panel]:
    """Return the panels of everything else that was logged, in a fixed order; `learned`: the run learns from scores."""
    found = [
        panel for spec in SPECS if learned or not spec.signal if (panel := spec.panel(metrics)) is not None
    ]
    if ratio := _points(metrics, "ratio_mean"):
        low, high = dict(_points(metrics, "ratio_min")), dict(_points(metrics, "ratio_max"))
        band = [(x, low[x], high[x]) for x, _ in ratio if x in low and x in high]
        chart = lines_chart([Curve("ratio", ratio, "mean", band)], "step", "")
        note = "Mean of a step's updates; shaded from least to greatest."
        found.append(Panel("Policy ratio", note, Markup(chart)))
    training = _points(metrics, "diversity")
    curves = [
        Curve("training groups", _smoothed(training), "faint"),
        Curve("fixed prompts", _points(evaluated, "diversity"), "mean"),
    ]
    if known := [curve for curve in curves if curve.values]:
        note = "Mean distance of image features between the pictures of a prompt."
        chart = lines_chart(known, "step", "", legend=True)
        found.append(Panel("Diversity", _joined(note, smoothed_note(len(training))), Markup(chart)))
    return found


def window_of(steps: int) -> int:
    """Return the odd width of the running mean in a run of `steps`; 1 where it is too short to be smoothed."""
    widest = min(WINDOW, steps // SHARE)
    return max(1, widest - 1 + widest % 2)


def smoothed_note(steps: int) -> str:
    """Say how a line of training was smoothed; empty where it was not."""
    window = window_of(steps)
    return f"Training: the mean of {window} steps." if window > 1 else ""


def smooth(points: Sequence[tuple[float, float]], window: int = WINDOW) -> list[tuple[float, float]]:
    """Return the centred running mean over up to `window` neighbouring points, fewer at the ends."""
    half = window // 2
    return [
        (x, math.fsum(y for _, y in near) / len(near))
        for at, (x, _) in enumerate(points)
        for near in [points[max(0, at - half) : at + half + 1]]
    ]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return smooth(points, window_of(len(points)))


def _joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Return (step, value) where a finite value was logged; none where there is but one, which makes no line."""
    pairs = ((row["step"], row.get(name)) for row in rows)
    known = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    return known if len(known) > 1 else []


def changes_of(folder: RunFolder, shape: RunShape) -> list[Change]:
    """Return every reward and the diversity, of the base and at the last evaluation; none where not both are there."""
    evaluated = base_and_last(folder)
    if not evaluated:
        return []
    first, last = evaluated
    # the interval of a reward's gain over prompts, whose pictures are drawn from the same noise before and after
    before, after = (sample_scores(folder, row["step"]) for row in evaluated)
    both = [name for name in before if len(before[name]) == len(after.get(name, ()))]
    gains = {name: bootstrap(gains_by_prompt(before[name], after[name], shape.per_prompt)) for name in both}
    intervals = {name: found for name, found in gains.items() if found.count > 1}
    changes = [
        Change(
            name,
            role,
            number(first.get(f"{name}/mean")),
            number(last.get(f"{name}/mean")),
            intervals.get(name),
        )
        for name, role in shape.roles.items()
    ]
    if "diversity" in last:
        changes.append(Change("diversity", "spread", number(first["diversity"]), number(last["diversity"])))
    return changes


def warnings(changes: Sequence[Change]) -> list[str]:
    """Return what a person should look at before trusting the run: signs of reward hacking."""
    risen = [c for c in changes if c.role == TRAINED and c.is_decided and c.gain > 0]
    found = []
    for c in changes:
        if risen and c.role == HELD_OUT and c.fell:
            chance = (
                "how much of it is chance is not known"
                if c.interval is None
                else f"{c.gain_text()} over {c.interval.count} prompts"
            )
            found.append(
                f"{c.name}, which was never trained on, fell from {c.before:.3f} to {c.after:.3f} ({chance}), while "
                f"{' and '.join(r.name for r in risen)} rose. Look at the pictures before you trust the gain."
            )
    found += [
        f"Diversity is {c.after / c.before:.2f} of the base's: the pictures of a prompt grow alike."
        for c in changes
        if c.role == "spread" and c.before > 0 and c.after < KEPT * c.before
    ]
    return found


def number(value: float | None) -> float:
    """Return a score of a log, nan where it has null."""
    return math.nan if value is None else value
