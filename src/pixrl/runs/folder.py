"""A run is a folder, and the folder is the interface: `docs/run_folder.md` is its contract.

`RunFolder` writes and reads it, its logs as JSON lines that survive a crash. Whatever a method returned from is on the
disk; a crash in between leaves at most a torn last line and files beside, which the next start drops. Where a folder
lies, and what is replaced, is `place.py`'s.
"""

import contextlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pixrl import config
from pixrl.errors import CheckpointError, ConfigError, RunError, ShapeError
from pixrl.runs import checkpoint
from pixrl.runs import place as run_place
from pixrl.runs.environment import describe
from pixrl.runs.files import (
    disk_guard,
    fsync_folder,
    remove,
    sha256,
    write_all,
    write_all_atomic,
    write_atomic,
)
from pixrl.runs.place import ENVIRONMENT, RECIPE
from pixrl.runs.process import forget_the_dead
from pixrl.untrusted import parse_json

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scan:
    """The content of a log: the good rows from the start, the offset behind each, and where it goes wrong."""

    rows: list[dict[str, Any]]
    ends: list[int]
    bad_line: int | None
    """1-based number of the first bad line, when it is not merely a torn last line."""
    torn: bool = False
    """Whether the last line is torn, which a kill in the middle of writing leaves."""

    @property
    def good_bytes(self) -> int:
        """The size of the good rows."""
        return self.ends[-1] if self.ends else 0


class JsonLines:
    """A log of JSON lines with a checksum each, to which rows are appended durably."""

    def __init__(self, path: Path, run: Path, *, repair: str = "pixrl resume {run} --repair") -> None:
        """Name a log, which need not exist yet.

        Args:
            path: the file.
            run: its run's folder, for messages.
            repair: the command that goes on from the last good line, for the message about a damaged one.
        """
        self.path = path
        self._repair = repair.format(run=run)
        self._size: int | None = None
        """Bytes that the file should have, as far as this writer knows; None before it looked."""

    def read(self) -> list[dict[str, Any]]:
        """Read all rows, without their checksums; a torn last line is dropped. Raises CheckpointError for damage."""
        return self._scan().rows

    def inspect(self) -> Scan:
        """Scan the file, damaged or not."""
        return self._scan(strict=False)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, which on return are on the disk.

        Raises:
            RunError: the disk is full, and none of the rows is kept; or another process has written to the file, since
                two that resume one run would spoil it.
        """
        if self._size is None:
            self._cut(self._scan().good_bytes)
        bodies = (json.dumps(row, ensure_ascii=False, allow_nan=False)[:-1] for row in rows)
        content = "".join(f'{body}, "crc": "{zlib.crc32(body.encode()):08x}"}}\n' for body in bodies).encode()
        is_new = not self.path.exists()
        with disk_guard(self.path, len(content)):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                if before != self._size:
                    raise RunError(
                        f"{self.path} was changed by another process, so this one stops. Let one finish the run."
                    )
                try:
                    write_all(descriptor, content)
                    os.fsync(descriptor)
                except BaseException:
                    os.ftruncate(descriptor, before)
                    raise
                self._size = before + len(content)
            finally:
                os.close(descriptor)
            if is_new:
                fsync_folder(self.path.parent)

    def keep(self, count: int) -> None:
        """Cut the file behind its first `count` rows. Raises CheckpointError where there are fewer."""
        ends = self._scan().ends
        if count > len(ends):
            raise CheckpointError(f"{self.path} has {len(ends)} rows, not {count}.")
        self._cut(ends[count - 1] if count else 0)

    def repair(self) -> int:
        """Cut the file behind its last good line, and return the number of good lines."""
        scan = self._scan(strict=False)
        self._cut(scan.good_bytes)
        return len(scan.rows)

    def _cut(self, size: int) -> None:
        self._size = size
        if not self.path.exists() or self.path.stat().st_size == size:
            return
        with self.path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def _scan(self, strict: bool = True) -> Scan:
        scan = scan_lines(self.path.read_bytes() if self.path.exists() else b"")
        if strict and scan.bad_line is not None:
            good = (
                f"Lines 1 to {scan.bad_line - 1} are good"
                if scan.bad_line > 1
                else "No line before it is left"
            )
            raise CheckpointError(
                f"{self.path}, line {scan.bad_line}: does not match its checksum. {good}; to go on from there, "
                f"type: {self._repair}"
            )
        return scan


def scan_lines(content: bytes) -> Scan:
    """Check the lines of a log, or of a part of one that begins with a line."""
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    lines = io.BytesIO(content).readlines()
    end = 0
    for number, line in enumerate(lines, 1):
        row = None
        body, mark, tail = line.rpartition(b', "crc": "')
        if mark and tail == b'%08x"}\n' % zlib.crc32(body):
            with contextlib.suppress(ValueError, TypeError):
                row = dict(parse_json(body + b"}"))
        if row is None:
            torn = number == len(lines)
            return Scan(rows, ends, None if torn else number, torn)
        end += len(line)
        rows.append(row)
        ends.append(end)
    return Scan(rows, ends, None)


METRICS = "metrics.jsonl"
MANIFEST = "rollouts/manifest.jsonl"
IMAGES = "rollouts/images"
SAMPLES = "samples"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations.jsonl"
REPORT = "report.html"
KNOWN, BEFORE = "recipe_sha256", "recipe_sha256_before"
"""Where environment.json keeps the checksum of recipe.yaml, and of the one before it was changed by `resume --set`."""


class ManifestRow(BaseModel):
    """One image of a run: one line of `rollouts/manifest.jsonl`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    index: int = Field(ge=0)
    step: int = Field(ge=0)
    concepts: tuple[str, ...] | None = None
    prompt: str | None = None
    seed: int
    variant: int | None = None
    scores: dict[str, float | None] = Field(default_factory=dict)
    """None where scoring failed, never 0."""
    failed: str | None = None
    """Why scoring failed, or None."""
    file: str | None = None
    """The picture, relative to the run folder."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More about the image, such as a summary of the coefficients."""

    @field_validator("scores")
    @classmethod
    def _nan_is_none(cls, scores: dict[str, float | None]) -> dict[str, float | None]:
        return {name: None if x is None or math.isnan(x) else x for name, x in scores.items()}


