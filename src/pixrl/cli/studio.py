"""`pixrl studio`: look at runs while they train, in a browser."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pixrl.cli.options import WHAT, WHERE, needing, option
from pixrl.hub import TOY_PREFIX

commands = typer.Typer()
TOKEN = "PIXRL_STUDIO_TOKEN"


@commands.command()
def studio(
    runs: Annotated[
        Path, typer.Argument(metavar="RUNS", help="A folder of runs, or a run.", show_default="runs")
    ] = Path("runs"),
    host: Annotated[
        str, option(f"Address to listen at; another than this machine needs {TOKEN}.", WHERE, "127.0.0.1")
    ] = "127.0.0.1",
    model: Annotated[
        str, option("What draws fusions: toy:NAME, a folder, or a hub id.", WHAT, "toy:sd3")
    ] = "toy:sd3",
    port: Annotated[int, option("0 takes any that is free.", WHERE, "8767", min=0, max=65535)] = 8767,
) -> None:
    """Show runs while they train, on a local page, and fuse concepts there by hand."""
    with needing("studio", "studio"):
        from pixrl.studio.app import Studio, launch
    from pixrl.toy.vocabulary import KINDS

    page = Studio(runs, KINDS if model.startswith(TOY_PREFIX) else (), model)
    url = launch(page, host, port, os.environ.get(TOKEN))
    typer.echo(f"Studio: {url}  (Ctrl-C closes it; runs go on)")
    try:
        page.page.block_thread()
    except KeyboardInterrupt:
        typer.echo("\nClosed.")
