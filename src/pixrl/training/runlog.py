"""A run is a folder, and the folder is the interface: `docs/run_folder.md` is its contract.

`RunFolder` writes and reads it. Whatever a method returned from is on the disk; a crash in between leaves at most a
torn last line, which the next start drops.
"""

import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from pixrl import config
from pixrl.errors import CheckpointError, RunError, ShapeError
from pixrl.training.environment import describe
from pixrl.training.files import (
    disk_guard,
    fsync_folder,
    replace_folder,
    sha256,
    write_all_atomic,
    write_durable,
)
from pixrl.training.jsonl import JsonLines

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
MANIFEST = "rollouts/manifest.jsonl"
IMAGES = "rollouts/images"
SAMPLES = "samples"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
OWN_NAMES = {RECIPE, ENVIRONMENT, METRICS, REPORT, SAMPLES, CHECKPOINTS, "rollouts"}


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
    """One run on disk. Made by `create` or `open`."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self._manifest = JsonLines(path / MANIFEST, path)
        self._metrics = JsonLines(path / METRICS, path)

    @staticmethod
    def create(path: Path, *, kind: str, recipe: BaseModel, force: bool = False) -> "RunFolder":
        """Starts a run in a new folder. An existing run is refused, or with `force` replaced."""
        path = Path(path).absolute()
        _refuse_existing(path, force)
        recipe_text = f"kind: {kind}\n{config.dump(recipe)}".encode()
        environment = describe(recipe.model_dump().get("seed"), sha256(recipe_text))
        new = path.with_name(f".{path.name}.{os.getpid()}.new")
        with disk_guard(path, len(recipe_text) + len(environment)):
            try:
                (new / IMAGES).mkdir(parents=True)
                (new / SAMPLES).mkdir()
                (new / CHECKPOINTS).mkdir()
                write_durable(new / RECIPE, recipe_text)
                write_durable(new / ENVIRONMENT, environment)
                replace_folder(new, path)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return RunFolder(path, kind)

    @staticmethod
    def open(path: Path, *, repair: bool = False, allow_changed: bool = False) -> "RunFolder":
        """An existing run, checked. `repair` drops what lies behind the last good line of damaged logs.

        `allow_changed`: the caller itself compares a recipe that was edited after the run began.
        """
        path = Path(path).absolute()
        recipe = _read_recipe(path, allow_changed)
        kind = config.parse_yaml(recipe.decode(), str(path / RECIPE)).get("kind")
        run = RunFolder(path, str(kind))
        if repair:
            run._manifest.repair()
            run._metrics.repair()
        run.manifest()
        run.metrics()
        return run

    def adopt_recipe(self, recipe: BaseModel) -> None:
        """From now on the run has another recipe; the caller has found that it can go on with it."""
        text = f"kind: {self.kind}\n{config.dump(recipe)}".encode()
        environment = json.loads((self.path / ENVIRONMENT).read_text(encoding="utf-8"))
        environment["recipe_sha256"] = sha256(text)
        content = json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
        write_all_atomic({self.path / RECIPE: text, self.path / ENVIRONMENT: content.encode()})
        fsync_folder(self.path)

    def recipe_text(self) -> str:
        """The resolved recipe, `kind` first."""
        return (self.path / RECIPE).read_text(encoding="utf-8")

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as `config.load` takes it."""
        return dict(config.parse_yaml(self.recipe_text(), str(self.path / RECIPE)))

    @property
    def samples_dir(self) -> Path:
        """For pictures shown to people: selected, periodic, contact sheets."""
        return self.path / SAMPLES

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def report_path(self) -> Path:
        return self.path / REPORT

    def append_manifest(self, rows: Sequence[ManifestRow]) -> None:
        """Adds images to the manifest; on return they, and their pictures' names, are on the disk."""
        fsync_folder(self.path / IMAGES)
        self._manifest.append([row.model_dump(mode="json") for row in rows])

    def manifest(self) -> list[ManifestRow]:
        """All images so far. Raises CheckpointError for a damaged manifest; a torn last line is dropped."""
        try:
            return [ManifestRow.model_validate(row) for row in self._manifest.read()]
        except ValidationError as error:
            raise CheckpointError(
                f"{self.path / MANIFEST} was written by another version of pixrl: {error}"
            ) from None

    def truncate_manifest(self, count: int) -> None:
        """Keeps the first `count` images; resume does so to go on from its checkpoint."""
        self._manifest.keep(count)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one line to metrics.jsonl; a figure that is not finite is kept as null."""
        finite = {name: float(x) if math.isfinite(x) else None for name, x in metrics.items()}
        self._metrics.append([{"step": step, **finite}])

    def metrics(self) -> list[dict[str, float]]:
        """All logged lines, null read back as nan."""
        return [
            {name: math.nan if x is None else x for name, x in row.items()} for row in self._metrics.read()
        ]

    def truncate_metrics(self, from_step: int) -> None:
        """Drops the lines of `from_step` and later, which a resumed run writes anew."""
        steps = [row["step"] for row in self._metrics.read()]
        first = next((i for i, step in enumerate(steps) if step >= from_step), len(steps))
        self._metrics.keep(first)

    def save_image(self, index: int, image_CHW: Tensor) -> str:
        """Writes rollouts/images/000012.png; returns that name, relative to the run folder."""
        return self.save_images([index], [image_CHW])[0]

    def save_images(self, indices: Sequence[int], images_CHW: Iterable[Tensor]) -> list[str]:
        """Several pictures (a step's) at a time; `images_CHW` may be one tensor [B, 3, H, W]."""
        names = [f"{IMAGES}/{index:06d}.png" for index in indices]
        pictures = (png_bytes(image_CHW) for image_CHW in images_CHW)
        write_all_atomic({self.path / name: png for name, png in zip(names, pictures, strict=True)})
        return names


def png_bytes(image_CHW: Tensor) -> bytes:
    """An RGB picture in [0, 1] as a PNG file."""
    if image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
        raise ShapeError(f"A picture is [3, H, W], not {list(image_CHW.shape)}.")
    pixels = (
        image_CHW.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().cpu()
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _refuse_existing(path: Path, force: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file; --out names the run's folder. Choose another.")
    names = {entry.name for entry in path.iterdir()}
    is_run = names >= {RECIPE, ENVIRONMENT} or names <= OWN_NAMES
    if not is_run:
        raise RunError(
            f"{path} exists and is no run of pixrl, so nothing in it is replaced. Choose another --out."
        )
    if not force:
        raise RunError(
            f"{path} already holds a run. Go on with it: pixrl resume {path}. Replace it: add --force. "
            f"Or choose another --out."
        )


def _read_recipe(path: Path, allow_changed: bool) -> bytes:
    """The recipe of a run, after checking that the folder is a run and the recipe is the one it began with."""
    if not path.is_dir():
        raise RunError(
            f"There is no run folder {path}. Name one that fuse, align or personalize made (--out DIR)."
        )
    missing = [name for name in (RECIPE, ENVIRONMENT) if not (path / name).is_file()]
    if missing:
        raise RunError(
            f"{path} is no run, or only half of one: {' and '.join(missing)} missing. Start it anew."
        )
    recipe = (path / RECIPE).read_bytes()
    environment = config.parse_yaml(
        (path / ENVIRONMENT).read_text(encoding="utf-8", errors="replace"), ENVIRONMENT
    )
    known = environment.get("recipe_sha256") if isinstance(environment, dict) else None
    if known is None or (known != sha256(recipe) and not allow_changed):
        raise CheckpointError(
            f"{path / RECIPE} does not match its checksum in {ENVIRONMENT}: one of them was changed after the run "
            f"began. Put it back, or start a new run from it: --recipe {path / RECIPE}"
        )
    return recipe
