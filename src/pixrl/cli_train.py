"""The commands of training: align, personalize, selfcheck; and of any run: resume, check, report."""

import json
from typing import Annotated

import typer

from pixrl.cli_options import (
    AlignRecipe,
    CheckedRecipe,
    Device,
    Force,
    Out,
    PersonalizeRecipe,
    Repair,
    Run,
    Seed,
    Set,
    Steps,
    SubjectFolder,
    option,
)
from pixrl.cli_runs import leads, resumable, say_where

commands = typer.Typer()


@commands.command()
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
    from pixrl import api

    settings = {"machine.device": device}
    config = api.load(recipe, set_ or [], steps=steps, seed=seed, settings=settings, kind="align")
    out = out or api.default_out(recipe, config)
    with resumable(out):
        done = api.run_align(config, out, force=force)
    say_where(done.run)


@commands.command()
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
    from pixrl import api

    settings = {"machine.device": device}
    config, name = api.load_personalize(
        recipe, set_ or [], subject=subject, steps=steps, seed=seed, settings=settings
    )
    out = out or api.default_out(name, config)
    with resumable(out):
        done = api.run_align(config, out, force=force)
    say_where(done.run)


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

    report = api.selfcheck(api.load_either(recipe, set_ or [], subject=subject, seed=seed))
    if leads():
        typer.echo(json.dumps(report.to_json(), indent=1) if as_json else "\n".join(report.lines()))
    if not report.passed:
        raise typer.Exit(1)


@commands.command()
def resume(
    run: Run,
    repair: Repair = False,
    set_: Set = None,
    accept_changes: Annotated[
        bool, option("Go on though recipe.yaml was edited since.", flag="--accept-changes")
    ] = False,
) -> None:
    """Go on with a run that was interrupted; it ends as one that never was."""
    from pixrl import api
    from pixrl.runs.folder import RunFolder

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
    from pixrl.runs import check as run_check

    found = run_check.check(run, repair=repair)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(found.lines()))
    if not found.good:
        raise typer.Exit(1)


@commands.command()
def report(run: Run) -> None:
    """Write a run's report again; of an alignment also before it is finished."""
    from pixrl import api

    typer.echo(f"Report: {api.write_report(run)}")
