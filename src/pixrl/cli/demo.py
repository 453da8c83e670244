"""`pixrl demo`: one small run of each kind on the toy world."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pixrl.cli.launch import run
from pixrl.cli.options import option, resumable

DEMO_PAIRS = ("owl & snail", "cat & cup", "penguin & pineapple")
"""Pairs of concepts that are fused."""
ALIGN_RECIPE = "toy/demo-align"
PERSONALIZE_RECIPE = "toy/demo-personalize"
SUBJECT = 0
"""Number of the held-out toy subject that is personalized."""
MOST_PROCESSES = 4
"""The most processes that share its work on a CPU, about 1 GB of memory each."""
commands = typer.Typer()


@commands.command()
def demo(
    out: Annotated[
        Path | None, option("The folder of its runs.", default="pixrl-demo, or pixrl-demo-2 ...")
    ] = None,
) -> None:
    """Fuse three pairs, align a model and keep a subject on the toy world: minutes, no download, three reports."""
    from pixrl import api
    from pixrl.device import choose_device
    from pixrl.fusion.config import FuseConfig
    from pixrl.runs.place import free_place
    from pixrl.workers import Workers, cores

    if out is None:
        out = free_place(Path(), "pixrl-demo")
    processes = min(cores(), MOST_PROCESSES) if choose_device("auto").type == "cpu" else 1

    typer.echo(f"Fusing {', '.join(DEMO_PAIRS)}: 128 pictures each.")
    with resumable(out / "fuse"):
        api.run_pairs(FuseConfig(), DEMO_PAIRS, out / "fuse", workers=Workers(processes))

    def train(what: str, words: Sequence[str], folder: Path) -> None:
        whole = [*words, "--out", str(folder), "--processes", str(processes)]
        typer.echo(f"\n{what}: pixrl {shlex.join(whole)}")
        code = run(whole, processes)
        if code:
            raise typer.Exit(code)

    train("Teaching a model to draw at night", ["align", ALIGN_RECIPE], out / "align")
    subject = out / "subject"
    word = write_subject(subject)
    words = ["personalize", PERSONALIZE_RECIPE, "--subject", str(subject)]
    train(f"Keeping one {word} in new places", words, out / "personalize")

    typer.echo("\nOpen in a browser:")
    for name in ("fuse", "align", "personalize"):
        typer.echo(f"  {(out / name / 'report.html').absolute()}")
    typer.echo("Then try:  pixrl fuse lion rocket   and   pixrl align toy/e2po")
    typer.echo(f"           pixrl personalize --subject {out / 'subject'}")


def write_subject(folder: Path) -> str:
    """Write a toy subject's folder as `pixrl personalize --subject` takes it; return its class word.

    It holds pictures, class.txt and prompts.txt.
    """
    from pixrl.data.subjects import CLASS_FILE, PROMPTS_FILE
    from pixrl.data.toy import toy_subjects

    _, word, prompts, pictures, _ = toy_subjects("subjects", held_out=True)[SUBJECT]
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    (folder / CLASS_FILE).write_text(f"{word}\n", encoding="utf-8")
    (folder / PROMPTS_FILE).write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return word
