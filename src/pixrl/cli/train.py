"""The commands of runs: fuse, select, align, personalize, selfcheck; and of any of them: resume, check, report."""

import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixrl.cli.launch import share_out
from pixrl.cli.options import (
    AlignRecipe,
    Alpha,
    AtATime,
    Balance,
    Budget,
    Carry,
    CheckedRecipe,
    Compare,
    Concepts,
    Cpus,
    Device,
    Everywhere,
    Exemplars,
    Force,
    Gpus,
    Keep,
    Mixing,
    Model,
    Out,
    Pairs,
    PersonalizeRecipe,
    Policy,
    Pool,
    Presence,
    Processes,
    Ray,
    Recipe,
    Repair,
    Run,
    Sampler,
    Seed,
    Set,
    Steps,
    SubjectFolder,
    leads,
    option,
    resumable,
    say_where,
)
from pixrl.errors import InputError

if TYPE_CHECKING:
    from pixrl.runs.config import AlignConfig


commands = typer.Typer()


@commands.command()
def fuse(
    concepts: Concepts = None,
    pairs: Pairs = None,
    model: Model = None,
    recipe: Recipe = None,
    sampler: Sampler = None,
    mixing: Mixing = None,
    compare: Compare = None,
    policy: Policy = None,
    carry: Carry = False,
    workers: AtATime = 1,
    ray: Ray = None,
    cpus: Cpus = 1.0,
    gpus: Gpus = None,
    budget: Budget = None,
    pool: Pool = None,
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
    if carry and pairs is None:
        raise InputError("--carry takes one policy from pair to pair: name them with --pairs FILE.")
    if pairs is None and (workers > 1 or ray is not None):
        raise InputError("--workers and --ray are for many runs: name their concepts with --pairs FILE.")
    if compare is not None and policy is not None:
        raise InputError("--policy begins one sampler with what it has learned: leave out --compare.")
    given = {
        "concepts": concepts or None,
        "model": model,
        "sampler": sampler,
        "mixing.kind": mixing,
        "budget": budget,
        "pool": pool,
        "exemplars": exemplars,
        "alpha": alpha,
        "seed": seed,
        "keep": keep,
        "presence": presence,
        "balance": balance,
        "device": device,
    }
    from pixrl import api
    from pixrl import config as recipes
    from pixrl.fusion.config import FuseConfig
    from pixrl.workers import Workers

    spread = Workers(workers, ray, cpus, gpus)
    learned = {} if policy is None else api.with_policy(policy)
    values = learned | {name: value for name, value in given.items() if value is not None}
    config = recipes.load(FuseConfig, recipe, set_ or [], values=values, kind="fuse")
    if pairs is not None:
        out = out or api.default_fuse_out(config, pairs=pairs)
        with resumable(out):
            api.run_pairs(config, pairs, out, carry=carry, force=force, workers=spread)
    elif compare is not None:
        names = "all" if compare == "all" else [name.strip() for name in compare.split(",")]
        out = out or api.default_fuse_out(config, compare=True)
        with resumable(out):
            api.run_compare(config, names, out, force=force)
    else:
        out = out or api.default_fuse_out(config)
        with resumable(out):
            result = api.run_fuse(config, out, force=force)
            typer.echo(result.selection.summary(out))
    say_where(out)


@commands.command()
def select(
    run: Run,
    keep: Keep = None,
    presence: Presence = None,
    balance: Balance = None,
    everywhere: Everywhere = False,
) -> None:
    """Select from a finished run again, with other thresholds; generates nothing."""
    from pixrl import api

    selection = api.select_run(run, keep=keep, presence=presence, balance=balance, everywhere=everywhere)
    typer.echo(selection.summary(run))
    say_where(run)


def _training(load: Callable[..., tuple["AlignConfig", Any]]) -> Callable[..., None]:
    """Make a command of a function that loads a recipe: its own arguments, then the options of every training run.

    `load` is given `overrides`, `steps`, `seed` and `settings` besides, and returns the recipe and its name.
    """

    def command(
        context: typer.Context,
        steps: Steps = None,
        seed: Seed = None,
        set_: Set = None,
        out: Out = None,
        force: Force = False,
        device: Device = None,
        processes: Processes = 1,
        **own: Any,
    ) -> None:
        share_out(context, processes)
        from pixrl import api

        settings = None if device is None else {"machine.device": device}
        given = {"steps": steps, "seed": seed, "settings": settings}
        config, name = load(**own, overrides=set_ or [], **given)
        out = out or api.default_out(name, config)
        with resumable(out):
            done = api.run_align(config, out, force=force)
        say_where(done.run)

    found = [
        part
        for function in (load, command)
        for part in inspect.signature(function).parameters.values()
        if part.kind is not part.VAR_KEYWORD
    ]
    parts = sorted(found, key=lambda part: part.default is not part.empty)  # as Python wants them
    # what typer reads a command's name, help and options from
    command.__name__, command.__doc__ = load.__name__, load.__doc__
    command.__annotations__ = {part.name: part.annotation for part in parts}
    vars(command)["__signature__"] = inspect.Signature(parts)
    return commands.command()(command)


@_training
def align(recipe: AlignRecipe, **given: Any) -> tuple["AlignConfig", Any]:
    """Align a flow model with rewards: [bold]pixrl align toy/e2po[/bold]."""
    from pixrl import api

    return api.load(recipe, kind="align", **given), recipe


@_training
def personalize(
    recipe: PersonalizeRecipe = None, subject: SubjectFolder = None, **given: Any
) -> tuple["AlignConfig", Any]:
    """Keep a subject's identity while following the prompt: [bold]pixrl personalize --subject FOLDER[/bold]."""
    from pixrl.runs.config import load_personalize

    return load_personalize(recipe, subject=subject, **given)


@commands.command()
def selfcheck(
    recipe: CheckedRecipe = None,
    subject: SubjectFolder = None,
    seed: Seed = None,
    set_: Set = None,
    as_json: Annotated[bool, option("Print one JSON object.", flag="--json")] = False,
) -> None:
    """Is the first update of a recipe on-policy, by dtype and batch size? Exit code 1 when it is not."""
    from pixrl import api
    from pixrl.runs.config import load_either

    report = api.selfcheck(load_either(recipe, set_ or [], subject=subject, seed=seed))
    if leads():
        typer.echo(json.dumps(report.to_json(), indent=1) if as_json else "\n".join(report.lines()))
    if not report.passed:
        raise typer.Exit(1)


@commands.command()
def resume(
    context: typer.Context,
    run: Run,
    repair: Repair = False,
    set_: Set = None,
    accept_changes: Annotated[
        bool, option("Go on though recipe.yaml was edited since.", flag="--accept-changes")
    ] = False,
    processes: Processes = 1,
) -> None:
    """Go on with a run that was interrupted; it ends as one that never was."""
    from pixrl import api
    from pixrl.runs.config import KINDS
    from pixrl.runs.folder import RunFolder

    if processes > 1:
        kind = RunFolder.open(run, repair=repair, allow_changed=True).kind
        if kind not in KINDS:
            raise InputError(
                f"{run} is a run of kind {kind!r}, which one process makes: leave out --processes."
            )
        share_out(context, processes)
    with resumable(run):
        if repair:
            RunFolder.open(run, repair=True, allow_changed=True)
        api.resume(run, set_ or [], accept_changes=accept_changes)
        say_where(run)


@commands.command()
def check(
    run: Run,
    repair: Annotated[bool, option("Mend what can be mended.", flag="--repair")] = False,
    as_json: Annotated[bool, option("Print one JSON object.", flag="--json")] = False,
) -> None:
    """Look at every file of a run that nobody is writing to; exit code 1 when something is wrong."""
    from pixrl.jobs import check as run_check

    found = run_check.check(run, repair=repair)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(found.lines()))
    if not found.good:
        raise typer.Exit(1)


@commands.command()
def report(
    run: Run,
    watch: Annotated[
        bool,
        option("Renew it while the run goes; the page loads itself again. Ctrl-C ends it.", flag="--watch"),
    ] = False,
) -> None:
    """Write a run's report again, also before it is finished."""
    from pixrl.report import watch as reports

    if not watch:
        typer.echo(f"Report: {reports.write_report(run)}")
        return
    try:
        typer.echo(f"Finished. Report: {reports.watch(run, typer.echo)}")
    except KeyboardInterrupt:
        typer.echo(f"Report: {run / 'report.html'}")
