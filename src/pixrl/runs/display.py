"""The display of a run while it trains: reward curves, group spread, phases, time left."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

CURVE = 40
"""The number of steps that a curve shows."""
BARS = "▁▂▃▄▅▆▇█"
FIGURES = ("group_std", "zero_std_share", "kl", "diversity")
"""The metrics that are shown beside the rewards."""


@dataclass(frozen=True)
class Extent:
    """The length of a run and what is done of it, in steps, or in pictures where the budget counts pictures."""

    total: int
    done: int = 0
    in_pictures: bool = False


class Monitor(Protocol):
    """A display, or another listener, that is told of everything that happens in a run."""

    def begin(self, title: str, extent: Extent, past: Sequence[Mapping[str, float]] = ()) -> None:
        """Note that a run starts, or goes on after the steps whose metrics are `past`."""

    def say(self, text: str) -> None:
        """Show a message to the user."""

    def step(self, images: int, metrics: Mapping[str, float]) -> None:
        """Note that a training step of `images` pictures is over."""

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Note that the evaluation before training step `step` is over."""

    def end(self) -> None:
        """Note that the run is over, or interrupted."""


class Silent:
    """A monitor that shows nothing."""

    def begin(self, title: str, extent: Extent, past: Sequence[Mapping[str, float]] = ()) -> None: ...
    def say(self, text: str) -> None: ...
    def step(self, images: int, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, step: int, figures: Mapping[str, float]) -> None: ...
    def end(self) -> None: ...


