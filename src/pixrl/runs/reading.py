"""What a run's folder says, for pages and for a run that goes on: evaluations, gallery, start, findings of the guard.

Nothing here loads torch or the code of a method, so that a page of a run costs little and runs nothing of the run's.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from PIL import Image

from pixrl.errors import CheckpointError
from pixrl.runs import checkpoint
from pixrl.runs.folder import EVALUATIONS, JsonLines, RunFolder, scan_lines

SCORES = "scores.json"
"""The file of scores beside an evaluation's pictures."""
STEP = "step-"
START = "start.json"
GALLERY = "samples/gallery.json"
SIMILARITY = "S/"
"""Before a concept's name: the score of a picture's similarity to it."""
TRUE_FUSION = "true_fusion"
"""The balance of a true fusion, 0 of everything else; with / and a concept behind it, that concept's share."""
VERDICT = "verdict"
"""Among a picture's further facts: what it is, in place of a fusion."""
FINDINGS = "guard.json"
"""Beside an evaluation's pictures: every signal of it."""
TRAINED, MEASURED, HELD_OUT = "trained on", "only measured", "never trained on"
"""The roles of a reward in a run; `MEASURED` where it learns from no score at all."""
JsonT = TypeVar("JsonT", bound=dict[str, Any] | list[dict[str, Any]])


@dataclass(frozen=True)
class Signal:
    """One signal of an evaluation, held against the first one."""

    name: str
    before: float
    after: float
    moved: float
    """In standard deviations of the first values; of diversity the share that is left; of distance the distance."""
    p: float
    """The probability of moving as far by chance; nan where nothing was tested."""
    found: bool

    def text(self) -> str:
        """Say what the signal has done, in words for a person."""
        unit = "standard deviations" if self.name not in ("diversity", "distance") else "of the first"
        how = f"{self.moved:+.1f} {unit}" if unit != "of the first" else f"{self.moved:.2f}"
        return f"{self.name} {self.before:.3g} to {self.after:.3g} ({how})"


@dataclass(frozen=True)
class RunShape:
    """What a page has to know of an alignment's recipe; start.json keeps it (`shape`), since only the method knows."""

    steps: int
    roles: Mapping[str, str]
    """Reward -> role, in the recipe's order."""
    noises: int
    group_size: int
    per_prompt: int
    """Pictures of a prompt in an evaluation."""
    pictures: str = ""
    """Whose pictures training scored, where the trained model did not draw them."""

    @property
    def learned(self) -> bool:
        """Whether the run learns from scores."""
        return MEASURED not in self.roles.values()


def read_shape(folder: RunFolder) -> RunShape:
    """Read the shape of an alignment from start.json.

    A run of before it was kept is read by its recipe alone: as one that learns from every reward that is not held out.

    Raises:
        CheckpointError: the recipe is damaged.
    """
    kept = start_if_any(folder).get("shape")
    recipe = folder.recipe()
    try:
        if kept is not None:
            return RunShape(**kept)
        explored = recipe["exploration"]
        return RunShape(
            int(recipe["steps"]),
            {one["name"]: HELD_OUT if one["held_out"] else TRAINED for one in recipe["rewards"]},
            int(explored["noises"]),
            int(explored["noises"]) * int(explored.get("variants", 1)),
            int(recipe["evaluation"]["per_prompt"]),
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{folder.path} does not say how many steps, rewards and pictures it has: it was written by another "
            "version of pixrl, or is damaged."
        ) from None


def evaluations(path: Path) -> list[dict[str, Any]]:
    """Read all evaluations of a run folder in order: `step` and figures by name, None where one is not finite."""
    return JsonLines(Path(path) / EVALUATIONS, Path(path)).read()


def evaluated_places(folder: RunFolder) -> list[Path]:
    """List the folders of evaluations' pictures, oldest first."""
    found = folder.samples_dir.glob(f"{STEP}[0-9]*")
    return sorted((place for place in found if place.name.removeprefix(STEP).isdigit()), key=step_of_place)


def step_of_place(place: Path) -> int:
    """Return the training step before which the pictures in an evaluation's folder were drawn."""
    return int(place.name.removeprefix(STEP))


def samples_of(folder: RunFolder, step: int) -> Path:
    """Return the folder of the pictures of the evaluation before training step `step`."""
    return folder.samples_dir / f"{STEP}{step:06d}"


