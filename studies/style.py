"""The look of the studies' figures: matplotlib on white, in the colours of the reports' pages, as SVG files.

Two runs write equal bytes: no matplotlibrc of the user enters, ids are hashed with a fixed salt, no date is written.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

PALETTE = (
    "#e0702f", "#3d7be0", "#2f9e6b", "#9a5bd6", "#c2a21c", "#d1495b", "#3aa6b9", "#8a8d93", "#7a5c3e",
)  # fmt: skip
"""The nine colours of report/templates/style.css, as they are on a light page."""
INK, SOFT, GRID = "#1c1d1f", "#6b6f76", "#e3e3df"
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial"
MEASURED = "DejaVu Sans"
"""The font by which matplotlib places text: it brings it along, so that places are the same on every machine."""
STYLE = {
    "svg.hashsalt": "pixrl",
    "svg.fonttype": "none",
    "font.sans-serif": [MEASURED],
    "font.size": 8,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.titlecolor": SOFT,
    "axes.titlepad": 8,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.8,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
}
WIDTH, HEIGHT, HEAD, FOOT, ROW = 5.2, 2.5, 0.76, 0.42, 0.2
"""Inches: a panel, the title and note above it, the axis below it, and a row of the legend."""
LEFT, RIGHT, EDGE = 0.58, 0.18, 0.12
"""Inches beside the plotted area, and from the figure's edge to its words."""


@dataclass(frozen=True)
class Curve:
    """A line, with a shaded band around it where `band` has (x, low, high)."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    band: Sequence[tuple[float, float, float]] = ()
    dotted: bool = False
    """Whether it is a level that curves are compared with."""

    def draw(self, axes: Axes) -> Artist:
        """Draw it; return what stands for it in the legend."""
        if self.band:
            x, low, high = zip(*self.band, strict=True)
            axes.fill_between(x, low, high, color=self.colour, alpha=0.1, linewidth=0)
        x, y = zip(*self.points, strict=True)
        (line,) = axes.plot(x, y, color=self.colour, label=self.label)
        if self.dotted:
            line.set(linestyle=(0, (1, 2)), linewidth=1.2)
        return line


@dataclass(frozen=True)
class Cloud:
    """The points of one kind in a scatter plot."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str

    def draw(self, axes: Axes) -> Artist:
        """Draw it; return what stands for it in the legend."""
        x, y = zip(*self.points, strict=True)
        (dots,) = axes.plot(x, y, "o", color=self.colour, label=self.label, markersize=4.2, alpha=0.6, mew=0)
        return dots


@dataclass(frozen=True)
class Mark:
    """A mean in two dimensions with its intervals; bounds that are not known are nan."""

    label: str
    x: tuple[float, float, float]
    """Mean, low and high end of the interval."""
    y: tuple[float, float, float]
    colour: str
    caption: str = ""
    """Words beside the dot."""
    listed: bool = True
    """Whether the legend has it."""

    def draw(self, axes: Axes) -> Artist | None:
        """Draw a dot at the mean and a bar along each axis whose interval is known; return the dot if it is listed."""
        (x, left, right), (y, low, high) = self.x, self.y
        for ends, heights in (((left, right), (y, y)), ((x, x), (low, high))):
            if all(map(math.isfinite, (*ends, *heights))):
                axes.plot(ends, heights, color=self.colour, linewidth=0.9, alpha=0.35, label=f"_{self.label}")
        (dot,) = axes.plot(
            x, y, "o", color=self.colour, label=self.label, markersize=5.5, mec="white", mew=0.6
        )
        halo = [withStroke(linewidth=2, foreground="white")]
        axes.annotate(
            self.caption,
            (x, y),
            (5, 3),
            textcoords="offset points",
            color=INK,
            fontsize=6.5,
            path_effects=halo,
        )
        return dot if self.listed else None


@dataclass(frozen=True)
class Panel:
    """One plot of a figure."""

    x_label: str
    y_label: str
    """Stands above the plot."""
    content: Sequence[Curve | Cloud | Mark]


def figure(panels: Sequence[Panel], title: str, note: str = "") -> Figure:
    """Draw panels side by side under a title and a note, with one legend for all below."""
    with matplotlib.style.context(STYLE, after_reset=True):
        width = WIDTH * len(panels)
        made = Figure()
        entries: dict[str, Artist] = {}
        all_axes = [made.add_subplot(1, len(panels), place + 1) for place in range(len(panels))]
        for axes, panel in zip(all_axes, panels, strict=True):
            for item in panel.content:
                handle = item.draw(axes)
                if handle is not None:
                    entries.setdefault(item.label, handle)
            axes.margins(x=0.02 if all(isinstance(item, Curve) for item in panel.content) else 0.06, y=0.06)
            axes.set_title(panel.y_label, loc="left", x=(EDGE - LEFT) / (WIDTH - LEFT - RIGHT))
            axes.set_xlabel(panel.x_label, loc="right")
        widest = max((len(label) for label in entries), default=0) * 0.06 + 0.42
        columns = max(1, min(len(entries), int((width - 2 * EDGE) // widest)))
        rows = -(-len(entries) // columns)
        foot = FOOT + (0.1 + ROW * rows if entries else 0)
        head = HEAD if any(panel.y_label for panel in panels) else HEAD - ROW
        height = head + HEIGHT + foot
        made.set_size_inches(width, height)
        made.subplots_adjust(
            left=LEFT / width,
            right=1 - RIGHT / width,
            top=1 - head / height,
            bottom=foot / height,
            wspace=(LEFT + RIGHT) / (WIDTH - LEFT - RIGHT),
        )
        made.text(EDGE / width, 1 - 0.24 / height, title, fontsize=10, fontweight="bold")
        made.text(EDGE / width, 1 - 0.42 / height, note, color=SOFT)
        if entries:
            made.legend(
                entries.values(),
                entries.keys(),
                loc="lower left",
                bbox_to_anchor=(EDGE / width, EDGE / height),
                ncols=-(-len(entries) // rows),
                labelcolor=SOFT,
            )
    return made


def svg(made: Figure) -> bytes:
    """Return a figure as an SVG file, whose words are set in the fonts of the reports' pages."""
    buffer = io.StringIO()
    with matplotlib.style.context(STYLE, after_reset=True):
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace(f"'{MEASURED}'", FONTS).encode()
