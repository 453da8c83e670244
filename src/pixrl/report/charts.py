"""Small charts as inline SVG. Colours come from the page's CSS variables, so that they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 520, 300
"""Size of a chart in SVG units."""
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 30, 40
"""Margins around the plotted area."""


@dataclass(frozen=True)
class Axis:
    """A linear map of values from `low` to `high` onto pixels from `start` to `end`; `low` < `high`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        """Return four to seven round numbers within the range."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * m) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Point:
    """One picture of a scatter plot."""

    x: float
    y: float
    progress: float
    """Place of the picture in its run: 0 for the first, 1 for the last."""
    marked: bool
    label: str


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str
    values: Sequence[tuple[float, float]]
    css: str
    band: Sequence[tuple[float, float, float]] = ()
    """The shaded region around the line, as (x, low, high)."""


def axis(values: Sequence[float], start: float, end: float, pad: float = 0.06) -> Axis:
    """Return an axis around the finite values, with a margin of the share `pad` at both ends."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    margin = (high - low) * pad or max(abs(high), 1.0) * pad
    return Axis(low - margin, high + margin, start, end)


def reward_chart(rewards: Sequence[float], batch: int, pool: int | None = None) -> str:
    """Plot every picture's reward as a dot, the mean of each batch as a line, and the best so far.

    Args:
        rewards: one a picture, in order.
        batch: pictures of a batch.
        pool: the number of the first picture that was drawn when learning was done; a line stands before it.
    """
    y = axis(rewards, HEIGHT - BOTTOM, TOP)
    x = Axis(0, max(len(rewards), 2), LEFT, WIDTH - RIGHT)
    known = [(i + 0.5, r) for i, r in enumerate(rewards) if math.isfinite(r)]
    dots = "".join(f'<circle class="dot" cx="{x(i)}" cy="{y(r)}" r="2.4"/>' for i, r in known)
    means, best, so_far = [], [], -math.inf
    learning = len(rewards) if pool is None else min(pool, len(rewards))
    starts = [*range(0, learning, batch), *range(learning, len(rewards), batch)]
    for start, end in zip(starts, [*starts[1:], len(rewards)], strict=True):
        chunk = [r for r in rewards[start:end] if math.isfinite(r)]
        if chunk:
            means.append(((start + end) / 2, sum(chunk) / len(chunk)))
    for i, r in known:
        so_far = max(so_far, r)
        best.append((i, so_far))
    curves = (Curve("best so far", best, "best"), Curve("mean of a batch", means, "mean"))
    body = dots + "".join(_line(curve, x, y) for curve in curves)
    if learning < len(rewards):
        body += (
            f'<line class="edge" x1="{x(learning)}" x2="{x(learning)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{x(learning) + 5}" y="{HEIGHT - BOTTOM - 7}">pool</text>'
        )
    return _frame(
        body, x, y, "pictures", "reward", _legend([("dot", "picture"), *[(c.css, c.label) for c in curves]])
    )


def lines_chart(
    curves: Sequence[Curve], x_label: str, y_label: str, *, legend: bool = False, floor: float = -math.inf
) -> str:
    """Plot several lines over the same axes, with their bands.

    Args:
        curves: what to draw.
        x_label, y_label: names of the axes.
        legend: name the lines below the axis (room for about three).
        floor: value at which the margin below the lowest point ends at the latest.
    """
    points = [point for curve in curves for point in curve.values]
    edges = [edge for curve in curves for _, *pair in curve.band for edge in pair]
    x = axis([p[0] for p in points], LEFT, WIDTH - RIGHT, 0.02)
    y = axis([p[1] for p in points] + edges, HEIGHT - BOTTOM, TOP)
    y = replace(y, low=max(y.low, floor))
    bands = []
    for curve in curves:
        if known := [row for row in curve.band if all(math.isfinite(value) for value in row)]:
            there = [f"{x(at)},{y(high)}" for at, _, high in known]
            back = [f"{x(at)},{y(low)}" for at, low, _ in reversed(known)]
            bands.append(f'<polygon class="band {curve.css}" points="{" ".join(there + back)}"/>')
    body = "".join([*bands, *(_line(curve, x, y) for curve in curves)])
    named = _legend([(curve.css, curve.label) for curve in curves]) if legend else ""
    return _frame(body, x, y, x_label, y_label, named)


