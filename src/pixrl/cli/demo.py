"""`pixrl demo`: each job once, small, on the toy world."""

from pathlib import Path
from typing import Annotated

import typer

from pixrl.cli.options import option, resumable

DEMO_PAIRS = ("owl & snail", "turtle & mushroom", "penguin & pineapple")
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
    out = out or _unused(Path("pixrl-demo"))
    reports = [_fuse(out / "fuse"), _align(out / "align"), _personalize(out / "personalize", out / "subject")]
    typer.echo("\nOpen in a browser:")
    for report in reports:
        typer.echo(f"  {report.absolute()}")
    typer.echo("Then try:  pixrl fuse owl snail mushroom   and   pixrl align toy/e2po")
    typer.echo(f"           pixrl personalize --subject {out / 'subject'}")


def _fuse(run: Path) -> Path:
    from pixrl import api
    from pixrl.config import load
    from pixrl.runs.config import FuseConfig

    typer.echo(f"Fusing {', '.join(DEMO_PAIRS)}: 128 pictures each.")
    with resumable(run):
        return (
            api.run_pairs(load(FuseConfig, None, values={"model": "toy:sd3"}), DEMO_PAIRS, run)
            / "report.html"
        )


def _align(run: Path) -> Path:
    from pixrl import api

    config = api.load(ALIGN_RECIPE, kind="align")
    typer.echo(
        f"\nAligning {config.model} with GenEval's rules: {config.steps} steps, same prompts before and after."
    )
    with resumable(run):
        return api.run_align(config, run).report


def _personalize(run: Path, folder: Path) -> Path:
    from pixrl import api

    word = write_subject(folder)
    config, _ = api.load_personalize(PERSONALIZE_RECIPE, subject=folder)
    typer.echo(f"\nKeeping one {word} ({folder}) in new places: {config.steps} steps.")
    with resumable(run):
        return api.run_align(config, run).report


def write_subject(folder: Path) -> str:
    """A folder as `pixrl personalize --subject` takes it: pictures, class.txt, prompts.txt. The class word."""
    from pixrl.data.subjects import CLASS_FILE, PROMPTS_FILE
    from pixrl.data.toy import toy_subjects

    _, word, prompts, pictures, _ = toy_subjects("subjects", held_out=True)[SUBJECT]
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    (folder / CLASS_FILE).write_text(f"{word}\n", encoding="utf-8")
    (folder / PROMPTS_FILE).write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return word


def _unused(path: Path) -> Path:
    """The path, or path-2, path-3 ... where it is taken."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
