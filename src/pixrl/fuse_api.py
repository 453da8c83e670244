"""`pixrl fuse` for callers: run, compare, go on, choose again, report. The command line and `pixrl.fuse` call these."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from PIL import Image

from pixrl import config as recipes
from pixrl.data.pairs import check_concepts, parse_pairs, read_pairs
from pixrl.errors import InputError, RunError
from pixrl.fusion.select import Selection
from pixrl.report.fuse import write_fuse_report
from pixrl.report.fuse_many import write_many_report
from pixrl.runs import fuse as fuse_job
from pixrl.runs import fuse_many
from pixrl.runs.display import Monitor, Silent, for_terminal
from pixrl.runs.folder import RunFolder
from pixrl.runs.fuse import FinishedRun
from pixrl.runs.fuse_config import FuseConfig, resolve_options

RUNS = Path("runs")


class Pictures(Sequence[Image.Image]):
    """A run's pictures, read from its folder when asked for."""

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


@dataclass(frozen=True)
class FusionResult:
    """A finished fusion."""

    images: Pictures
    """Every picture, in the order they were made; PIL images."""
    scores: tuple[Mapping[str, float | None], ...]
    """Of every picture: `S/CONCEPT`, `reward` and `balance`; None where scoring failed."""
    selected: tuple[int, ...]
    """Indices of the selected pictures, best first; empty when none qualifies."""
    run: Path
    """The run's folder."""
    selection: Selection = field(repr=False)
    """Thresholds, number of candidates, and how far the nearest fell short."""

    @property
    def report(self) -> Path:
        return self.run / "report.html"


def fuse(
    concepts: Sequence[str],
    budget: int = 128,
    seed: int = 0,
    sampler: str = "rmler",
    model: str = "toy:sd3",
    out: Path | str | None = None,
    *,
    force: bool = False,
    live: bool = False,
    **settings: Any,
) -> FusionResult:
    """Fuse two or more concepts into one new object.

    Args:
        concepts: two or more different ones.
        budget: pictures in all.
        seed: of everything random.
        sampler: rmler, ppo, grpo, random, mean, bass, agswap, golden or search.
        model: toy:NAME, a folder in diffusers' layout, or a hub id.
        out: the run's folder; None makes a new one under runs/.
        force: replace a run that is there already.
        live: show progress.
        settings: any other setting of `FuseConfig`, such as alpha=3 or options={"lr": 0.1}.
    """
    if isinstance(concepts, str):
        raise InputError(
            f"concepts is a list of names, got the one string {concepts!r}: fuse([{concepts!r}, ...])"
        )
    if not isinstance(concepts, Iterable):
        raise InputError(f'concepts is a list of names, got {concepts!r}: fuse(["owl", "snail"])')
    given = {"concepts": tuple(concepts), "budget": budget, "seed": seed, "sampler": sampler, "model": model}
    config = recipes.load(FuseConfig, {**given, **settings})
    return run_fuse(config, None if out is None else Path(out), force=force, live=live)


def run_fuse(
    config: FuseConfig, out: Path | None = None, *, force: bool = False, live: bool = True
) -> FusionResult:
    """One fusion from the start, with its report."""
    check_concepts(config.concepts)
    run = fuse_job.start(config, out or default_out(config), force=force, monitor=_monitor(live))
    return _finish(run)


def run_compare(
    config: FuseConfig,
    samplers: Sequence[str] | str,
    out: Path | None = None,
    *,
    force: bool = False,
    live: bool = True,
) -> Path:
    """The same concepts with several samplers, or "all"; the folder. Options go to the samplers that know them."""
    usual = resolve_options(config.sampler, {}).model_dump(mode="json")
    given = {name: value for name, value in config.options.items() if value != usual.get(name)}
    many = fuse_many.compare_config(config, samplers, given)
    place = out or default_out(config, compare=True)
    runs = fuse_many.start_many(many, fuse_many.COMPARE, place, force=force, monitor=lambda: _monitor(live))
    write_many_report(runs)
    return runs.folder.path


def run_pairs(
    config: FuseConfig,
    pairs: Path | Sequence[str],
    out: Path | None = None,
    *,
    force: bool = False,
    live: bool = True,
) -> Path:
    """Every line of a file, or of a list of `a & b`, as a fusion of its own; the folder."""
    if config.concepts:
        raise InputError("The concepts come from the list of pairs: leave them out of the recipe.")
    found = read_pairs(pairs) if isinstance(pairs, Path) else parse_pairs(pairs)
    many = fuse_many.pairs_config(config, found)
    place = out or default_out(config, pairs=pairs if isinstance(pairs, Path) else None)
    runs = fuse_many.start_many(many, fuse_many.PAIRS, place, force=force, monitor=lambda: _monitor(live))
    write_many_report(runs)
    return runs.folder.path


def resume(run: Path, *, live: bool = True) -> FusionResult | Path:
    """Goes on with an interrupted run of any of the three kinds."""
    kind = RunFolder.open(run).kind
    if kind == fuse_job.KIND:
        return _finish(fuse_job.go_on(run, monitor=_monitor(live)))
    if kind in (fuse_many.COMPARE, fuse_many.PAIRS):
        return write_many_report(fuse_many.go_on_many(run, monitor=lambda: _monitor(live))).parent
    raise RunError(f"{run} is a run of kind {kind!r}, which is no fusion.")


def select_run(
    run: Path, *, keep: int | None = None, presence: float | None = None, balance: float | None = None
) -> Selection:
    """Chooses again from a run's pictures and rewrites its report; makes no pictures."""
    chosen = fuse_job.select_again(run, keep=keep, presence=presence, balance=balance)
    write_fuse_report(chosen)
    return chosen.selection


def write_report(run: Path) -> Path:
    """Writes the report of a finished run, or of what is finished in a folder of runs."""
    kind = RunFolder.open(run).kind
    if kind == fuse_job.KIND:
        return write_fuse_report(fuse_job.open_finished(run))
    return write_many_report(fuse_many.finished_runs(run))


def default_out(config: FuseConfig, *, pairs: Path | None = None, compare: bool = False) -> Path:
    """A folder under runs/ that does not exist yet."""
    name = fuse_job.slug("+".join(config.concepts)) if pairs is None else fuse_job.slug(pairs.stem)
    name = f"{name}-{'compare' if compare else config.sampler}-{config.seed}"
    number, place = 1, RUNS / name
    while place.exists():
        number += 1
        place = RUNS / f"{name}-{number}"
    return place


def _finish(run: FinishedRun) -> FusionResult:
    write_fuse_report(run)
    path = run.folder.path
    return FusionResult(
        images=Pictures([path / row.file for row in run.rows if row.file is not None]),
        scores=tuple(row.scores for row in run.rows),
        selected=run.selection.indices,
        run=path,
        selection=run.selection,
    )


def _monitor(live: bool) -> Monitor:
    return for_terminal() if live else Silent()