def scatter_chart(
    points: Sequence[Point], x_label: str, y_label: str, region: Sequence[tuple[float, float]]
) -> str:
    """Plot points, light for early and strong for late ones, over the shaded region of the candidates.

    `region` is a polygon in data units, cut to the frame; the axes show all points and the polygon's first corner.
    """
    x = axis([p.x for p in points] + [region[0][0]], LEFT, WIDTH - RIGHT)
    y = axis([p.y for p in points] + [region[0][1]], HEIGHT - BOTTOM, TOP)
    corners = " ".join(f"{x(px)},{y(py)}" for px, py in region)
    inner = f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    clip = f'<clipPath id="frame"><rect x="{LEFT}" y="{TOP}" {inner}/></clipPath>'
    shade = f'{clip}<polygon class="region" clip-path="url(#frame)" points="{corners}"/>'
    dots = []
    for point in sorted(points, key=lambda p: p.marked):
        css, radius = ("chosen", 5.5) if point.marked else ("early", 3.2)
        opacity = 1.0 if point.marked else round(0.25 + 0.6 * point.progress, 2)
        place = f'cx="{x(point.x)}" cy="{y(point.y)}" r="{radius}"'
        title = f"<title>{escape(point.label)}</title>"
        dots.append(f'<circle class="{css}" {place} opacity="{opacity}">{title}</circle>')
    return _frame(shade + "".join(dots), x, y, x_label, y_label, "")


def sparkline(values: Sequence[float], width: int = 160, height: int = 36) -> str:
    """Plot a line without axes, for tables."""
    y = axis(values, height - 3, 3, 0.02)
    x = Axis(0, max(len(values) - 1, 1), 3, width - 3)
    path = " ".join(f"{x(i)},{y(v)}" for i, v in enumerate(values) if math.isfinite(v))
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="spark" {size}><polyline points="{path}"/></svg>'


def _line(curve: Curve, x: Axis, y: Axis) -> str:
    path = " ".join(f"{x(px)},{y(py)}" for px, py in curve.values if math.isfinite(py))
    return (
        f'<polyline class="line {curve.css}" points="{path}"><title>{escape(curve.label)}</title></polyline>'
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    """Draw marks and their names side by side below the axis; the class `dot` is a dot, all others are lines."""
    parts, x, y = [], LEFT + 6.0, HEIGHT - 7
    for css, label in entries:
        parts.append(
            f'<circle class="{css}" cx="{x + 8}" cy="{y}" r="2.8"/>'
            if css == "dot"
            else f'<line class="line {css}" x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<text x="{x + 21}" y="{y + 4}">{escape(label)}</text>')
        x += 34 + 6.4 * len(label)
    return "".join(parts)


def _frame(body: str, x: Axis, y: Axis, x_label: str, y_label: str, legend: str) -> str:
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v)}" y2="{y(v)}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y(v) + 4}" text-anchor="end">{_tick(v)}</text>'
        for v in y.ticks()
    )
    below = HEIGHT - BOTTOM
    ticks = "".join(
        f'<text class="tick" x="{x(v)}" y="{below + 15}" text-anchor="middle">{_tick(v)}</text>'
        for v in x.ticks()
    )
    labels = (
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}</text>'
        f'<text class="axis" x="4" y="14">{escape(y_label)}</text>'
    )
    edge = f'<line class="edge" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{below}" y2="{below}"/>'
    inside = f"{grid}{ticks}{edge}{body}{labels}{legend}"
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{inside}</svg>'


def _tick(value: float) -> str:
    """Return a tick's number; very small ones in the short scientific form that the margin has room for, 2.5e-4."""
    if not 0 < abs(value) < 1e-3:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
