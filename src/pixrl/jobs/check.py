"""`pixrl check RUN`: looks at every file of a run, or of a study and its runs, and mends what can be mended.

Only for a run that nobody is writing to. TensorBoard's event files are left out: they repeat the logs, and its reader
bears a torn end.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open

from pixrl.errors import CheckpointError, PixrlError
from pixrl.fusion.config import COMPARE, KIND, PAIRS
from pixrl.jobs.fuse import (
    EXEMPLARS,
    FEATURES,
    SELECTION,
    WORLD,
    read_selection,
    slug,
    world_on_disk,
)
from pixrl.jobs.fuse_many import FAILURES, read_failures
from pixrl.runs import checkpoint
from pixrl.runs import place as run_place
from pixrl.runs.config import KINDS
from pixrl.runs.files import remove, write_atomic
from pixrl.runs.folder import JsonLines, RunFolder
from pixrl.runs.log import coefficients_file
from pixrl.runs.place import CHILDREN, REPLACED
from pixrl.runs.reading import (
    SCORES,
    START,
    evaluated_places,
    gallery_on_disk,
    start_in_checkpoint,
    start_on_disk,
    step_of_place,
)

RECORDS = "records.jsonl"
"""What a study has in place of a run's logs."""
RESUMED = "pixrl resume writes it again"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run."""

    file: str
    """Relative to the run's folder."""
    problem: str
    remedy: str
    """What --repair does, or did; or what a person can do."""
    mend: Callable[[], object] | None = None
    """Does it; None where it cannot be mended here."""
    repaired: bool = False