class RunFolder:
    """One run on the disk, made by `create` or `open`."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self._manifest = JsonLines(path / MANIFEST, path)
        self._metrics = JsonLines(path / METRICS, path)

    @staticmethod
    def create(path: Path, *, kind: str, recipe: BaseModel, force: bool = False) -> "RunFolder":
        """Make the folder of a new run.

        Args:
            path: where.
            kind: the command that makes the run: fuse, align, ...
            recipe: its settings.
            force: set an existing run aside until the new one has saved its first step (`run_place.replacing`).

        Raises:
            RunError: the place is taken.
        """
        path = Path(path).absolute()
        recipe_text = f"kind: {kind}\n{config.dump(recipe)}".encode()
        environment = describe(recipe.model_dump().get("seed"), sha256(recipe_text))
        files = {RECIPE: recipe_text, ENVIRONMENT: environment}
        run_place.make(path, kind, files, (IMAGES, SAMPLES, CHECKPOINTS), force=force)
        return RunFolder(path, kind)

    @staticmethod
    def open(path: Path, *, repair: bool = False, allow_changed: bool = False) -> "RunFolder":
        """Open an existing run and check its recipe and logs.

        Args:
            path: the folder.
            repair: cut damaged logs behind their last good lines.
            allow_changed: the caller itself compares a recipe that was edited after the run began.

        Raises:
            RunError: there is no run.
            CheckpointError: the recipe was edited, or a log is damaged.
        """
        run = RunFolder.at(path, allow_changed=allow_changed)
        if repair:
            for log in run.logs():
                log.repair()
        run.manifest()
        run.metrics()
        return run

    @staticmethod
    def at(path: Path, *, allow_changed: bool = False) -> "RunFolder":
        """Open an existing run as `open` does, without reading its logs."""
        path = Path(path).absolute()
        run_place.finish_replacing(path)
        recipe, _ = _read_recipe(path, allow_changed)
        try:
            kind = config.parse_yaml(recipe.decode(), str(path / RECIPE))["kind"]
        except (UnicodeDecodeError, TypeError, KeyError, ConfigError):
            raise CheckpointError(
                f"{path / RECIPE} is no recipe of a run: it is damaged. Put it back."
            ) from None
        return RunFolder(path, str(kind))

    def logs(self) -> tuple[JsonLines, JsonLines, JsonLines]:
        """Return the logs: the manifest, the metrics and the evaluations, which only alignments have."""
        return self._manifest, self._metrics, JsonLines(self.path / EVALUATIONS, self.path)

    def is_edited(self) -> bool:
        """Return whether recipe.yaml was changed since pixrl wrote it."""
        return _read_recipe(self.path, allow_changed=True)[1]

    def adopt_recipe(self, recipe: BaseModel) -> None:
        """Give the run another recipe, with which the caller has found that it can go on.

        A kill in between leaves one of the two recipes, and the folder accepts both.
        """
        text = f"kind: {self.kind}\n{config.dump(recipe)}".encode()
        environment = json.loads((self.path / ENVIRONMENT).read_text(encoding="utf-8"))
        environment[BEFORE] = environment[KNOWN]
        environment[KNOWN] = sha256(text)
        content = json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / ENVIRONMENT, content.encode())
        write_atomic(self.path / RECIPE, text)

    def tidy(self) -> None:
        """Remove what killed processes left. Only the process that goes on with the run may do so."""
        for path in run_place.left_by_kills(self.path):
            remove(path)
        forget_the_dead(self.path)
        if run_place.has_saved(self.path):
            run_place.drop_replaced(self.path)

    def cut_back(self, step: int, images: int) -> None:
        """Drop all that was written after the checkpoint of `step`, at which the manifest had `images` rows."""
        self.truncate_manifest(images)
        self.truncate_metrics(step)
        for picture in self.pictures():
            if int(picture.stem) >= images:
                picture.unlink()
        checkpoint.set_aside_after(self.path, step)

    def pictures(self) -> list[Path]:
        """List the pictures in rollouts/images by number, whether the manifest names them or not."""
        return sorted((self.path / IMAGES).glob("[0-9]*.png"), key=lambda file: int(file.stem))

    def step_is_saved(self) -> None:
        """Delete the run that this one replaced, if any: the new one can now be resumed from a saved step."""
        run_place.drop_replaced(self.path)

    def recipe_text(self) -> str:
        """Read the text of the resolved recipe, `kind` first."""
        return (self.path / RECIPE).read_text(encoding="utf-8")

    def recipe(self) -> dict[str, Any]:
        """Read the resolved recipe as a mapping, as `config.load` takes it."""
        return dict(config.parse_yaml(self.recipe_text(), str(self.path / RECIPE)))

    @property
    def samples_dir(self) -> Path:
        """The folder of pictures for people: selected ones, those of evaluations, contact sheets."""
        return self.path / SAMPLES

    @property
    def checkpoints_dir(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def report_path(self) -> Path:
        """The file of the report."""
        return self.path / REPORT

    def append_manifest(self, rows: Sequence[ManifestRow]) -> None:
        """Append images to the manifest; on return they, and the names of their files, are on the disk."""
        fsync_folder(self.path / IMAGES)
        self._manifest.append([row.model_dump(mode="json") for row in rows])

    def manifest(self) -> list[ManifestRow]:
        """Read all images so far; a torn last line is dropped. Raises CheckpointError for a damaged manifest."""
        return self.parse_manifest(self._manifest.read())

    def parse_manifest(self, rows: Sequence[Mapping[str, Any]]) -> list[ManifestRow]:
        """Validate lines of the manifest. Raises CheckpointError for those of another version of pixrl."""
        try:
            return [ManifestRow.model_validate(row) for row in rows]
        except ValidationError as error:
            raise CheckpointError(
                f"{self.path / MANIFEST} was written by another version of pixrl: {error}"
            ) from None

    def truncate_manifest(self, count: int) -> None:
        """Drop all but the first `count` images, as resume does to go on from a checkpoint."""
        self._manifest.keep(count)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; a figure that is not finite is written as null."""
        finite = {name: float(x) if math.isfinite(x) else None for name, x in metrics.items()}
        self._metrics.append([{"step": step, **finite}])

    def metrics(self) -> list[dict[str, float]]:
        """Read all lines of metrics.jsonl, null as nan."""
        return [finite_or_nan(row) for row in self._metrics.read()]

    def truncate_metrics(self, from_step: int) -> None:
        """Drop the metrics of `from_step` and later, which a resumed run writes again."""
        steps = [row["step"] for row in self._metrics.read()]
        first = next((i for i, step in enumerate(steps) if step >= from_step), len(steps))
        self._metrics.keep(first)

    def save_image(self, index: int, image_CHW: "Tensor") -> str:
        """Write one picture as rollouts/images/000012.png, and return that path, relative to the run folder."""
        return self.save_images([index], [image_CHW])[0]

    def save_images(self, indices: Sequence[int], images_CHW: Iterable["Tensor"]) -> list[str]:
        """Write pictures and return their paths in the run's folder; `images_CHW` may be a tensor [B, 3, H, W]."""
        names = [f"{IMAGES}/{index:06d}.png" for index in indices]
        pictures = (png_bytes(image_CHW) for image_CHW in images_CHW)
        write_all_atomic({self.path / name: png for name, png in zip(names, pictures, strict=True)})
        return names


