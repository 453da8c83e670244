"""`pixrl fuse` as a run folder: start it, go on with it, choose from it. The report is written a layer above."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pixrl import config as recipes
from pixrl.algorithms.fusion.policy import PolicySampler
from pixrl.data.pairs import check_concepts
from pixrl.doctor.diagnosis import require
from pixrl.doctor.fusion import examine_fusion
from pixrl.errors import CheckpointError, RunError
from pixrl.fusion.config import KIND, FuseConfig, open_run
from pixrl.fusion.select import Selection, choose, choose_thresholds, similarities_of
from pixrl.fusion.trainer import FailureWatch, FusionTrainer, read_policy
from pixrl.fusion.world import FusionSession, FusionWorld, load_world
from pixrl.hub import Presence
from pixrl.plugins import changed_files
from pixrl.rewards.weights import part
from pixrl.runs import checkpoint
from pixrl.runs.display import Extent, Monitor, Silent
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import ManifestRow, RunFolder, png_bytes
from pixrl.runs.log import FuseLog, cut_coefficients
from pixrl.runs.loop import Loop, Pace
from pixrl.runs.place import replacing, require_free
from pixrl.runs.trackers import require_trackers, tracked

_log = logging.getLogger("pixrl")
SELECTION = "selection.json"
EXEMPLARS = "exemplars"
FEATURES = "features.safetensors"
"""Of the exemplars."""
WORLD = "world.json"
WORLD_KEY = "world"
"""Where a checkpoint keeps a copy of it."""


@dataclass(frozen=True)
class FinishedRun:
    """A run folder whose pictures are all made, and the choice among them."""

    folder: RunFolder
    config: FuseConfig
    rows: tuple[ManifestRow, ...]
    selection: Selection


class WorldRecord(BaseModel):
    """The record of what a run's pictures were made and scored with: `world.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    fingerprint: str
    clip: str
    segmenter: str
    truth: str | None = Field(None, exclude_if=lambda truth: truth is None)
    """What told which pictures are true fusions."""
    scorer: dict[str, str] = {}
    """Provenance of the scores; empty in runs of before it was recorded."""
    code: dict[str, str] = Field({}, exclude_if=lambda code: not code)
    """Checksums of the files that hold parts of yours, by their names."""
    pictures: dict[str, str] = Field({}, exclude_if=lambda pictures: not pictures)
    """SHA-256 of the pictures that stand for concepts."""
    presence: Presence | None
    prompts: dict[str, str]
    exemplar_seeds: tuple[int, ...]
    usable_exemplars: dict[str, int]
    """Those in which a foreground was found."""


@dataclass(frozen=True)
class ResumePoint:
    """The place from which a run goes on."""

    step: int
    images: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


START = ResumePoint(0, 0, {}, {})


def start(
    config: FuseConfig,
    out: Path,
    *,
    force: bool = False,
    monitor: Monitor | None = None,
    world: FusionWorld | None = None,
) -> FinishedRun:
    """Begin a run, train it to its end and select. Ctrl-C leaves a folder that `go_on` finishes."""
    check_concepts(config.concepts)
    if world is None:
        get_ready(config, config.concepts, out, force=force)
    require_free(out, force)
    config = config.with_full_paths()
    world = world or world_of(config)
    config = config.with_mixing(world.card.mixing)
    world.mixing(config)  # unknown words and a mixing that does not fit, before any folder
    world.truth_for(config)
    if config.policy_from is not None:
        read_policy(Path(config.policy_from)).require_same_generator(world.renderer.fingerprint())
    folder = RunFolder.create(out, kind=KIND, recipe=config, force=force)
    with replacing(folder.path):
        return _run(folder, config, world, START, monitor or Silent())


def get_ready(config: FuseConfig, concepts: Sequence[str], out: Path, *, force: bool = False) -> None:
    """Refuse what `pixrl doctor` refuses, before a model loads or a folder is made.

    Raises:
        PixrlError: something stands against the run.
    """
    found = examine_fusion(config, concepts=concepts, out=out, force=force, about_to_run=True)
    for note in require(found):
        _log.warning("%s", note)


def go_on(path: Path, *, monitor: Monitor | None = None, world: FusionWorld | None = None) -> FinishedRun:
    """Finish an interrupted run, wherever it was interrupted: its manifest ends as that of an uninterrupted one.

    A finished run is chosen from anew.
    """
    require_same_code(path)
    folder, config = open_run(path)
    require_trackers(config.log)
    world = world or world_of(config)
    place = find_place(folder)
    folder.tidy()
    folder.cut_back(place.step, place.images)
    cut_coefficients(folder, place.step)
    return _run(folder, config, world, place, monitor or Silent())


