"""The commands about models: export."""

from pathlib import Path
from typing import Annotated

import typer

from pixrl.cli_options import Run, option

commands = typer.Typer()


@commands.command()
def export(
    run: Run,
    layout: Annotated[
        str, option("Key names: diffusers or comfyui.", default="diffusers", flag="--format")
    ] = "diffusers",
    slot: Annotated[
        str | None, option("current or ema.", default="ema, where the run has averaged weights")
    ] = None,
    out: Annotated[Path | None, option("The folder.", default="export in the run's")] = None,
) -> None:
    """Write a run's LoRA for diffusers or ComfyUI, with a model card."""
    from pixrl.evaluation import export as exporting
    from pixrl.models.slots import parse_slot

    done = exporting.export(
        run,
        out=out,
        layout=exporting.parse_format(layout),
        slot=None if slot is None else parse_slot(slot),
    )
    typer.echo(f"LoRA ({done.slot.value}, step {done.step}): {done.file}")
    typer.echo(f"Card: {done.card}")
