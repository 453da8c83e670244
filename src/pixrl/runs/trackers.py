"""Weights & Biases and trackio as mirrors of a run's figures: `log: [wandb, trackio]` in a recipe.

The run's folder stays the record. A tracker is sent one row a step: the figures of the step and those of the
evaluation before it. Where a run goes on, or is given a tracker late, it is sent the rows of the folder that it does
not have yet, so that it holds each step once, whenever the run was killed.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TrackioTracker, WandBTracker
from pydantic import AfterValidator, Field

from pixrl.errors import CheckpointError, RunError
from pixrl.libraries import require
from pixrl.runs.display import Extent, Monitor
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import RunFolder
from pixrl.runs.reading import evaluations

IDENTITY = "trackers.json"
"""The file of the id by which trackers know the run."""
WANDB = "wandb"
"""The folder, in the run's, of what W&B keeps on the disk."""
PROJECT = "pixrl"
"""The project where WANDB_PROJECT or TRACKIO_PROJECT names no other."""
OFFLINE = "Or keep its log in the run's folder: set WANDB_MODE=offline."


class Tracker(StrEnum):
    """A service that shows the figures of runs."""

    WANDB = "wandb"
    TRACKIO = "trackio"


def each_once(trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
    """Raise a ValueError where a tracker is named twice."""
    if len({*trackers}) < len(trackers):
        raise ValueError(f"{', '.join(trackers)}: name each tracker once")
    return trackers


Trackers = Annotated[tuple[Tracker, ...], AfterValidator(each_once), Field(exclude_if=lambda them: not them)]
"""The setting `log` of a recipe; one that is empty is not written down, as in runs of before there was one."""


def require_trackers(trackers: Sequence[Tracker]) -> None:
    """Check that the trackers can be used here, before work begins.

    Raises:
        RunError: a package is missing, or W&B would ask for a login; says what to type.
    """
    for tracker in trackers:
        library: Any = require(tracker, tracker, f"log: {tracker}")
        if tracker is not Tracker.WANDB or library.setup().settings.mode != "online":
            continue
        try:
            knows_key = library.login(prompt=False)
        except library.Error as error:
            raise RunError(f"log: wandb cannot be used: {_sentence(error)} {OFFLINE}") from None
        if not knows_key:
            raise RunError(f"log: wandb has no API key here. Type: wandb login. {OFFLINE}")


class Tracked:
    """A monitor that passes all on to another one, and the figures to trackers too."""

    def __init__(self, monitor: Monitor, folder: RunFolder, trackers: Sequence[Tracker]) -> None:
        self.monitor = monitor
        self.folder = folder
        self.trackers = trackers
        self._open: list[tuple[GeneralTracker, int]] = []
        """Each with the first step that it did not have when it was opened."""
        self._step, self._steps = 0, 0
        self._evaluated: dict[str, float] = {}
        """The figures of the evaluation before the next step."""

    def begin(self, title: str, extent: Extent, past: Sequence[Mapping[str, float]] = ()) -> None:
        """Open the trackers and send what they lack of the past. Raises RunError where one cannot be opened."""
        self._open = [_open(name, self.folder) for name in self.trackers]
        evaluated = {row["step"]: _evaluation(row) for row in evaluations(self.folder.path)}
        for row in past:
            self._send(int(row["step"]), _figures(row) | evaluated.get(row["step"], {}))
        self._step, self._steps = len(past), extent.total
        self.monitor.begin(title, extent, past)

    def say(self, text: str) -> None:
        self.monitor.say(text)

    def step(self, images: int, metrics: Mapping[str, float]) -> None:
        self._send(self._step, _figures(metrics) | self._evaluated)
        self._evaluated = {}
        self._step += 1
        self.monitor.step(images, metrics)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self._evaluated = _evaluation(figures)
        self.monitor.evaluation(step, figures)

    def end(self) -> None:
        """Close the trackers. An evaluation is sent alone only after the last step: before any other, a resumed run
        draws it again."""
        self.monitor.end()
        if self._evaluated and self._step == self._steps:
            self._send(self._step, self._evaluated)
        with contextlib.redirect_stdout(sys.stderr):
            for tracker, _ in self._open:
                tracker.finish()

    def _send(self, step: int, figures: Mapping[str, float]) -> None:
        for tracker, first in self._open:
            if step >= first:
                tracker.log(dict(figures), step=step)


def tracked(monitor: Monitor, folder: RunFolder, trackers: Sequence[Tracker]) -> Monitor:
    """Return a monitor of a run that tells the trackers too; the given one where there are none."""
    return Tracked(monitor, folder, trackers) if trackers else monitor


def _open(name: Tracker, folder: RunFolder) -> tuple[GeneralTracker, int]:
    """Open the run in a tracker; also return the first step that it does not have yet."""
    PartialState(
        cpu=True
    )  # accelerate's trackers write to its log, which asks for one; one that is there stays
    library: Any = require(name, name, f"log: {name}")
    project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
    file = (
        folder.path / IDENTITY
    )  # holds the id by which trackers know the run, made when the first one is opened
    if not file.is_file():
        write_atomic(file, json.dumps({"id": uuid.uuid4().hex[:8]}).encode() + b"\n")
    try:
        identity = str(json.loads(file.read_text(encoding="utf-8"))["id"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{file}, which holds the id by which wandb and trackio know the run, is damaged. Delete it: they then "
            "show the run as a new one."
        ) from None
    settings = {"resume": "allow", "config": folder.recipe()}
    with contextlib.redirect_stdout(sys.stderr):
        if name is Tracker.TRACKIO:
            tracker = TrackioTracker(project, name=f"{folder.path.name}-{identity}", embed=False, **settings)
            tracker.start()
            return tracker, tracker.run._next_step
        for part in (folder.path / WANDB).glob(f"offline-run-*-{identity}"):
            shutil.rmtree(part)  # offline nothing can be gone on with: all of it is sent again
        quiet = library.Settings(console="off", quiet=True)
        where = {"id": identity, "name": folder.path.name, "dir": str(folder.path)}
        tracker = WandBTracker(project, settings=quiet, **where, **settings)
        try:
            tracker.start()
        except library.Error as error:
            raise RunError(f"log: wandb cannot be used: {_sentence(error)} {OFFLINE}") from None
        return tracker, tracker.run.starting_step


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(x) for name, x in metrics.items() if name != "step" and math.isfinite(x)}


def _evaluation(row: Mapping[str, Any]) -> dict[str, float]:
    figures = {name: x for name, x in row.items() if name != "step" and x is not None and math.isfinite(x)}
    return {f"evaluation/{name}": x for name, x in figures.items()}


def _sentence(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") + "."