class History:
    """The figures behind a display: each metric by step, and the pace of the run."""

    def __init__(self) -> None:
        self.title, self.extent, self.done = "", Extent(0), 0
        self.values: dict[str, list[float]] = {}
        self.evaluations: dict[str, list[float]] = {}
        self._pace: list[tuple[float, int]] = []
        self._last = time.monotonic()

    def begin(self, title: str, extent: Extent, past: Sequence[Mapping[str, float]]) -> None:
        """Take up a run, after the steps whose metrics are `past`."""
        self.title, self.extent, self.done = title, extent, extent.done
        for metrics in past:
            self._keep(metrics)
        self._last = time.monotonic()

    def step(self, images: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step of `images` pictures."""
        now, units = time.monotonic(), images if self.extent.in_pictures else 1
        self._pace.append((now - self._last, units))
        self._last, self.done = now, self.done + units
        self._keep(metrics)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of an evaluation."""
        for name, value in figures.items():
            self.evaluations.setdefault(name, []).append(value)

    def last(self, name: str) -> float:
        """Return the newest value of a metric; nan where there is none."""
        return self.values.get(name, [math.nan])[-1]

    def best(self) -> float:
        """Return the best reward of any picture so far; nan where the metrics have no `NAME/best`."""
        found = [x for name in self.values if name.endswith("/best") for x in self.values[name]]
        return max((x for x in found if not math.isnan(x)), default=math.nan)

    def count(self) -> str:
        """Return what is done and the total: 3/10, or 24/80 pictures."""
        return f"{self.done}/{self.extent.total}" + (" pictures" if self.extent.in_pictures else "")

    def left(self) -> str:
        """Return the time left at the pace of the last twenty steps of this process, in words."""
        recent = self._pace[-20:]
        if not recent:
            return ""
        pace = sum(seconds for seconds, _ in recent) / sum(units for _, units in recent)
        minutes, seconds = divmod(round((self.extent.total - self.done) * pace), 60)
        return f"{minutes} min {seconds:02d} s left" if minutes else f"{seconds} s left"

    def notes(self) -> list[str]:
        """List what only some runs have: the best reward of a picture, and the share of pictures without a score."""
        found = [] if math.isnan(self.best()) else [f"best reward {self.best():.3f}"]
        return (
            [*found, f"{self.last('failed_share'):.0%} not scored"]
            if self.last("failed_share") > 0
            else found
        )

    def _keep(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    @property
    def rewards(self) -> list[str]:
        """The names of the mean rewards among the metrics."""
        return [name for name in self.values if name.startswith("reward/") and name.endswith("/mean")]


class PlainLines:
    """A monitor that prints one line a step, for logs and pipes."""

    def __init__(self) -> None:
        self.history = History()

    def begin(self, title: str, extent: Extent, past: Sequence[Mapping[str, float]] = ()) -> None:
        self.history.begin(title, extent, past)
        unit = "pictures" if extent.in_pictures else "steps"
        self.say(
            f"{title}: {extent.total} {unit}" + (f", going on after {extent.done}" if extent.done else "")
        )

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def step(self, images: int, metrics: Mapping[str, float]) -> None:
        history = self.history
        history.step(images, metrics)
        rewards = [f"{_short(name)} {history.last(name):.3f}" for name in history.rewards]
        spread = [f"group std {history.last('group_std'):.3f}"] if "group_std" in history.values else []
        self.say("  ".join([f"  {history.count()}", *rewards, *spread, *history.notes(), history.left()]))

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self.history.evaluation(step, figures)
        shown = [f"{name} {x:.3f}" for name, x in figures.items() if not name.endswith("failed_share")]
        self.say("  ".join([f"  evaluation at {step}:", *shown]))

    def end(self) -> None: ...


class LiveView:
    """A monitor that redraws a table on a terminal."""

    def __init__(self, console: Console) -> None:
        self.history = History()
        self.live = Live(console=console, refresh_per_second=4)

    def begin(self, title: str, extent: Extent, past: Sequence[Mapping[str, float]] = ()) -> None:
        self.history.begin(title, extent, past)
        self.live.start()
        self._show()

    def say(self, text: str) -> None:
        self.live.console.print(Text(text, style="dim"))  # a name with brackets is no markup

    def step(self, images: int, metrics: Mapping[str, float]) -> None:
        self.history.step(images, metrics)
        self._show()

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self.history.evaluation(step, figures)
        self._show()

    def end(self) -> None:
        self.live.stop()

    def _show(self) -> None:
        history = self.history
        phases = [name for name in history.values if name.startswith("seconds/")]
        parts = [f"{name.removeprefix('seconds/')} {history.last(name):.1f} s" for name in phases]
        parts.append(f"{history.last('images_per_second'):.1f} pictures/s")
        foot = Text("   ".join([*parts, *history.notes()]) if phases else "", style="dim")
        self.live.update(Group(self._head(), self._curves(), foot))

    def _head(self) -> Table:
        history = self.history
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=history.extent.total, completed=history.done, width=30)
        count = Text(history.count())
        head.add_row(Text(history.title, style="bold"), bar, count, Text(history.left(), style="dim"))
        return head

    def _curves(self) -> Table:
        history = self.history
        table = Table.grid(padding=(0, 2))
        for name in [*history.rewards, *FIGURES]:
            values = history.values.get(name)
            if values:
                curve = Text(sparkline(values[-CURVE:]), style="cyan")
                table.add_row(Text(_short(name), style="dim"), curve, Text(f"{values[-1]:.4g}"))
        for name, values in history.evaluations.items():
            if not name.endswith("failed_share"):
                change = " → ".join(f"{x:.3f}" for x in (values[0], values[-1]))
                table.add_row(
                    Text(f"held out {_short(name)}", style="dim"), Text(sparkline(values)), Text(change)
                )
        return table


def for_terminal() -> Monitor:
    """Make the monitor for standard error: a live view on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    return LiveView(console) if console.is_terminal else PlainLines()


def _short(name: str) -> str:
    return name.removeprefix("reward/").removesuffix("/mean").replace("_", " ")


def sparkline(values: Sequence[float]) -> str:
    """Draw values as a row of bars scaled from the least to the greatest; nan is a dot."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "·" * len(values)
    low, high = min(known), max(known)
    steps = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join("·" if math.isnan(value) else BARS[round((value - low) * steps)] for value in values)