def select_again(
    path: Path,
    *,
    keep: int | None = None,
    presence: float | None = None,
    balance: float | None = None,
    everywhere: bool = False,
) -> FinishedRun:
    """Choose from the pictures of a run with other thresholds; makes none. What is not given stays as it was.

    `everywhere` chooses among all pictures of a run with a pool, those that its policy learned from too.
    """
    folder, config = open_run(path)
    given = {"keep": keep, "presence": presence, "balance": balance}
    config = recipes.load(
        FuseConfig, config.model_dump(), values={k: v for k, v in given.items() if v is not None}
    )
    rows = folder.manifest()
    if not rows:
        raise RunError(f"{folder.path} has no pictures yet. Type: pixrl resume {folder.path}")
    return _choose(folder, config, rows, everywhere)


def open_finished(path: Path) -> FinishedRun:
    """Open a finished run."""
    folder, config = open_run(path)
    return FinishedRun(folder, config, tuple(folder.manifest()), read_selection(folder))


def as_it_stands(path: Path) -> FinishedRun:
    """Open a fusion with the selection that it ended with or, where it is not finished, one among its pictures so far.

    Nothing is written.

    Raises:
        RunError: it has no pictures yet.
    """
    folder, config = open_run(path)
    rows = folder.manifest()
    if (folder.path / SELECTION).is_file():
        return FinishedRun(folder, config, tuple(rows), read_selection(folder))
    if not rows:
        raise RunError(f"{folder.path} has no pictures yet. Type: pixrl resume {folder.path}")
    return FinishedRun(folder, config, tuple(rows), _select(folder, config, rows, everywhere=False))


def world_of(config: FuseConfig) -> FusionWorld:
    """Load the generator and the scorer that a recipe names."""
    return load_world(*config.world)


def find_place(folder: RunFolder) -> ResumePoint:
    """Find the newest whole checkpoint whose pictures are all in the manifest; the start where there is none."""
    rows = len(folder.manifest())
    found = checkpoint.latest(folder.path)
    while found is not None:
        tensors, state = checkpoint.load(found)
        step = checkpoint.step_of(found)
        if state["images"] <= rows:
            return ResumePoint(step, state["images"], tensors, state)
        found = checkpoint.latest(folder.path, at_most=step - 1)
    return START


def read_selection(folder: RunFolder) -> Selection:
    """Read the selection that the run ended with, or that `select` made last."""
    path = folder.path / SELECTION
    if not path.is_file():
        raise RunError(f"{folder.path} is not finished. Type: pixrl resume {folder.path}")
    try:
        return Selection.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Choose anew: pixrl select {folder.path}"
        ) from None


def _run(
    folder: RunFolder, config: FuseConfig, world: FusionWorld, place: ResumePoint, monitor: Monitor
) -> FinishedRun:
    session = FusionSession(world, config)
    trainer = FusionTrainer(session, config)
    if place is not START:
        trainer.restore(place.tensors, place.state)
    elif config.policy_from is not None:
        learned = read_policy(Path(config.policy_from))
        learned.require_same_generator(world.renderer.fingerprint())
        assert isinstance(trainer.sampler, PolicySampler)  # require_fits
        trainer.sampler.adopt(learned.tensors)
    record = _record(world, session, config)
    _write_world(folder, record, session, config, place)
    monitor = tracked(monitor, folder, config.log)
    loop = Loop(
        algorithm=trainer,
        record=FuseLog(folder, config),
        monitor=monitor,
        pace=Pace(config.steps),
        kept={WORLD_KEY: record.model_dump(mode="json")},
        watch=FailureWatch(config, [row.failed for row in folder.manifest()]).check,
    )
    title = f"{' + '.join(config.concepts)}, {config.sampler}"
    monitor.begin(title, Extent(config.budget, place.images, in_pictures=True), folder.metrics())
    loop.run(folder.path, place.step, place.images)
    return _choose(folder, config, folder.manifest())


def _select(
    folder: RunFolder, config: FuseConfig, rows: Sequence[ManifestRow], everywhere: bool
) -> Selection:
    thresholds = choose_thresholds(config, read_world(folder).presence)
    similarities_BN = similarities_of(rows, config.concepts)
    return choose(similarities_BN, config, thresholds, config.keep, [row.seed for row in rows], everywhere)