@dataclass(frozen=True)
class Checked:
    """The result of a check: everything that was found in a run."""

    run: Path
    kind: str
    files: int
    """How many were looked at."""
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    """What is good to know and not wrong."""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong, or all of it was mended."""
        return all(one.repaired for one in self.findings)

    def lines(self) -> Iterator[str]:
        """Return the findings as lines of text."""
        for one in self.findings:
            done = "mended: " if one.repaired else ("--repair: " if one.mend else "")
            yield f"{one.file}: {one.problem} ({done}{one.remedy})"
        yield from self.notes
        wrong = sum(not one.repaired for one in self.findings)
        verdict = "all is well" if not self.findings else ("all is mended" if self.good else f"{wrong} wrong")
        yield f"{self.run} ({self.kind}): looked at {self.files} files, {verdict}."

    def to_json(self) -> dict[str, Any]:
        """Return the findings as `pixrl check --json` prints them."""
        return {
            "run": str(self.run),
            "kind": self.kind,
            "good": self.good,
            "files": self.files,
            "findings": [
                {"file": f.file, "problem": f.problem, "remedy": f.remedy, "repaired": f.repaired}
                for f in self.findings
            ],
            "notes": list(self.notes),
        }


def check(run: Path, *, repair: bool = False) -> Checked:
    """Look at every file of a run, and with `repair` mend what can be mended.

    Raises:
        RunError: there is no run.
        CheckpointError: its recipe cannot be read, or is not the one that it began with.
    """
    path = Path(run).absolute()
    run_place.finish_replacing(path)
    folder = RunFolder.at(path)
    inspection = _Inspection(folder, repair)
    inspection.look()
    return inspection.result()


class _Inspection:
    """One walk through a run."""

    def __init__(self, folder: RunFolder, repair: bool) -> None:
        self.folder = folder
        self.path = folder.path
        self.repair = repair
        self.findings: list[Finding] = []
        self.notes: list[str] = []

    def look(self) -> None:
        """Look at everything in the order in which one damage hides another: leftovers, logs, checkpoints, pictures."""
        for left in run_place.left_by_kills(self.path):
            self._found(left, "left over by a process that was killed", "remove it", partial(remove, left))
        aside = self.path / REPLACED
        if aside.exists() and run_place.has_saved(self.path):
            self._found(aside, "the run that this one replaced", "remove it", self.folder.step_is_saved)
        elif aside.exists():
            self.notes.append(f"The run that this one replaces waits in {REPLACED} for its first saved step.")
        rows = [self._log(log) for log in self.folder.logs()]
        self._log(JsonLines(self.path / RECORDS, self.path))
        self._checkpoints(len(rows[0]))
        self._manifest(rows[0])
        if self.folder.kind in KINDS:
            self._alignment()
        elif self.folder.kind == KIND:
            self._fusion(rows[0])
        elif self.folder.kind in (COMPARE, PAIRS):
            try:
                read_failures(self.folder)
            except CheckpointError:
                self._found(self.path / FAILURES, "damaged", RESUMED)
        for child in sorted([*self.path.glob(f"{CHILDREN}/*"), *self.path.glob(f"{CHILDREN}/*/*")]):
            if run_place.is_run(child):
                self._child(child)
        if run_place.is_run(self.path):
            self._others()

    def result(self) -> Checked:
        files = sum(1 for file in self.path.rglob("*") if file.is_file())
        return Checked(self.path, self.folder.kind, files, tuple(self.findings), tuple(self.notes))

    def _found(self, file: Path, problem: str, remedy: str, mend: Callable[[], object] | None = None) -> None:
        inside = file.is_relative_to(self.path)
        name = (file.relative_to(self.path) if inside else file).as_posix()
        repaired = self.repair and mend is not None
        if repaired and mend is not None:
            mend()
        self.findings.append(Finding(name, problem, remedy, mend, repaired))

    def _log(self, log: JsonLines) -> list[dict[str, Any]]:
        """The good rows of a log."""
        state = log.inspect()
        if state.bad_line is not None:
            keep = f"keep lines 1 to {state.bad_line - 1}, from where resume goes on"
            self._found(log.path, f"line {state.bad_line} does not match its checksum", keep, log.repair)
        elif state.torn:
            self._found(log.path, "the last line is torn", "drop it, as resume does", log.repair)
        return state.rows

    def _checkpoints(self, images: int) -> None:
        folders = checkpoint.all_folders(self.path)
        damaged = {folder: problem for folder in folders if (problem := checkpoint.problem_of(folder))}
        good = [folder for folder in folders if folder not in damaged]
        for folder, problem in damaged.items():
            if good:
                self._found(folder, problem, "set it aside", partial(checkpoint.set_aside, folder))
            else:
                self._found(folder, problem, "no good one is left: resume begins with the recipe")
        for folder in good:
            state = checkpoint.read_state(folder) or {}
            if state.get("images", 0) > images:
                self._found(
                    folder,
                    f"it has {state['images']} pictures, and the manifest {images}",
                    "resume goes on from an earlier one and sets it aside",
                )

    def _manifest(self, rows: Sequence[dict[str, Any]]) -> None:
        manifest = self.folder.logs()[0].path
        try:
            listed = self.folder.parse_manifest(rows)
        except CheckpointError as error:
            self._found(manifest, str(error), "open it with the pixrl that wrote it")
            return
        for place, row in enumerate(listed):
            if row.index != place:
                self._found(manifest, f"line {place + 1} has the index {row.index}", "start another run")
                break
        named = {row.file for row in listed if row.file is not None}
        for name in sorted(named):
            self._picture(self.path / name, "the manifest names it; resume does not draw it again")
        for picture in self.folder.pictures():
            if picture.relative_to(self.path).as_posix() not in named:
                self._found(picture, "the manifest does not name it", "remove it", picture.unlink)

    def _picture(self, file: Path, remedy: str) -> None:
        if not file.is_file():
            self._found(file, "missing", remedy)
            return
        try:
            with Image.open(file) as picture:
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            self._found(file, f"no whole picture: {error}", remedy)

    def _alignment(self) -> None:
        start = start_on_disk(self.folder)
        if not start:
            kept = start_in_checkpoint(self.folder)
            content = json.dumps(kept, indent=1).encode() + b"\n"
            put_back = "put back the copy of the newest checkpoint"
            mend = partial(write_atomic, self.path / START, content) if kept else None
            self._found(self.path / START, "missing or damaged", put_back if kept else RESUMED, mend)
        shown = gallery_on_disk(self.folder)
        if shown is None:
            self._found(self.folder.samples_dir / "gallery.json", "missing or damaged", RESUMED)
        for entry in shown or []:
            if "reference" in entry:
                self._picture(self.path / entry["reference"], "the report goes without it")
        logged = {row["step"] for row in self.folder.logs()[2].inspect().rows}
        for place in evaluated_places(self.folder):
            if step_of_place(place) in logged:
                self._evaluation(place)
            else:
                self._found(
                    place, "an evaluation that was not ended", "remove it; resume draws it anew",
                    partial(remove, place),
                )  # fmt: skip

    def _evaluation(self, place: Path) -> None:
        """The pictures of one evaluation; their number is that of its scores."""
        scores = place / SCORES
        count = 0
        if scores.is_file():
            try:
                count = max(
                    (len(x) for x in json.loads(scores.read_text(encoding="utf-8")).values()), default=0
                )
            except (ValueError, AttributeError, TypeError) as error:
                self._found(
                    scores, f"damaged: {error}", "remove it: the report goes without intervals", scores.unlink
                )
        names = {f"{number:04d}.png" for number in range(count)} | {file.name for file in place.glob("*.png")}
        for name in sorted(names):
            self._picture(place / name, "the report goes without it")

    def _fusion(self, rows: Sequence[dict[str, Any]]) -> None:
        world = world_on_disk(self.folder)
        if world is None:
            self._found(self.path / WORLD, "missing or damaged", RESUMED)
        else:
            for concept in world.prompts:
                for number in range(1 if concept in world.pictures else len(world.exemplar_seeds)):
                    file = self.path / EXEMPLARS / f"{slug(concept)}-{number:02d}.png"
                    self._picture(file, "the report goes without it")
            self._tensors(self.path / EXEMPLARS / FEATURES)
        for step in sorted({row["step"] for row in rows}):
            self._tensors(coefficients_file(self.folder, step))
        if not (self.path / SELECTION).is_file():
            return
        again = f"choose anew: pixrl select {self.path}"
        try:
            chosen = read_selection(self.folder)
        except PixrlError:
            self._found(self.path / SELECTION, "damaged", again)
            return
        for place, index in enumerate(chosen.indices, 1):
            self._picture(self.folder.samples_dir / f"selected-{place}-{index:06d}.png", again)

    def _tensors(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            self._found(file, f"missing or damaged: {error}", "nothing that resume needs is in it")

    def _child(self, child: Path) -> None:
        """One run of a folder of fusions."""
        found = check(child, repair=self.repair)
        at = child.relative_to(self.path).as_posix()
        self.findings += [
            Finding(f"{at}/{f.file}", f.problem, f.remedy, f.mend, f.repaired) for f in found.findings
        ]
        self.notes += [f"{at}: {note}" for note in found.notes]

    def _others(self) -> None:
        for name in run_place.foreign(self.path):
            self.notes.append(f"{name} is not pixrl's; --force would not replace a run that holds it.")
        for aside in sorted((self.path / "checkpoints").glob(f"*{checkpoint.SET_ASIDE}")):
            self.notes.append(f"checkpoints/{aside.name} was set aside; nothing reads it.")