def sample_scores(folder: RunFolder, step: int) -> dict[str, list[float | None]]:
    """Read the scores of an evaluation's pictures.

    Returns:
        Reward -> score by picture number, None where scoring failed; empty of a run that kept no scores.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = samples_of(folder, step) / SCORES
    if not file.is_file():
        return {}
    try:
        scores: dict[str, list[float | None]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged ({error}). Delete it: the report then goes without intervals."
        ) from None
    return scores


def read_findings(folder: RunFolder, step: int) -> tuple[Signal, ...]:
    """Read what the guard saw in an evaluation; () of the first one, and of runs of before there was a guard."""
    file = samples_of(folder, step) / FINDINGS
    try:
        rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        return tuple(Signal(**{**row, "p": math.nan if row["p"] is None else row["p"]}) for row in rows)
    except (ValueError, TypeError, KeyError):
        return ()  # it says nothing that cannot be seen again


def start_if_any(folder: RunFolder) -> dict[str, Any]:
    """Read what a run began with; {} of one that has neither the file nor a checkpoint."""
    return start_on_disk(folder) or start_in_checkpoint(folder)


def start_on_disk(folder: RunFolder) -> dict[str, Any]:
    """Read start.json; {} where it is missing or damaged."""
    return _read_json(folder.path / START, dict) or {}


def start_in_checkpoint(folder: RunFolder) -> dict[str, Any]:
    """Read the newest whole checkpoint's copy of start.json; {} where there is none, as in older runs."""
    newest = checkpoint.latest(folder.path)
    state = None if newest is None else checkpoint.read_state(newest)
    found: dict[str, Any] = (state or {}).get("start", {})
    return found


def gallery_on_disk(folder: RunFolder) -> list[dict[str, Any]] | None:
    """Read samples/gallery.json; None where it is missing or damaged."""
    return _read_json(folder.path / GALLERY, list)


def _read_json(path: Path, kind: type[JsonT]) -> JsonT | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, kind) else None


def comparable_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the evaluations of the pictures that the gallery lists, in order."""
    since = start_if_any(folder).get("evaluated_from", 0)
    return [row for row in evaluations(folder.path) if row["step"] >= since]


def base_and_last(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the base's evaluation and the newest one of the same pictures; [] where there are not both."""
    rows = comparable_evaluations(folder)
    return [rows[0], rows[-1]] if len(rows) > 1 and rows[0]["step"] == 0 else []


def gallery_entries(folder: RunFolder) -> list[dict[str, Any]]:
    """Return one entry a picture of an evaluation: number, prompt, seed; subject and reference where it has them.

    Raises:
        CheckpointError: the file that lists them is damaged.
    """
    if not (folder.path / GALLERY).is_file():  # it stopped before its first step
        return []
    entries = gallery_on_disk(folder)
    if entries is None:
        raise CheckpointError(
            f"{folder.path / GALLERY} is damaged. Type: pixrl resume {folder.path}, which writes it again."
        )
    return entries


def before_and_after(folder: RunFolder) -> Iterator[tuple[dict[str, Any], Path, Path]]:
    """Yield each entry of the gallery with its pictures at the first and the last evaluation, where both are there."""
    folders = [samples_of(folder, row["step"]) for row in base_and_last(folder)]
    for entry in gallery_entries(folder) if folders else []:
        first, last = folders
        name = f"{entry['number']:04d}.png"
        if (first / name).is_file() and (last / name).is_file():
            yield entry, first / name, last / name


class Pictures(Sequence[Image.Image]):
    """The pictures of a run, read from its folder when asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, place: int) -> Image.Image: ...

    @overload
    def __getitem__(self, place: slice) -> "Pictures": ...

    def __getitem__(self, place: int | slice) -> "Image.Image | Pictures":
        if isinstance(place, slice):
            return Pictures(self.files[place])
        with Image.open(self.files[place]) as picture:
            return picture.convert("RGB")

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[place] for place in range(len(self)))


class Tail:
    """A log that grows, of which each `update` reads the new lines alone; what was cut back is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._end = 0
        self._file: tuple[int, int] | None = None
        self._last = b""

    def update(self) -> int:
        """Read on, and return how many of the rows were known before: fewer than were there where the log was cut back.

        Raises:
            CheckpointError: a line with more behind it does not match its checksum; the rows before it are kept.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._forget()
            return 0
        with file:
            status = os.fstat(file.fileno())
            file.seek(self._end - len(self._last))
            if self._file != (status.st_dev, status.st_ino) or file.read(len(self._last)) != self._last:
                self._forget()
                self._file = (status.st_dev, status.st_ino)
                file.seek(0)
            known, content = len(self.rows), file.read()
        scan = scan_lines(content)
        if scan.ends:
            before = scan.ends[-2] if len(scan.ends) > 1 else 0
            self._last = content[before : scan.ends[-1]]
            self._end += scan.good_bytes
            self.rows += scan.rows
        if scan.bad_line is not None:
            raise CheckpointError(
                f"{self.path.name}, line {known + scan.bad_line}, does not match its checksum: the run is damaged."
            )
        return known

    def _forget(self) -> None:
        self.rows, self._end, self._last, self._file = [], 0, b"", None
