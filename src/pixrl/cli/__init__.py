"""The command line: reads arguments, loads settings, calls one function. torch is loaded only when a job starts.

The commands are in demo.py, train.py, vote.py, tools.py and human_study.py; each group is one line below.
"""

import errno
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pixrl import __version__
from pixrl.cli import demo, human_study, tools, train, vote
from pixrl.cli.launch import WORDS
from pixrl.errors import PixrlError


class _Commands(TyperGroup):
    """The group of all commands, which turns errors meant for the user into a message and an exit code."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.meta[WORDS] = tuple(args)
        return super().parse_args(ctx, args)

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
app.add_typer(demo.commands)
app.add_typer(train.commands)
app.add_typer(vote.commands)
app.add_typer(tools.commands)
app.add_typer(tools.toy, name="toy")
app.add_typer(human_study.commands, name="human-study")


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


def main() -> None:
    """Run the console script `pixrl`."""
    # torch on a CPU, once a process: a bfloat16 model's norms with float32 weights take its plain kernel
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # on a CPU with AVX512-BF16 it advises every command to install a kernel that the hub would have to deliver
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app()
    except SystemExit as done:
        distributed = sys.modules.get("torch.distributed")  # without importing torch
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            # One of several processes ends without tearing the interpreter down: gloo's threads that still run would
            # abort a process that succeeded. Everything that a run writes is closed by now, but for these two.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(done.code if isinstance(done.code, int) else int(done.code is not None))
        raise
