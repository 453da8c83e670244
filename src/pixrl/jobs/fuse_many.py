"""Many fusions in one folder: all pairs of a list, or all samplers on the same concepts. Each is a run of its own."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pixrl import config as recipes
from pixrl.algorithms import SAMPLERS
from pixrl.algorithms.fusion.policy import PolicyKind
from pixrl.config import Settings
from pixrl.data.pairs import PairList, check_concepts
from pixrl.errors import CheckpointError, ConfigError, InputError, RunError, did_you_mean
from pixrl.fusion.config import COMPARE, PAIRS, FuseConfig, SamplerName, sampler_of
from pixrl.fusion.world import FusionWorld
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs.fuse import FinishedRun
from pixrl.plugins import is_path
from pixrl.runs.display import Monitor
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import RunFolder
from pixrl.runs.place import CHILDREN, has_saved, is_run, replacing, require_free
from pixrl.workers import HERE, Workers

FAILURES = "failures.json"
ALL = "all"
_log = logging.getLogger("pixrl")


class ManyConfig(Settings):
    """The recipe of a folder of fusions, which has every list of concepts with every sampler."""

    concepts: tuple[tuple[str, ...], ...]
    samplers: tuple[SamplerName, ...]
    fuse: dict[str, Any]
    """What all of them share, as a `fuse` recipe."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Samplers' own settings; each goes to the samplers that know it."""
    carry: bool = False
    """Whether each fusion begins with the policy that the one before it has learned."""
    notes: tuple[str, ...] = ()
    """What was left out of the list of pairs."""

    def children(self) -> Iterator[tuple[str, FuseConfig]]:
        """Yield the folder's name and the recipe of each fusion, in order."""
        width = len(str(len(self.concepts)))
        for number, concepts in enumerate(self.concepts, 1):
            for sampler in self.samplers:
                pair = fuse_job.slug("+".join(concepts))
                name = fuse_job.slug(sampler) if len(self.concepts) == 1 else f"{number:0{width}d}-{pair}"
                known = sampler_of(sampler).Settings.model_fields
                options = {key: value for key, value in self.options.items() if key in known}
                values = {**self.fuse, "concepts": concepts, "sampler": sampler, "options": options}
                yield name, recipes.load(FuseConfig, values)


@dataclass(frozen=True)
class FinishedRuns:
    """The finished fusions of a folder, and the reasons of those that stopped."""

    folder: RunFolder
    config: ManyConfig
    runs: tuple[FinishedRun, ...]
    failures: dict[str, str]


def compare_config(base: FuseConfig, samplers: Sequence[str] | str, given: dict[str, Any]) -> ManyConfig:
    """Make the recipe of the same concepts with several samplers; `given` are options for those that know them."""
    check_concepts(base.concepts)
    names = [*SAMPLERS.entries] if samplers == ALL else [_require_sampler(name) for name in samplers]
    if len(names) < 2:
        raise InputError("--compare needs two or more samplers: 'all', or for example rmler,random")
    if len(set(names)) < len(names):
        raise InputError(f"--compare names a sampler twice: {', '.join(names)}.")
    known = {option for name in names for option in sampler_of(name).Settings.model_fields}
    for option in given:
        if option not in known:
            raise ConfigError(
                f"None of the samplers {', '.join(names)} has an option {option!r}.{did_you_mean(option, known)}"
            )
    return ManyConfig(concepts=(base.concepts,), samplers=tuple(names), fuse=_shared(base), options=given)


def pairs_config(base: FuseConfig, pairs: PairList, carry: bool = False) -> ManyConfig:
    """Make the recipe of one sampler on every line of a list; with `carry`, one policy learns from line to line.

    Raises:
        InputError: the sampler has no policy that could be carried over.
    """
    if carry and base.options.get("policy") != PolicyKind.CONDITIONAL:
        raise InputError(
            f"--carry needs a policy that serves other concepts too, and sampler {base.sampler} with "
            f"{base.options or 'no options'} has none: add --sampler rmler --set options.policy=conditional."
        )
    options = dict(base.options)
    return ManyConfig(
        concepts=pairs.pairs,
        samplers=(base.sampler,),
        fuse=_shared(base),
        options=options,
        carry=carry,
        notes=pairs.notes,
    )


def start_many(
    config: ManyConfig,
    kind: str,
    out: Path,
    *,
    force: bool = False,
    monitor: Callable[[], Monitor] | None = None,
    world: FusionWorld | None = None,
    workers: Workers = HERE,
) -> FinishedRuns:
    """Run all fusions. One that stops with an error does not stop the others.

    Raises:
        InputError: `carry`, where each begins with what the one before has learned, with more than one worker.
        PixrlError: what is asked for cannot be run.
    """
    if config.carry and workers.are_others:
        raise InputError("--carry runs one fusion after the other: leave out --workers and --ray.")
    require_free(out, force)
    first = next(config.children())[1]
    names = dict.fromkeys(concept for concepts in config.concepts for concept in concepts)
    if world is None:
        fuse_job.get_ready(first, list(names), out, force=force)
        world = fuse_job.world_of(first)
    world.mixing(first)  # a mixing that does not fit, and unknown words, before any folder
    for _, child in config.children():
        world.truth_for(child)
    world.renderer.encode([world.prompt(concept) for concept in names])
    folder = RunFolder.create(out, kind=kind, recipe=config, force=force)
    with replacing(folder.path):
        return _run_all(folder, config, monitor, world, workers)


