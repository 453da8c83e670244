"""What the commands share: an interrupted run says how to go on, a finished one where it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

INTERRUPTED = 130


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Ctrl-C within: the user learns what is on the disk and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        started = (run / "recipe.yaml").is_file()
        hint = f"{_saved(run)} To go on, type: pixrl resume {run}" if started else "Nothing was started."
        typer.echo(f"\nInterrupted. {hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _saved(run: Path) -> str:
    """What of a broken-off run is kept."""
    from pixrl.training import checkpoint

    if not (run / "start.json").is_file():  # fuse writes after every batch
        return "Everything finished is saved."
    newest = checkpoint.latest(run)
    if newest is None:
        return "There is no checkpoint yet, so it will begin again."
    return f"It is saved up to step {checkpoint.step_of(newest)}; what came after is made again."


def say_where(run: Path) -> None:
    report = run / "report.html"
    if leads():
        typer.echo(f"Report: {report}" if report.is_file() else f"Run: {run}")


def leads() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
