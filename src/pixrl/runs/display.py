"""What a person sees while a run trains: reward curves, group spread, phases, time left."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pixrl.runs.fuse_display import sparkline

CURVE = 40
"""Steps of a curve that are shown."""


class Monitor(Protocol):
    """Told of everything that happens."""

    def begin(self, title: str, steps: int, done: int) -> None:
        """A run of so many steps starts, or goes on after `done`."""

    def say(self, text: str) -> None:
        """Something that a person should know."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A training step is over."""

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """An evaluation is over."""

    def end(self) -> None:
        """The run is over, or broken off."""


class Silent:
    """Shows nothing."""

    def begin(self, title: str, steps: int, done: int) -> None: ...
    def say(self, text: str) -> None: ...
    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, step: int, figures: Mapping[str, float]) -> None: ...
    def end(self) -> None: ...


class History:
    """The figures behind a display."""

    def __init__(self) -> None:
        self.title, self.steps, self.done = "", 0, 0
        self.values: dict[str, list[float]] = {}
        self.evaluations: dict[str, list[float]] = {}
        self._seconds: list[float] = []
        self._last = time.monotonic()

    def begin(self, title: str, steps: int, done: int) -> None:
        self.title, self.steps, self.done = title, steps, done
        self._last = time.monotonic()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last, self.done = now, step + 1
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.evaluations.setdefault(name, []).append(value)

    def last(self, name: str) -> float:
        """The newest value; nan where there is none."""
        return self.values.get(name, [math.nan])[-1]

    def left(self) -> str:
        """Time left, from the last twenty steps."""
        recent = self._seconds[-20:]
        if not recent:
            return ""
        minutes, seconds = divmod(round((self.steps - self.done) * sum(recent) / len(recent)), 60)
        return f"{minutes} min {seconds:02d} s left" if minutes else f"{seconds} s left"

    @property
    def rewards(self) -> list[str]:
        """Names of the mean rewards."""
        return [name for name in self.values if name.startswith("reward/") and name.endswith("/mean")]


class PlainLines:
    """One line a step, for logs and pipes."""

    def __init__(self) -> None:
        self.history = History()

    def begin(self, title: str, steps: int, done: int) -> None:
        self.history.begin(title, steps, done)
        self.say(f"{title}: {steps} steps" + (f", going on after {done}" if done else ""))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        history = self.history
        history.step(step, metrics)
        rewards = [f"{_short(name)} {history.last(name):.3f}" for name in history.rewards]
        spread = f"group std {history.last('group_std'):.3f}"
        self.say("  ".join([f"  {history.done}/{history.steps}", *rewards, spread, history.left()]))

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self.history.evaluation(step, figures)
        shown = [f"{name} {x:.3f}" for name, x in figures.items() if not name.endswith("failed_share")]
        self.say("  ".join([f"  evaluation at {step}:", *shown]))

    def end(self) -> None: ...


class LiveView:
    """A table that redraws itself, on a terminal."""

    def __init__(self, console: Console) -> None:
        self.history = History()
        self.live = Live(console=console, refresh_per_second=4)

    def begin(self, title: str, steps: int, done: int) -> None:
        self.history.begin(title, steps, done)
        self.live.start()
        self._show()

    def say(self, text: str) -> None:
        self.live.console.print(Text(text, style="dim"))  # a name with brackets is no markup

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.history.step(step, metrics)
        self._show()

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self.history.evaluation(step, figures)
        self._show()

    def end(self) -> None:
        self.live.stop()

    def _show(self) -> None:
        self.live.update(Group(self._head(), self._curves(), self._foot()))

    def _head(self) -> Table:
        history = self.history
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=history.steps, completed=history.done, width=30)
        count = Text(f"{history.done}/{history.steps}")
        head.add_row(Text(history.title, style="bold"), bar, count, Text(history.left(), style="dim"))
        return head

    def _curves(self) -> Table:
        history = self.history
        table = Table.grid(padding=(0, 2))
        for name in [*history.rewards, "group_std", "zero_std_share", "kl", "diversity"]:
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

    def _foot(self) -> Text:
        history = self.history
        phases = [name for name in history.values if name.startswith("seconds/")]
        parts = [f"{name.removeprefix('seconds/')} {history.last(name):.1f} s" for name in phases]
        speed = f"{history.last('images_per_second'):.1f} pictures/s"
        failed = history.last("failed_share")
        warn = [f"{failed:.0%} not scored"] if failed > 0 else []
        return Text("   ".join([*parts, speed, *warn]) if phases else "", style="dim")


def for_terminal() -> Monitor:
    """The live view on a terminal, plain lines elsewhere; both on standard error."""
    console = Console(stderr=True)
    return LiveView(console) if console.is_terminal else PlainLines()


def _short(name: str) -> str:
    return name.removeprefix("reward/").removesuffix("/mean").replace("_", " ")
