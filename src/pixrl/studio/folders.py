"""The run folders that the studio shows, and what each says, read on as it grows: no torch, no code of a run.

A page of a run names it by its place below the folder that the studio was started on; whole paths stay here.
"""

import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pixrl.errors import CheckpointError, InputError, PixrlError
from pixrl.report.page import installed_version
from pixrl.runs import place
from pixrl.runs.folder import EVALUATIONS, MANIFEST, METRICS, ManifestRow, RunFolder, finite_or_nan
from pixrl.runs.process import is_stopping, process_of
from pixrl.runs.reading import START, RunShape, Tail, read_shape, start_if_any
from pixrl.untrusted import encodable

DEEPEST = 4
"""Folders below the studio's in which runs are looked for."""
GROUPS = ("fuse-compare", "fuse-pairs")
"""Kinds of run that are folders of runs."""
TRAINED = ("align", "personalize")
"""Kinds of run that train a model; the other is fuse."""
HERE = "."
"""The name of the studio's own folder, where that is a run."""
PICTURES = re.compile(
    r"samples/(step-\d{6,}|references)/\d{4,}\.png|samples/selected-\d+-\d+\.png|rollouts/images/\d+\.png"
)
"""The pictures of a run that its page may ask for."""


class State(StrEnum):
    """What a run does."""

    RUNNING = "running"
    STOPPING = "stopping"
    STARTING = "starting"
    STOPPED = "stopped"
    FINISHED = "finished"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class RunData:
    """What a run's folder says at one moment; of a damaged run as much as can be read."""

    name: str
    path: Path
    state: State
    kind: str = ""
    recipe: dict[str, Any] | None = None
    shape: RunShape | None = None
    """Of a run that trains a model."""
    metrics: Sequence[dict[str, float]] = ()
    evaluated: Sequence[dict[str, Any]] = ()
    """The evaluations of the pictures that the gallery lists."""
    manifest: Sequence[ManifestRow] = ()
    error: str = ""
    """Why the run is damaged."""
    version: int = 0
    """Changes whenever the logs or the recipe do."""
    evaluations_version: tuple[int, int] = (0, 0)
    """Changes whenever the evaluations or the recipe do."""

    def but(self, state: State) -> "RunData":
        """Return the same in another state."""
        return replace(self, state=state)

    @property
    def folder(self) -> RunFolder:
        """The run's folder, for the functions that read it."""
        return RunFolder(self.path, self.kind)

    @property
    def total(self) -> int:
        """Steps of the whole run; of a fusion pictures."""
        if self.shape is not None:
            return self.shape.steps
        return int((self.recipe or {}).get("budget", 0))

    @property
    def done(self) -> int:
        """Steps that are done; of a fusion pictures."""
        return len(self.metrics) if self.shape is not None else len(self.manifest)

    @property
    def unit(self) -> str:
        """What the length of the run is counted in."""
        return "steps" if self.shape is not None else "pictures"

    def seconds_left(self) -> float | None:
        """Return the seconds left at the pace of the last twenty steps; None where nothing is known of it."""
        recent = self.metrics[-20:]
        if not recent or self.state is not State.RUNNING:
            return None
        spent = [sum(x for name, x in row.items() if name.startswith("seconds/")) for row in recent]
        done = len(recent) if self.shape is not None else self.done * len(recent) / len(self.metrics)
        return sum(spent) / done * (self.total - self.done)