def go_on_many(
    path: Path, *, monitor: Callable[[], Monitor] | None = None, world: FusionWorld | None = None
) -> FinishedRuns:
    """Finish the fusions that are not finished, and try again those that failed."""
    folder, config = open_many(path)
    folder.tidy()
    return _run_all(folder, config, monitor, world or fuse_job.world_of(next(config.children())[1]))


def open_many(path: Path) -> tuple[RunFolder, ManyConfig]:
    """Open a folder of fusions and read its recipe."""
    folder = RunFolder.open(path)
    if folder.kind not in (COMPARE, PAIRS):
        raise RunError(f"{path} is a run of kind {folder.kind!r}, not a folder of fusions.")
    return folder, recipes.load(ManyConfig, folder.recipe())


def finished_runs(path: Path) -> FinishedRuns:
    """Return the finished fusions of a folder."""
    folder, config = open_many(path)
    runs = [
        fuse_job.open_finished(place)
        for name, _ in config.children()
        if (place := folder.path / CHILDREN / name) and (place / fuse_job.SELECTION).is_file()
    ]
    return FinishedRuns(folder, config, tuple(runs), read_failures(folder))


def read_failures(folder: RunFolder) -> dict[str, str]:
    """Read which fusions stopped, and why; {} before all had their turn. Raises CheckpointError for a damaged file."""
    path = folder.path / FAILURES
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Type: pixrl resume {folder.path}, which writes it again."
        ) from None
    return found


def _run_all(
    folder: RunFolder,
    config: ManyConfig,
    monitor: Callable[[], Monitor] | None,
    world: FusionWorld,
    workers: Workers = HERE,
) -> FinishedRuns:
    failures: dict[str, str] = {}
    (folder.path / CHILDREN).mkdir(exist_ok=True)
    children = {folder.path / CHILDREN / name: child for name, child in config.children()}
    left = [(place, child) for place, child in children.items() if not (place / fuse_job.SELECTION).is_file()]
    results = (
        workers.each(_run_elsewhere, [(place.absolute(), child.model_dump_json()) for place, child in left])
        if workers.are_others
        else _run_here(children, config.carry, monitor, world)
    )
    for number, (name, problem) in enumerate(results, 1):
        if problem is not None:
            _log.warning("%s stopped: %s", name, problem)
            failures[name] = problem
        elif workers.are_others:
            _log.warning("%d/%d: %s", number, len(left), name)
        if has_saved(folder.path):
            folder.step_is_saved()
    failures = {place.name: failures[place.name] for place in children if place.name in failures}
    write_atomic(folder.path / FAILURES, json.dumps(failures, indent=1, ensure_ascii=False).encode() + b"\n")
    result = finished_runs(folder.path)
    if failures and not result.runs:
        first = next(iter(failures))
        raise RunError(f"All {len(failures)} fusions stopped. The first, {first}: {failures[first]}")
    return result


def _run_here(
    children: Mapping[Path, FuseConfig],
    carry: bool,
    monitor: Callable[[], Monitor] | None,
    world: FusionWorld,
) -> Iterator[tuple[str, str | None]]:
    """Run what is not finished, one after the other; with `carry` each begins with what the one before has learned."""
    before: Path | None = None
    for place, child in children.items():
        if not (place / fuse_job.SELECTION).is_file():
            if carry and before is not None:
                child = child.model_copy(update={"policy_from": str(before)})
            problem = _run_child(place, child, monitor() if monitor else None, world)
            yield place.name, problem
            if problem is not None:
                continue
        before = place


def _run_elsewhere(task: tuple[Path, str]) -> tuple[str, str | None]:
    """Run or finish one fusion in a process of its own, which loads the models once."""
    place, recipe = task
    child = FuseConfig.model_validate_json(recipe)
    return place.name, _run_child(place, child, None, fuse_job.world_of(child))


def _run_child(place: Path, child: FuseConfig, monitor: Monitor | None, world: FusionWorld) -> str | None:
    """Run one fusion, or go on with one that was broken off; return why it stopped, if it did."""
    try:
        if is_run(place):
            fuse_job.go_on(place, monitor=monitor, world=world)
        else:
            fuse_job.start(child, place, monitor=monitor, world=world)
    except RunError as error:
        return str(error)
    return None


def _require_sampler(name: str) -> str:
    names = SAMPLERS.names()
    if not is_path(name) and name not in names:
        raise InputError(
            f"There is no sampler {name!r}.{did_you_mean(name, names)} There are {', '.join(names)}."
        )
    return name


def _shared(base: FuseConfig) -> dict[str, Any]:
    return base.with_full_paths().model_dump(mode="json", exclude={"concepts", "sampler", "options"})
