"""What the commands share: an interrupted run says how to go on, a finished one where it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

INTERRUPTED = 130


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Ctrl-C within: the user learns what is saved and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if leads():
            typer.echo(f"\nInterrupted. {str(stopped) or _state_of(run)}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _state_of(run: Path) -> str:
    """What of a run that was broken off is on the disk, and how to go on."""
    if not (run / "recipe.yaml").is_file():
        return "Nothing was started."
    return f"{_saved(run)} To go on, type: pixrl resume {run}"


def _saved(run: Path) -> str:
    """In words, by the newest whole checkpoint and the steps that are logged."""
    from pixrl.runs import checkpoint
    from pixrl.runs.folder import METRICS
    from pixrl.runs.place import CHILDREN

    if (run / CHILDREN).is_dir():
        return "Finished fusions are kept; the one in hand goes on from its last whole step."
    newest = checkpoint.latest(run)
    step = 0 if newest is None else checkpoint.step_of(newest)
    log = run / METRICS
    later = log.read_bytes().count(b"\n") - step if log.is_file() else 0
    saved = f"Saved up to step {step}" if step else "No step is saved yet"
    again = (
        f"the steps logged since ({later}) are drawn again"
        if later > 0
        else "what was begun since is drawn again"
    )
    return f"{saved}; {again}."


def say_where(run: Path) -> None:
    report = run / "report.html"
    if leads():
        typer.echo(f"Report: {report}" if report.is_file() else f"Run: {run}")


def leads() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
