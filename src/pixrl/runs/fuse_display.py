"""What a person sees while a fusion runs: pictures done, best reward so far, time left, a small curve."""

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pixrl.runs.fuse_config import FuseConfig

BARS = "▁▂▃▄▅▆▇█"


class Progress(Protocol):
    """Told of every step."""

    def begin(self, config: FuseConfig, done: Sequence[float]) -> None:
        """A run starts, or goes on after the rewards `done`."""

    def advance(self, rewards: Sequence[float]) -> None:
        """A step's rewards, nan where scoring failed."""

    def end(self) -> None:
        """The run is over, or broken off."""


class Silent:
    """Shows nothing."""

    def begin(self, config: FuseConfig, done: Sequence[float]) -> None: ...

    def advance(self, rewards: Sequence[float]) -> None: ...

    def end(self) -> None: ...


class Tally:
    """The figures behind the display."""

    def __init__(self, config: FuseConfig, done: Sequence[float]) -> None:
        self.config = config
        self.rewards: list[float] = list(done)
        self.before = len(done)
        self.begun = time.monotonic()

    @property
    def best(self) -> float:
        """The best reward so far; nan before the first."""
        return max((r for r in self.rewards if not math.isnan(r)), default=math.nan)

    @property
    def failed(self) -> int:
        return sum(map(math.isnan, self.rewards))

    def seconds_left(self) -> float:
        """From the pace of this process; nan before the first step."""
        made = len(self.rewards) - self.before
        if made == 0:
            return math.nan
        return (time.monotonic() - self.begun) / made * (self.config.budget - len(self.rewards))

    def curve(self) -> str:
        """The mean reward of each step as a row of small bars."""
        batch = self.config.batch
        chunks = [self.rewards[i : i + batch] for i in range(0, len(self.rewards), batch)]
        return sparkline([_mean(chunk) for chunk in chunks])

    def line(self) -> str:
        """All of it in one plain line."""
        left = self.seconds_left()
        parts = [
            f"{len(self.rewards)}/{self.config.budget} pictures",
            f"best reward {self.best:.3f}",
            f"mean {_mean(self.rewards[-self.config.batch :]):.3f}",
        ]
        if self.failed:
            parts.append(f"{self.failed} not scored")
        if not math.isnan(left):
            parts.append(f"{left:.0f} s left")
        return "  ".join(parts)


class PlainLines:
    """One line a step, for logs and pipes."""

    def begin(self, config: FuseConfig, done: Sequence[float]) -> None:
        self.tally = Tally(config, done)
        print(f"{title(config)}: {config.budget} pictures", file=sys.stderr, flush=True)

    def advance(self, rewards: Sequence[float]) -> None:
        self.tally.rewards += rewards
        print(f"  {self.tally.line()}", file=sys.stderr, flush=True)

    def end(self) -> None: ...


class LiveBox:
    """A few lines that redraw themselves, on a terminal."""

    def __init__(self, console: Console) -> None:
        self.live = Live(console=console, refresh_per_second=8, transient=False)

    def begin(self, config: FuseConfig, done: Sequence[float]) -> None:
        self.tally = Tally(config, done)
        self.live.update(self._view())
        self.live.start()

    def advance(self, rewards: Sequence[float]) -> None:
        self.tally.rewards += rewards
        self.live.update(self._view())

    def end(self) -> None:
        self.live.stop()

    def _view(self) -> Table:
        tally = self.tally
        done, budget = len(tally.rewards), tally.config.budget
        left = tally.seconds_left()
        view = Table.grid(padding=(0, 2))
        view.add_row(
            Text(title(tally.config), style="bold"),
            ProgressBar(total=budget, completed=done, width=30),
            Text(f"{done}/{budget}"),
            Text("" if math.isnan(left) else f"{left:.0f} s left", style="dim"),
        )
        best = "" if math.isnan(tally.best) else f"best reward {tally.best:.3f}"
        failed = f"{tally.failed} not scored" if tally.failed else ""
        view.add_row(
            Text("mean reward", style="dim"), Text(tally.curve(), style="cyan"), Text(best), Text(failed)
        )
        return view


def for_terminal() -> Progress:
    """The live box on a terminal, plain lines elsewhere; both on standard error."""
    console = Console(stderr=True)
    return LiveBox(console) if console.is_terminal else PlainLines()


def title(config: FuseConfig) -> str:
    """'owl + snail, rmler'."""
    return f"{' + '.join(config.concepts)}, {config.sampler}"


def sparkline(values: Sequence[float]) -> str:
    """A row of bars from the least value to the greatest; a dot where there is none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "·" * len(values)
    low, high = min(known), max(known)
    steps = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join("·" if math.isnan(value) else BARS[round((value - low) * steps)] for value in values)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


class Shown:
    """Ends a display even when the run breaks off."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __enter__(self) -> Progress:
        return self.progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.end()
