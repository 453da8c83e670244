"""The charts of an alignment, from its metrics and evaluations. A panel is left out where nothing was logged for it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixrl.report.charts import Curve, lines_chart
from pixrl.report.describe import MEASURED, role_of, training_pictures
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.config import AlignConfig

WINDOW = 9
"""Steps of the running mean that is drawn over noisy figures, in runs that are long enough."""
SHARE = 5
"""The running mean covers at most one in so many of a run's steps."""
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One chart with its heading."""

    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class Spec:
    """What a panel shows: figures of metrics.jsonl by name, each with its legend."""

    title: str
    note: str
    names: Mapping[str, str]
    smooth: bool = False
    signal: bool = False
    """Of what advantages are made from; says nothing of a run that learns from no score."""


SPECS = (
    Spec("Group standard deviation", "Of the rewards within a group: the learning signal.",
         {"group_std": "group std"}, smooth=True, signal=True),
    Spec("Groups without a signal", "Share of groups whose rewards are all equal; they teach nothing.",
         {"zero_std_share": "zero-std share"}, smooth=True, signal=True),
    Spec("Do the rewards agree?", "Samples whose two advantages have opposite signs (half of them where rewards are "
         "independent), and the correlation of the advantages.",
         {"conflict_share": "conflict share", "reward_correlation": "correlation"}, signal=True),
    Spec("Mean advantage", "What shaping adds to all samples alike.", {"advantage_mean": "mean"}, signal=True),
    Spec("Pairs told apart", "Share of preference pairs whose winner the trained policy prefers.",
         {"pair_accuracy": "accuracy"}),
    Spec("Clipped share", "Of ratios outside the trusted range.", {"clip_share": "clipped"}),
    Spec("KL to the reference", "How far the trained policy has moved.", {"kl": "KL"}),
    Spec("Distance to the old policy", "Mean square of the difference of velocities.",
         {"old_distance": "distance"}),
    Spec("Gradient norm", "Before clipping.", {"grad_norm": "norm"}),
    Spec("Perturbations", "Cosine of variants to the prompt and to each other.",
         {"anchor_cosine": "to the prompt", "pairwise_cosine": "to each other"}),
    Spec("Failed scores", "Share of a step's pictures.", {"failed_share": "failed"}),
)  # fmt: skip


def reward_panels(config: AlignConfig, metrics: Rows, evaluated: Rows) -> list[Panel]:
    """One a reward: training prompts as they came, and held-out prompts at fixed seeds."""
    found = []
    for setting in config.rewards:
        training = _points(metrics, f"reward/{setting.name}/mean")
        held_out = _points(evaluated, f"{setting.name}/mean")
        curves = [
            Curve("training prompts", _smoothed(training), "faint", _spread(metrics, setting.name)),
            Curve("fixed prompts", held_out, "mean"),
        ]
        if training or held_out:
            svg = lines_chart([c for c in curves if c.values], "step", "", legend=True)
            found.append(Panel(setting.name, _reward_note(config, setting, len(training)), svg))
    return found


def _reward_note(config: AlignConfig, setting: RewardSetting, steps: int) -> str:
    role = role_of(config, setting)
    said = "Only measured: no score is learned from" if role == MEASURED else role.capitalize()
    shaded = "Shaded: one standard deviation of a step's pictures."
    return _joined(f"{said}.", training_pictures(config), smoothed_note(steps), shaded)


def panels(metrics: Rows, evaluated: Rows, *, learned: bool = True) -> list[Panel]:
    """Everything else that was logged, in a fixed order; `learned`: the run learns from scores."""
    specs = [spec for spec in SPECS if learned or not spec.signal]
    return [*_of_specs(specs, metrics), *_ratio(metrics), *_diversity(metrics, evaluated)]


def window_of(steps: int) -> int:
    """Steps of the running mean in a run of `steps`: an odd number; 1 where it is too short to be smoothed."""
    widest = min(WINDOW, steps // SHARE)
    return max(1, widest - 1 + widest % 2)


def smoothed_note(steps: int) -> str:
    """Says how a line of training was smoothed; empty where it was not."""
    window = window_of(steps)
    return f"Training: the mean of {window} steps." if window > 1 else ""


def smooth(points: Sequence[tuple[float, float]], window: int = WINDOW) -> list[tuple[float, float]]:
    """The running mean over up to `window` neighbouring points, fewer at the ends, centred."""
    half = window // 2
    return [
        (x, math.fsum(y for _, y in near) / len(near))
        for at, (x, _) in enumerate(points)
        for near in [points[max(0, at - half) : at + half + 1]]
    ]


def _of_specs(specs: Sequence[Spec], metrics: Rows) -> Iterator[Panel]:
    for spec in specs:
        found = {label: _points(metrics, name) for name, label in spec.names.items()}
        curves = [
            Curve(label, points, css)
            for (label, points), css in zip(found.items(), ("mean", "k0"), strict=False)
            if points
        ]
        window = window_of(max((len(curve.values) for curve in curves), default=0))
        if spec.smooth and window > 1:
            faint = [Curve("each step", curve.values, "faint") for curve in curves]
            curves = [*faint, *(Curve(f"mean of {window}", _smoothed(c.values), "mean") for c in curves)]
        idle = all(y == 0 for curve in curves for _, y in curve.values)
        if curves and not (idle and spec.title == "Failed scores"):
            positive = all(y >= 0 for curve in curves for _, y in curve.values)
            floor = 0.0 if positive else -math.inf
            chart = lines_chart(curves, "step", "", legend=len(curves) > 1, floor=floor)
            yield Panel(spec.title, spec.note, chart)


def _ratio(metrics: Rows) -> Iterator[Panel]:
    mean = _points(metrics, "ratio_mean")
    if mean:
        low, high = dict(_points(metrics, "ratio_min")), dict(_points(metrics, "ratio_max"))
        band = [(x, low[x], high[x]) for x, _ in mean if x in low and x in high]
        chart = lines_chart([Curve("ratio", mean, "mean", band)], "step", "")
        yield Panel("Policy ratio", "Mean of a step's updates; shaded from least to greatest.", chart)


def _diversity(metrics: Rows, evaluated: Rows) -> Iterator[Panel]:
    training = _points(metrics, "diversity")
    curves = [
        Curve("training groups", _smoothed(training), "faint"),
        Curve("fixed prompts", _points(evaluated, "diversity"), "mean"),
    ]
    known = [curve for curve in curves if curve.values]
    if known:
        note = "Mean distance of image features between the pictures of a prompt."
        yield Panel(
            "Diversity",
            _joined(note, smoothed_note(len(training))),
            lines_chart(known, "step", "", legend=True),
        )


def _spread(metrics: Rows, name: str) -> list[tuple[float, float, float]]:
    means = dict(_smoothed(_points(metrics, f"reward/{name}/mean")))
    deviations = dict(_smoothed(_points(metrics, f"reward/{name}/std")))
    return [(x, means[x] - deviations[x], means[x] + deviations[x]) for x in means if x in deviations]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return smooth(points, window_of(len(points)))


def _joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    """(step, value) where a finite value was logged; none where there is but one, which makes no line."""
    pairs = ((row["step"], row.get(name)) for row in rows)
    known = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    return known if len(known) > 1 else []