def finite_or_nan(row: Mapping[str, float | None]) -> dict[str, float]:
    """Return a line of metrics with nan where it has null."""
    return {name: math.nan if x is None else x for name, x in row.items()}


def png_bytes(image_CHW: "Tensor") -> bytes:
    """Encode an RGB picture [3, H, W] in [0, 1] as PNG. Raises ShapeError for any other shape."""
    if image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
        raise ShapeError(f"A picture is [3, H, W], not {list(image_CHW.shape)}.")
    pixels = (
        image_CHW.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().cpu()
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _read_recipe(path: Path, allow_changed: bool) -> tuple[bytes, bool]:
    """The recipe of a run, and whether it is another one than pixrl wrote, which is refused unless allowed."""
    if not path.is_dir():
        raise RunError(
            f"There is no run folder {path}. Name one that fuse, align or personalize made (--out DIR)."
        )
    missing = [name for name in (RECIPE, ENVIRONMENT) if not (path / name).is_file()]
    if missing:
        advice = (
            "Nothing was drawn there yet: type the command that starts it."
            if run_place.is_blank(path)
            else "Put it back, or start another run in another folder."
        )
        raise RunError(f"{path} is no run, or only half of one: {' and '.join(missing)} missing. {advice}")
    recipe = (path / RECIPE).read_bytes()
    environment = config.parse_yaml(
        (path / ENVIRONMENT).read_text(encoding="utf-8", errors="replace"), ENVIRONMENT
    )
    found = environment if isinstance(environment, dict) else {}
    edited = sha256(recipe) not in (found.get(KNOWN), found.get(BEFORE))
    if KNOWN not in found or (edited and not allow_changed):
        raise CheckpointError(
            f"{path / RECIPE} does not match its checksum in {ENVIRONMENT}: one of them was changed after the run "
            f"began. Put it back, or start a new run from it: --recipe {path / RECIPE}"
        )
    return recipe, edited
