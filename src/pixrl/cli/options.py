"""The parts that commands share: arguments and options, and messages about a run that was interrupted or is finished.

Defaults are shown as text: the settings' models hold the true ones.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pixrl.errors import InputError

WHAT, HOW, CHOICE, WHERE = "What", "How", "Selection", "Where"
"""Headings of the groups of options in a command's help."""
CALIBRATED = "the checkpoint's calibration"


def option(
    help: str, panel: str | None = None, default: str | None = None, flag: str | None = None, **more: Any
) -> Any:
    """Return an option that shows its default as text."""
    names = (flag,) if flag else ()
    text = f"{help} [dim]default: {default}[/dim]" if default else help
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


Concepts = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONCEPT", help="Two or more: owl snail mushroom.", show_default=False),
]
Pairs = Annotated[Path | None, option("A file instead, one 'a & b' a line: fuse them all.", WHAT)]
Model = Annotated[
    str | None, option("toy:NAME, a folder in diffusers' layout, or a hub id.", WHAT, "toy:turbo")
]
Recipe = Annotated[str | None, option("A YAML file, or a name under recipes/; options add to it.", WHAT)]
AlignRecipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or a name under recipes/: toy/e2po.", show_default=False
    ),
]
PersonalizeRecipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or a name under recipes/. "
        "[dim]default: toy/customized-nft, with --subject toy/subject[/dim]",
        show_default=False,
    ),
]
CheckedRecipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or a name under recipes/: toy/e2po. [dim]default with --subject: toy/subject[/dim]",
        show_default=False,
    ),
]
SubjectFolder = Annotated[
    Path | None,
    option(
        "A subject's folder instead of the recipe's: pictures, class.txt, prompts.txt.",
        WHAT,
        flag="--subject",
    ),
]
Steps = Annotated[int | None, option("Training steps.", HOW, "the recipe's")]
Sampler = Annotated[
    str | None,
    option("rmler, ppo, grpo, random, mean, bass, agswap, golden, search, bisect or cmaes.", HOW, "rmler"),
]
Mixing = Annotated[
    str | None,
    option(
        "What of the concepts is mixed: columns, tokens, steps, velocity, spatial or regions.", HOW, "columns"
    ),
]
Policy = Annotated[
    Path | None,
    option(
        "Begin with what a finished fusion has learned (with options.policy=conditional); a folder of pairs: its last.",
        HOW,
    ),
]
Carry = Annotated[
    bool, option("With --pairs: one conditional policy, which goes on learning from pair to pair.", HOW)
]
Processes = Annotated[
    int,
    option(
        "Processes that share each step: one a GPU, or one a core of a CPU, which is faster than threads.",
        HOW,
        "1",
        flag="--processes",
        min=1,
    ),
]
AtATime = Annotated[
    int,
    option("Runs at a time on this machine, a process and a thread each.", HOW, "1", flag="--workers", min=1),
]
Ray = Annotated[
    str | None,
    option("Spread the runs over a Ray cluster instead: local, auto or host:port.", HOW, metavar="ADDRESS"),
]
Cpus = Annotated[float, option("With --ray: CPUs of a run; may be a fraction.", HOW, "1", min=0)]
Gpus = Annotated[
    float | None, option("With --ray: GPUs of a run; may be a fraction.", HOW, "1 where there are any", min=0)
]
Compare = Annotated[str | None, option("Samplers side by side at equal budget: all, or rmler,random.", HOW)]
Budget = Annotated[int | None, option("Pictures in all.", HOW, "128")]
Pool = Annotated[
    int | None,
    option(
        "Of them, those that the best policy draws in the end; the selection is among these.",
        HOW,
        "a quarter",
    ),
]
Everywhere = Annotated[
    bool,
    option("Choose among all pictures, those that the policy learned from too.", CHOICE, flag="--everywhere"),
]
Exemplars = Annotated[
    int | None, option("Pictures of each concept that children are compared with.", HOW, "4")
]
Alpha = Annotated[float | None, option("Weight of the balance in the reward.", HOW, "5")]
Seed = Annotated[int | None, option("Of everything random.", HOW, "0")]
Set = Annotated[
    list[str] | None,
    option("Any other setting of the recipe; repeat for more.", HOW, flag="--set", metavar="A.B=C"),
]
Keep = Annotated[int | None, option("How many of the candidates are selected.", CHOICE, "4")]
Presence = Annotated[
    float | None, option("A child shows a concept above this similarity.", CHOICE, CALIBRATED)
]
Balance = Annotated[
    float | None, option("A child is balanced below this difference of similarities.", CHOICE, CALIBRATED)
]
Out = Annotated[Path | None, option("The run's folder.", WHERE, "a new one under runs/")]
Force = Annotated[bool, option("Replace a run that is there already.", WHERE, flag="--force")]
Device = Annotated[str | None, option("auto, cpu, cuda, cuda:1 or mps.", WHERE, "auto")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]
Repair = Annotated[
    bool, option("First drop what lies behind the last good line of a damaged log.", flag="--repair")
]


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Say which extra of pixrl brings the package that an import of the block lacks; `what` needs it."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{what} needs {error.name}, which is not installed. Type: pip install 'pixrl[{extra}]'"
        ) from error


INTERRUPTED = 130
"""Exit code after Ctrl-C."""


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Tell the user, where Ctrl-C ends the block, what of the run is saved and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if leads():
            typer.echo(f"\nInterrupted. {str(stopped) or _state_of(run)}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _state_of(run: Path) -> str:
    """Say what of a run that was broken off is on the disk, and how to go on."""
    from pixrl.runs import checkpoint
    from pixrl.runs.folder import METRICS
    from pixrl.runs.place import CHILDREN

    if not (run / "recipe.yaml").is_file():
        return "Nothing was started."
    on = f"To go on, type: pixrl resume {run}"
    if (run / CHILDREN).is_dir():
        return f"Finished fusions are kept; the one in hand goes on from its last whole step. {on}"
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
    return f"{saved}; {again}. {on}"


def say_where(run: Path) -> None:
    """Print where a run's report lies, or its folder where it has none."""
    report = run / "report.html"
    if leads():
        typer.echo(f"Report: {report}" if report.is_file() else f"Run: {run}")


def leads() -> bool:
    """Return whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
