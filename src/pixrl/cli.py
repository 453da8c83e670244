"""The command line: reads arguments, loads settings, calls one function. torch is loaded only when a job starts."""

import errno
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pixrl import __version__
from pixrl.cli_options import (
    AlignRecipe,
    Alpha,
    Balance,
    Budget,
    Compare,
    Concepts,
    Device,
    Exemplars,
    Force,
    Keep,
    Model,
    Out,
    Pairs,
    PersonalizeRecipe,
    Presence,
    Recipe,
    Repair,
    Run,
    Sampler,
    Seed,
    Set,
    Steps,
    SubjectFolder,
    option,
)
from pixrl.errors import InputError, PixrlError

if TYPE_CHECKING:
    from pixrl.toy.verify import Gate
    from pixrl.training.fuse_config import FuseConfig

INTERRUPTED = 130
LOOP_KINDS = ("align", "personalize")
DEMO_PAIRS = ("owl & snail", "turtle & mushroom", "penguin & pineapple")


class _Commands(TyperGroup):
    """Turns errors meant for the user into a message and an exit code; anything else keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except PixrlError as error:
            _fail(str(error), error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE or error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}", 1)


def _fail(message: str, code: int) -> None:
    typer.secho("Error: ", err=True, fg="red", bold=True, nl=False)
    typer.echo(message, err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    name="pixrl",
    help="Reinforcement learning for image generators.\n\nBegin with [bold]pixrl demo[/bold].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
toy = typer.Typer(help="The embedded toy world: build and verify its checkpoints.", no_args_is_help=True)
app.add_typer(toy, name="toy")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pixrl {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def fuse(
    concepts: Concepts = None,
    pairs: Pairs = None,
    model: Model = None,
    recipe: Recipe = None,
    sampler: Sampler = None,
    compare: Compare = None,
    budget: Budget = None,
    exemplars: Exemplars = None,
    alpha: Alpha = None,
    seed: Seed = None,
    set_: Set = None,
    keep: Keep = None,
    presence: Presence = None,
    balance: Balance = None,
    out: Out = None,
    force: Force = False,
    device: Device = None,
) -> None:
    """Fuse two or more concepts into one new object: [bold]pixrl fuse owl snail[/bold]."""
    if pairs is not None and (concepts or compare):
        raise InputError("--pairs names the concepts and runs one sampler: leave out CONCEPTS and --compare.")
    if compare is not None and sampler is not None:
        raise InputError("--sampler names one sampler and --compare several: give one of them.")
    given = {
        "concepts": concepts or None,
        "model": model,
        "sampler": sampler,
        "budget": budget,
        "exemplars": exemplars,
        "alpha": alpha,
        "seed": seed,
        "keep": keep,
        "presence": presence,
        "balance": balance,
        "device": device,
    }
    config = _fuse_config(
        recipe, {name: value for name, value in given.items() if value is not None}, set_ or []
    )
    _start_fusion(config, pairs, compare, out, force)


def _fuse_config(recipe: str | None, values: dict[str, Any], overrides: list[str]) -> "FuseConfig":
    from pixrl import config
    from pixrl.training.fuse_config import FuseConfig

    return config.load(FuseConfig, recipe, overrides, values=values, kind="fuse")


def _start_fusion(
    config: "FuseConfig", pairs: Path | None, compare: str | None, out: Path | None, force: bool
) -> None:
    from pixrl import fuse_api

    if pairs is not None:
        out = out or fuse_api.default_out(config, pairs=pairs)
        with _resumable(out):
            fuse_api.run_pairs(config, pairs, out, force=force)
    elif compare is not None:
        names = "all" if compare == "all" else [name.strip() for name in compare.split(",")]
        out = out or fuse_api.default_out(config, compare=True)
        with _resumable(out):
            fuse_api.run_compare(config, names, out, force=force)
    else:
        out = out or fuse_api.default_out(config)
        with _resumable(out):
            result = fuse_api.run_fuse(config, out, force=force)
            typer.echo(result.selection.summary())
    _say_where(out)


@contextmanager
def _resumable(run: Path) -> Iterator[None]:
    """Ctrl-C within: everything finished is on the disk, and the user learns how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        started = (run / "recipe.yaml").is_file()
        hint = (
            f"Everything finished is saved. To go on, type: pixrl resume {run}"
            if started
            else "Nothing was started."
        )
        typer.echo(f"\nInterrupted. {hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _say_where(run: Path) -> None:
    report = run / "report.html"
    if _leads():
        typer.echo(f"Report: {report}" if report.is_file() else f"Run: {run}")


def _leads() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@app.command()
def select(run: Run, keep: Keep = None, presence: Presence = None, balance: Balance = None) -> None:
    """Select from a finished run again, with other thresholds; generates nothing."""
    from pixrl import fuse_api

    typer.echo(fuse_api.select_run(run, keep=keep, presence=presence, balance=balance).summary())
    _say_where(run)


@app.command()
def align(
    recipe: AlignRecipe,
    steps: Steps = None,
    seed: Seed = None,
    set_: Set = None,
    out: Out = None,
    force: Force = False,
    device: Device = None,
) -> None:
    """Align a flow model with rewards: [bold]pixrl align toy/e2po[/bold]."""
    from pixrl import align_api

    settings = {"machine.device": device}
    config = align_api.load(recipe, set_ or [], steps=steps, seed=seed, settings=settings, kind="align")
    out = out or align_api.default_out(recipe, config)
    with _resumable(out):
        done = align_api.run_align(config, out, force=force)
    _say_where(done.run)


@app.command()
def personalize(
    recipe: PersonalizeRecipe = None,
    subject: SubjectFolder = None,
    steps: Steps = None,
    seed: Seed = None,
    set_: Set = None,
    out: Out = None,
    force: Force = False,
    device: Device = None,
) -> None:
    """Keep a subject's identity while following the prompt: [bold]pixrl personalize --subject FOLDER[/bold]."""
    from pixrl import align_api

    settings = {"machine.device": device}
    config, name = align_api.load_personalize(
        recipe, set_ or [], subject=subject, steps=steps, seed=seed, settings=settings
    )
    out = out or align_api.default_out(name, config)
    with _resumable(out):
        done = align_api.run_align(config, out, force=force)
    _say_where(done.run)


@app.command()
def selfcheck(
    recipe: AlignRecipe,
    seed: Seed = None,
    set_: Set = None,
    as_json: Annotated[bool, option("Print one JSON object.", flag="--json")] = False,
) -> None:
    """Is the first update of a recipe on-policy, by dtype and batch size? Exit code 1 when it is not."""
    from pixrl import align_api

    report = align_api.selfcheck(align_api.load(recipe, set_ or [], seed=seed))
    if _leads():
        typer.echo(json.dumps(report.to_json(), indent=1) if as_json else "\n".join(report.lines()))
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def resume(
    run: Run,
    repair: Repair = False,
    set_: Set = None,
    accept_changes: Annotated[
        bool, option("Go on though recipe.yaml was edited since.", flag="--accept-changes")
    ] = False,
) -> None:
    """Go on with a run that was interrupted; it ends as one that never was."""
    from pixrl.training.runlog import RunFolder

    with _resumable(run):
        kind = RunFolder.open(run, repair=repair, allow_changed=True).kind
        if kind in LOOP_KINDS:
            from pixrl import align_api

            align_api.resume(run, set_ or [], accept_changes=accept_changes)
        else:
            if set_ or accept_changes:
                raise InputError(f"{run} is a run of kind {kind!r}, whose settings are fixed once it began.")
            from pixrl import fuse_api

            fuse_api.resume(run)
        _say_where(run)


@app.command()
def report(run: Run) -> None:
    """Write a run's report again; of an alignment also before it is finished."""
    from pixrl.training.runlog import RunFolder

    if RunFolder.open(run).kind in LOOP_KINDS:
        from pixrl.evaluation.align_report import write_align_report

        typer.echo(f"Report: {write_align_report(run)}")
        return
    from pixrl import fuse_api

    typer.echo(f"Report: {fuse_api.write_report(run)}")


@app.command()
def demo(
    out: Annotated[
        Path | None, option("The run's folder.", default="pixrl-demo, or pixrl-demo-2 ...")
    ] = None,
) -> None:
    """Fuse three pairs on the toy world and write a report: two minutes, no download."""
    from pixrl import fuse_api

    out = out or _unused(Path("pixrl-demo"))
    config = _fuse_config(None, {"model": "toy:sd3"}, [])
    typer.echo(f"Fusing {', '.join(DEMO_PAIRS)} on the toy world, 128 pictures each.")
    with _resumable(out):
        run = fuse_api.run_pairs(config, DEMO_PAIRS, out)
    typer.echo(f"\nOpen {(run / 'report.html').absolute()} in a browser.")
    typer.echo("Then try:  pixrl fuse owl snail mushroom")


def _unused(path: Path) -> Path:
    """The path, or path-2, path-3 ... where it is taken."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


@toy.command("build")
def toy_build(
    stage: Annotated[
        list[str] | None, option("Only this stage; repeat for more.", default="all of them")
    ] = None,
    resume: Annotated[bool, option("Go on with a build that was killed.", flag="--resume")] = False,
    out: Annotated[Path | None, option("Where the checkpoints go.", default="into the package")] = None,
    device: Annotated[str, option("cpu, cuda or mps.", default="cpu")] = "cpu",
) -> None:
    """Train the toy world's checkpoints from nothing: hours on two cores, minutes on a GPU."""
    from pixrl.toy.build import build

    try:
        folder = build(stage or [], resume=resume, out=out, device=device)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. To go on, add --resume to the same command.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"Checkpoints: {folder}")


