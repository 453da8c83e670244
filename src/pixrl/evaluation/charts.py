"""Small charts as inline SVG. Colours come from the page's CSS variables, so that they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 30, 40


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; `low` < `high`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        """Four to seven round numbers within the range."""
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
    """0 for the first picture of a run, 1 for the last."""
    marked: bool
    label: str


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str
    values: Sequence[tuple[float, float]]
    css: str


def axis(values: Sequence[float], start: float, end: float, pad: float = 0.06) -> Axis:
    """An axis around the values that are finite."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    margin = (high - low) * pad or max(abs(high), 1.0) * pad
    return Axis(low - margin, high + margin, start, end)


def reward_chart(rewards: Sequence[float], batch: int) -> str:
    """Every picture's reward as a dot, each batch's mean as a line, and the best so far."""
    y = axis(rewards, HEIGHT - BOTTOM, TOP)
    x = Axis(0, max(len(rewards), 2), LEFT, WIDTH - RIGHT)
    known = [(i + 0.5, r) for i, r in enumerate(rewards) if math.isfinite(r)]
    dots = "".join(f'<circle class="dot" cx="{x(i)}" cy="{y(r)}" r="2.4"/>' for i, r in known)
    means, best, so_far = [], [], -math.inf
    for start in range(0, len(rewards), batch):
        chunk = [r for r in rewards[start : start + batch] if math.isfinite(r)]
        if chunk:
            middle = start + len(rewards[start : start + batch]) / 2
            means.append((middle, sum(chunk) / len(chunk)))
    for i, r in known:
        so_far = max(so_far, r)
        best.append((i, so_far))
    curves = (Curve("best so far", best, "best"), Curve("mean of a batch", means, "mean"))
    body = dots + "".join(_line(curve, x, y) for curve in curves)
    return _frame(
        body, x, y, "pictures", "reward", _legend([("dot", "picture"), *[(c.css, c.label) for c in curves]])
    )


def lines_chart(curves: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Several lines over the same axes."""
    points = [point for curve in curves for point in curve.values]
    x = axis([p[0] for p in points], LEFT, WIDTH - RIGHT, 0.02)
    y = axis([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    body = "".join(_line(curve, x, y) for curve in curves)
    return _frame(body, x, y, x_label, y_label, "")


def scatter_chart(
    points: Sequence[Point], x_label: str, y_label: str, region: Sequence[tuple[float, float]]
) -> str:
    """Points, light for early and strong for late ones, over the shaded region of the candidates.

    `region` is a polygon in data units, cut to the frame; the axes show all points and the polygon's first corner.
    """
    x = axis([p.x for p in points] + [region[0][0]], LEFT, WIDTH - RIGHT)
    y = axis([p.y for p in points] + [region[0][1]], HEIGHT - BOTTOM, TOP)
    corners = " ".join(f"{x(px)},{y(py)}" for px, py in region)
    inner = f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    clip = f'<clipPath id="frame"><rect x="{LEFT}" y="{TOP}" {inner}/></clipPath>'
    shade = f'{clip}<polygon class="region" clip-path="url(#frame)" points="{corners}"/>'
    order = sorted(points, key=lambda p: p.marked)
    return _frame(shade + "".join(_mark(p, x, y) for p in order), x, y, x_label, y_label, "")


def sparkline(values: Sequence[float], width: int = 160, height: int = 36) -> str:
    """A line without axes, for tables."""
    y = axis(values, height - 3, 3, 0.02)
    x = Axis(0, max(len(values) - 1, 1), 3, width - 3)
    path = " ".join(f"{x(i)},{y(v)}" for i, v in enumerate(values) if math.isfinite(v))
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="spark" {size}><polyline points="{path}"/></svg>'


def _mark(point: Point, x: Axis, y: Axis) -> str:
    css, radius = ("chosen", 5.5) if point.marked else ("early", 3.2)
    opacity = 1.0 if point.marked else round(0.25 + 0.6 * point.progress, 2)
    title = f"<title>{escape(point.label)}</title>"
    place = f'cx="{x(point.x)}" cy="{y(point.y)}" r="{radius}"'
    return f'<circle class="{css}" {place} opacity="{opacity}">{title}</circle>'


def _line(curve: Curve, x: Axis, y: Axis) -> str:
    path = " ".join(f"{x(px)},{y(py)}" for px, py in curve.values if math.isfinite(py))
    return (
        f'<polyline class="line {curve.css}" points="{path}"><title>{escape(curve.label)}</title></polyline>'
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    parts, place = [], LEFT + 6.0
    for css, label in entries:
        mark = (
            f'<circle class="dot" cx="{place + 8}" cy="{HEIGHT - 7}" r="2.8"/>'
            if css == "dot"
            else f'<line class="line {css}" x1="{place}" x2="{place + 16}" y1="{HEIGHT - 7}" y2="{HEIGHT - 7}"/>'
        )
        parts.append(f'{mark}<text x="{place + 21}" y="{HEIGHT - 3}">{escape(label)}</text>')
        place += 34 + 6.4 * len(label)
    return "".join(parts)


def _frame(body: str, x: Axis, y: Axis, x_label: str, y_label: str, legend: str) -> str:
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v)}" y2="{y(v)}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y(v) + 4}" text-anchor="end">{v:g}</text>'
        for v in y.ticks()
    )
    below = HEIGHT - BOTTOM
    ticks = "".join(
        f'<text class="tick" x="{x(v)}" y="{below + 15}" text-anchor="middle">{v:g}</text>' for v in x.ticks()
    )
    labels = (
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}</text>'
        f'<text class="axis" x="4" y="14">{escape(y_label)}</text>'
    )
    edge = f'<line class="edge" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{below}" y2="{below}"/>'
    inside = f"{grid}{ticks}{edge}{body}{labels}{legend}"
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{inside}</svg>'
