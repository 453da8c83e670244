"""The commands about models: doctor, export."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from pixrl.cli_options import CheckedRecipe, Force, Out, Run, Seed, Set, Steps, SubjectFolder, option

commands = typer.Typer()


@commands.command()
def doctor(
    recipe: CheckedRecipe = None,
    subject: SubjectFolder = None,
    steps: Steps = None,
    seed: Seed = None,
    set_: Set = None,
    processes: Annotated[
        int | None, option("How many would share the work.", default="as a launcher started, else 1", min=1)
    ] = None,
    out: Out = None,
    force: Force = False,
    score: Annotated[
        bool, option("Also load the rewards and score a synthetic batch, as a run does.", flag="--score")
    ] = False,
    as_json: Annotated[bool, option("Print one JSON object.", flag="--json")] = False,
) -> None:
    """What a fuse, align or personalize recipe needs, and whether it can run here; exit code 1 when not."""
    from pixrl import api

    count = processes or int(os.environ.get("WORLD_SIZE", "1"))
    found = api.examine(
        recipe,
        set_ or [],
        subject=subject,
        steps=steps,
        seed=seed,
        processes=count,
        out=out,
        force=force,
        score=score,
    )
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(found.lines()))
    if not found.can_run:
        raise typer.Exit(1)


@commands.command()
def export(
    run: Run,
    layout: Annotated[
        str, option("Key names: diffusers, comfyui or uno.", default="diffusers", flag="--format")
    ] = "diffusers",
    slot: Annotated[
        str | None, option("current or ema.", default="ema, where the run has averaged weights")
    ] = None,
    out: Annotated[Path | None, option("The folder.", default="export/FORMAT in the run's")] = None,
) -> None:
    """Write a run's LoRA for diffusers, ComfyUI or UNO, with a model card."""
    from pixrl.models.slots import parse_slot
    from pixrl.report import export as exporting

    done = exporting.export(
        run,
        out=out,
        layout=exporting.parse_format(layout),
        slot=None if slot is None else parse_slot(slot),
    )
    typer.echo(f"LoRA ({done.slot.value}, step {done.step}): {done.file}")
    typer.echo(f"Card: {done.card}")