class WatchedRun:
    """One run folder, of whose logs each `look` reads the new lines alone."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._lock = threading.Lock()
        self._begin()

    def look(self) -> RunData:
        """Read on; what cannot be read is the `error` of what is returned."""
        with self._lock:
            try:
                return self._look()
            except (PixrlError, OSError, ValidationError, UnicodeDecodeError) as error:
                text = sentence(error, self.path)
                return RunData(self.name, self.path, State.DAMAGED, error=text)

    def _begin(self) -> None:
        self._known: tuple[int, ...] = ()
        self._tails = [Tail(self.path / log) for log in (METRICS, EVALUATIONS, MANIFEST)]
        self._rows: list[ManifestRow] = []
        self._metrics: list[dict[str, float]] = []
        self._changes = self._recipes = self._evaluations_changed = 0
        """How often anything, the recipe and the evaluations were other than before."""

    def _look(self) -> RunData:
        refuse_newer(self.path)
        stamps = tuple(_stamp(self.path / name) for name in (place.RECIPE, place.ENVIRONMENT, START))
        if stamps != self._known:
            folder = RunFolder.at(self.path, allow_changed=True)
            self._kind, self._recipe = folder.kind, folder.recipe()
            self._shape = read_shape(folder) if self._kind in TRAINED else None
            self._since = int(start_if_any(folder).get("evaluated_from", 0)) if self._shape is not None else 0
            self._known = stamps
            self._changes, self._recipes = self._changes + 1, self._recipes + 1
        metrics, evaluations, manifest = self._tails
        before = [len(tail.rows) for tail in self._tails]
        known = [tail.update() for tail in self._tails]
        at = min(known[0], len(self._metrics))
        self._metrics[at:] = [finite_or_nan(row) for row in metrics.rows[at:]]
        at = min(known[2], len(self._rows))
        self._rows[at:] = RunFolder(self.path, self._kind).parse_manifest(manifest.rows[at:])
        if known[1] != before[1] or len(evaluations.rows) != before[1]:
            self._evaluations_changed += 1
        self._changes += known != before or [len(tail.rows) for tail in self._tails] != before
        evaluated = [row for row in self._tails[1].rows if row["step"] >= self._since]
        state = self._state(evaluated)
        return RunData(
            self.name,
            self.path,
            state,
            self._kind,
            self._recipe,
            self._shape,
            tuple(self._metrics),
            tuple(evaluated),
            tuple(self._rows),
            version=self._changes,
            evaluations_version=(self._recipes, self._evaluations_changed),
        )

    def _state(self, evaluated: Sequence[dict[str, Any]]) -> State:
        if process_of(self.path) is not None:
            return State.STOPPING if is_stopping(self.path) else State.RUNNING
        if self._shape is None:
            finished = (self.path / "selection.json").is_file()
        else:
            steps = self._shape.steps
            finished = len(self._metrics) >= steps and any(row["step"] == steps for row in evaluated)
        return State.FINISHED if finished else State.STOPPED


class Runs:
    """All runs below one folder."""

    def __init__(self, root: Path) -> None:
        """Watch a folder of runs, or a run.

        Raises:
            InputError: there is no such folder.
        """
        self.root = root.absolute()
        if not self.root.is_dir():
            raise InputError(
                f"There is no folder {root}. Name one that holds runs, or a run: pixrl studio runs; "
                "pixrl align and fuse put theirs under runs/."
            )
        self._watched: dict[str, WatchedRun] = {}

    def names(self) -> list[str]:
        """List the runs by their places below the root, the newest first."""
        found = {HERE: self.root} if place.is_run(self.root) else dict(self._below(self.root, 1))
        self._watched = {
            name: self._watched.get(name) or WatchedRun(name, path) for name, path in found.items()
        }
        return sorted(found, key=lambda name: (-_stamp(found[name] / place.RECIPE), name))

    def look(self, name: str) -> RunData:
        """Read a run on.

        Raises:
            InputError: there is no run of this name here.
        """
        return self.watched(name).look()

    def watched(self, name: str) -> WatchedRun:
        """Return a run by its name. Raises InputError where there is none."""
        if name not in self._watched:
            self.names()
        if name not in self._watched:
            raise InputError(f"There is no run {encodable(name)!r} here any more.")
        return self._watched[name]

    def picture(self, name: str, file: str) -> Path:
        """Return the path of a picture of a run. Raises InputError for any other file."""
        path = self.watched(name).path / file
        if not PICTURES.fullmatch(file) or not path.is_file():
            raise InputError("That picture is not there any more.")
        return path

    def _below(self, folder: Path, depth: int) -> Iterator[tuple[str, Path]]:
        with os.scandir(folder) as entries:
            inside = sorted(
                Path(one.path) for one in entries if one.is_dir() and not one.name.startswith(".")
            )
        for path in inside:
            if place.is_run(path) and _marker(path).get("kind") not in GROUPS:
                yield encodable(path.relative_to(self.root).as_posix()), path
            elif depth < DEEPEST:
                yield from self._below(path, depth + 1)


def refuse_newer(run: Path) -> None:
    """Raise a CheckpointError where a run was made by a newer pixrl than this one."""
    made, own = _marker(run).get("version"), installed_version()
    if isinstance(made, str) and _numbers(made) > _numbers(own) != ():
        raise CheckpointError(
            f"This run was made by pixrl {made}, and this is {own}: update pixrl to look at it."
        )


def sentence(error: BaseException, run: Path) -> str:
    """Return an error as a sentence for the page, in which no whole path stands."""
    if isinstance(error, OSError):
        text = f"{Path(error.filename or run).name} cannot be read: {error.strerror or type(error).__name__}."
    else:
        text = str(error).splitlines()[0]
    return plain(text, run)


def plain(text: str, run: Path) -> str:
    """Return a message about a run as the page shows it: in it no whole path stands."""
    for place_, short in ((run, run.name), (run.parent, ""), (Path.home(), "~")):
        text = text.replace(f"{place_}/", f"{short}/".lstrip("/")).replace(str(place_), short or "the folder")
    return encodable(text)


def _marker(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / place.MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return -1
