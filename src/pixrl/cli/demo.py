"""`pixrl demo`: one small run of each kind on the toy world."""

from pathlib import Path
from typing import Annotated

import typer

from pixrl.cli.options import option, resumable

DEMO_PAIRS = ("owl & snail", "cat & cup", "penguin & pineapple")
"""Pairs of concepts that are fused."""
ALIGN_RECIPE = "toy/demo-align"
PERSONALIZE_RECIPE = "toy/demo-personalize"
SUBJECT = 0
"""Number of the held-out toy subject that is personalized."""
commands = typer.Typer()


@commands.command()
def demo(
    out: Annotated[
        Path | None, option("The folder of its runs.", default="pixrl-demo, or pixrl-demo-2 ...")
    ] = None,
) -> None:
    """Fuse three pairs, align a model and keep a subject on the toy world: minutes, no download, three reports."""
    from pixrl import api
    from pixrl.fusion.config import FuseConfig
    from pixrl.runs.config import load_personalize
    from pixrl.runs.place import free_place

    if out is None:
        out = free_place(Path(), "pixrl-demo")

    typer.echo(f"Fusing {', '.join(DEMO_PAIRS)}: 128 pictures each.")
    with resumable(out / "fuse"):
        fused = api.run_pairs(FuseConfig(), DEMO_PAIRS, out / "fuse")
    reports = [fused / "report.html"]

    config = api.load(ALIGN_RECIPE, kind="align")
    typer.echo(
        f"\nAligning {config.model} with GenEval's rules: {config.steps} steps, same prompts before and after."
    )
    with resumable(out / "align"):
        reports.append(api.run_align(config, out / "align").report)

    word = write_subject(out / "subject")
    config, _ = load_personalize(PERSONALIZE_RECIPE, subject=out / "subject")
    typer.echo(f"\nKeeping one {word} ({out / 'subject'}) in new places: {config.steps} steps.")
    with resumable(out / "personalize"):
        reports.append(api.run_align(config, out / "personalize").report)

    typer.echo("\nOpen in a browser:")
    for report in reports:
        typer.echo(f"  {report.absolute()}")
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