def _choose(
    folder: RunFolder, config: FuseConfig, rows: list[ManifestRow], everywhere: bool = False
) -> FinishedRun:
    selection = _select(folder, config, rows, everywhere)
    content = json.dumps(selection.to_json(), indent=1).encode() + b"\n"
    write_atomic(folder.path / SELECTION, content)
    for old in folder.samples_dir.glob("selected-*.png"):
        old.unlink()
    for place, index in enumerate(selection.indices, 1):  # once more, under samples/, best first
        file = rows[index].file
        assert file is not None
        content = (folder.path / file).read_bytes()
        write_atomic(folder.samples_dir / f"selected-{place}-{index:06d}.png", content, sync_folder=False)
    return FinishedRun(folder, config, tuple(rows), selection)


def read_world(folder: RunFolder) -> WorldRecord:
    """Read the record of a run's models, calibration and exemplars."""
    found = world_on_disk(folder)
    if found is None:
        raise CheckpointError(
            f"{folder.path / WORLD} is missing or damaged. Type: pixrl resume {folder.path}, which writes it again."
        )
    return found


def world_on_disk(folder: RunFolder) -> WorldRecord | None:
    """Read world.json; None where the file is missing or damaged."""
    try:
        return WorldRecord.model_validate_json((folder.path / WORLD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def exemplar_files(folder: RunFolder, concept: str) -> list[Path]:
    """List the pictures of a concept alone."""
    return sorted((folder.path / EXEMPLARS).glob(f"{slug(concept)}-[0-9][0-9].png"))


def slug(text: str) -> str:
    """Turn a name into a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", text.casefold()).strip("._") or "_"


def require_same_code(path: Path) -> None:
    """Raise a CheckpointError where a file of the user's code has changed. None of it is executed."""
    began = world_on_disk(RunFolder.open(path))
    changes = [] if began is None else changed_files(began.code)
    if changes:
        raise CheckpointError(
            f"Code of yours has changed since the run {path} began:\n  "
            + "\n  ".join(changes)
            + "\nPut the file back, or start a new run."
        )


def require_same_pictures(began: WorldRecord, config: FuseConfig, path: Path) -> None:
    """Raise a CheckpointError where a picture that stands for a concept is another than when the run began."""
    now = config.picture_sums
    changed = [config.pictures[name] for name, was in began.pictures.items() if now.get(name) != was]
    if changed:
        raise CheckpointError(
            f"{' and '.join(changed)} changed or gone since the run {path} began. Put it back, or start a new run."
        )


def _record(world: FusionWorld, session: FusionSession, config: FuseConfig) -> WorldRecord:
    return WorldRecord(
        model=world.renderer.name,
        fingerprint=world.renderer.fingerprint(),
        clip=world.clip,
        segmenter=world.segmenter,
        truth=None if session.truth is None else session.truth.name,
        scorer={
            **world.scorer.provenance,
            **({} if session.truth is None else part("truth", session.truth.provenance)),
        },
        code=config.code,
        pictures=config.picture_sums,
        presence=world.card.presence,
        prompts={e.concept: e.prompt for e in session.exemplars},
        exemplar_seeds=max((e.seeds for e in session.exemplars), key=len),
        usable_exemplars={e.concept: len(e.features_ME) for e in session.exemplars},
    )


def _write_world(
    folder: RunFolder, record: WorldRecord, session: FusionSession, config: FuseConfig, place: ResumePoint
) -> None:
    """What the children are compared with, and by what. A resumed run must find what it began with.

    Where world.json is lost, its copy in the checkpoint says that.
    """
    found = world_on_disk(folder)
    kept = place.state.get(WORLD_KEY)
    before = found if found is not None or kept is None else WorldRecord.model_validate(kept)
    if before is not None:
        if before.fingerprint != record.fingerprint:
            raise CheckpointError(
                f"{record.model} has changed since the run {folder.path} began ({before.fingerprint}, now "
                f"{record.fingerprint}). Put the old checkpoint back, or start a new run."
            )
        require_same_pictures(before, config, folder.path)
        changed = [
            f"{name}: {was!r}, now {record.scorer.get(name)!r}"
            for name, was in before.scorer.items()
            if was != record.scorer.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"What scores the pictures has changed since the run {folder.path} began:\n  "
                + "\n  ".join(changed)
                + "\nPut the old checkpoints back, or start a new run."
            )
    if found is not None:
        return
    pictures = folder.path / EXEMPLARS
    pictures.mkdir(exist_ok=True)
    for exemplars in session.exemplars:
        for i, image in enumerate(exemplars.images_MCHW):
            write_atomic(
                pictures / f"{slug(exemplars.concept)}-{i:02d}.png", png_bytes(image), sync_folder=False
            )
    features = {
        exemplars.concept: exemplars.features_ME.cpu().contiguous() for exemplars in session.exemplars
    }
    write_atomic(pictures / FEATURES, safetensors.torch.save(features))
    content = (before or record).model_dump_json(indent=1).encode() + b"\n"
    write_atomic(folder.path / WORLD, content)