@toy.command("verify")
def toy_verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Only these: clip sd3 ...; without one, all.", show_default=False
        ),
    ] = None,
    quick: Annotated[bool, option("Take a quarter of the samples.", flag="--quick")] = False,
    as_json: Annotated[bool, option("Print one JSON object.", flag="--json")] = False,
) -> None:
    """Measure the shipped checkpoints on held-out scenes against their gates; exit code 1 when one fails."""
    from pixrl.toy.verify import verify

    gates = verify(names or [], quick=quick)
    passed = all(gate.passed for gate in gates)
    typer.echo(_gates_as_json(gates, passed) if as_json else "\n".join(map(_gate_line, gates)))
    if not passed:
        raise typer.Exit(1)


def _gates_as_json(gates: "Sequence[Gate]", passed: bool) -> str:
    rows = [{**asdict(gate), "passed": gate.passed} for gate in gates]
    finite = [{key: x if x not in (math.inf, -math.inf) else None for key, x in row.items()} for row in rows]
    return json.dumps({"passed": passed, "gates": finite}, indent=1)


def _gate_line(gate: "Gate") -> str:
    limits = (
        f"{gate.at_least:g} or more" if math.isinf(gate.at_most) else f"{gate.at_least:g} to {gate.at_most:g}"
    )
    return f"{'ok  ' if gate.passed else 'FAIL'}  {gate.checkpoint:<11}{gate.figure:<48}{gate.value:>9.3f}  ({limits})"


def main() -> None:
    """The console script."""
    app()
