"""`pixrl human-study make|serve|results`: ask people which system's pictures are better."""

from pathlib import Path
from typing import Annotated

import typer

from pixrl.cli.options import HOW, WHAT, WHERE, Seed, needing, option
from pixrl.errors import InputError

commands = typer.Typer(
    help="Studies with people: make one from pictures, serve it, read its results.", no_args_is_help=True
)
StudyFolder = Annotated[Path, typer.Argument(metavar="STUDY", help="A study's folder.", show_default=False)]


@commands.command()
def make(
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]FOLDER",
            help="Two or more: runs, an evaluation in one (RUN/samples/step-000000), or folders of pictures whose "
            "prompts stand in captions beside them or in their names.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, option("The study's new folder.", WHERE, "human-study")] = None,
    criteria: Annotated[
        list[str] | None,
        option("e2po, rmler, customized-grpo, or name=question; repeat for more.", WHAT, "e2po"),
    ] = None,
    design: Annotated[str | None, option("pairs, or best (of all systems).", HOW, "pairs")] = None,
    ties: Annotated[
        bool | None,
        option(
            "Allow `none is better`, or not.", HOW, "as the criteria's study did", flag="--ties/--no-ties"
        ),
    ] = None,
    title: Annotated[
        str | None, option("What participants read first.", WHAT, "Which picture is better?")
    ] = None,
    prompts: Annotated[int | None, option("So many, chosen by the seed.", WHAT, "all")] = None,
    comparisons: Annotated[int | None, option("For each participant.", HOW, "30")] = None,
    checks: Annotated[int | None, option("Attention checks for each participant.", HOW, "6")] = None,
    participants: Annotated[int, option("How many links.", HOW, "20", min=1, max=100_000)] = 20,
    only_matched: Annotated[
        bool, option("Leave out prompts that not every system drew.", WHAT, flag="--only-matched")
    ] = False,
    seed: Seed = None,
) -> None:
    """Make a blind study from the pictures of runs and folders."""
    from pixrl import config
    from pixrl.human_study.make import make as make_study
    from pixrl.human_study.make import parse_systems
    from pixrl.human_study.study import StudySettings, parse_criteria

    found = parse_systems(systems or [])
    preset = parse_criteria(criteria or ["e2po"])
    given = {
        "design": design,
        "title": title,
        "prompts": prompts,
        "comparisons": comparisons,
        "checks": checks,
        "seed": seed,
    }
    values: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    values["criteria"] = [one.model_dump() for one in preset.criteria]
    values["ties"] = preset.ties if ties is None else ties
    settings = config.load(StudySettings, values=values)
    place = out or Path("human-study")
    folder = make_study(found, settings, place, participants=participants, only_matched=only_matched)
    study = folder.study
    asked = len({item.prompt for item in study.items})
    typer.echo(
        f"Study: {place}, {len(study.pictures)} pictures of {asked} prompts by {len(study.systems)} "
        f"systems, {participants} participants. Next: pixrl human-study serve {place}"
    )


@commands.command()
def serve(
    study: StudyFolder,
    host: Annotated[str, option("Address to listen at.", WHERE, "127.0.0.1")] = "127.0.0.1",
    port: Annotated[int, option("0 takes any that is free.", WHERE, "8766", min=0, max=65535)] = 8766,
    url: Annotated[
        str | None,
        option("What links begin with, where a proxy or tunnel leads here.", WHERE, "host and port"),
    ] = None,
    participants: Annotated[
        int | None, option("Add links until there are so many.", HOW, min=1, max=100_000)
    ] = None,
    static: Annotated[
        Path | None,
        option(
            "Write a folder for any web server instead; votes come back as files.", WHERE, flag="--static"
        ),
    ] = None,
) -> None:
    """Serve a study to its participants, each by a link of their own; Ctrl-C stops it, and it goes on later."""
    with needing("serve", "human-study serve"):
        from pixrl.human_study.server import StudyServer, write_bundle, write_links
    from pixrl.human_study.study import open_study
    from pixrl.human_study.votes import Votes
    from pixrl.rewards.http import is_loopback

    if not host:
        raise InputError("An empty --host would listen everywhere: say 0.0.0.0 if that is meant.")
    folder = open_study(study)
    if participants is not None:
        with Votes(folder.votes) as votes:
            added = votes.add_participants(folder.study, participants)
        typer.echo(f"{added} participants added.")
    if static is not None:
        count = write_bundle(folder, static)
        links = write_links(folder, url or "http://localhost:8000", static=True)
        typer.echo(f"Bundle for {count} participants: {static}; their links: {links}")
        typer.echo(f"Their files of votes come in by: pixrl human-study results {study} --import FILE")
        return
    server = StudyServer(folder, host, port)
    links = write_links(folder, url or server.url)
    first = links.read_text(encoding="utf-8").splitlines()[1].partition(",")[2]
    typer.echo(f"Links, one a participant (each is a secret): {links}\nThe first: {first}")
    if not is_loopback(host):
        typer.echo(
            "Other machines can reach it, and nothing is encrypted: use a network that you trust, or a proxy."
        )
    typer.echo(f"Serving at {server.url}; Ctrl-C stops it, and the same command goes on.")
    try:
        server.serve()
    except KeyboardInterrupt:
        typer.echo(f"\nStopped; every vote is kept. Results: pixrl human-study results {study}")


@commands.command()
def results(
    study: StudyFolder,
    imported: Annotated[
        list[Path] | None,
        option(
            "A file of votes that a participant of a bundle sent; repeat for more.", WHAT, flag="--import"
        ),
    ] = None,
    least_checks: Annotated[
        float, option("Share of attention checks to pass, or be left out.", HOW, "0.75", min=0, max=1)
    ] = 0.75,
    out: Annotated[
        Path | None, option("Where results.html, results.csv, votes.csv go.", WHERE, "STUDY")
    ] = None,
) -> None:
    """Win rates, strengths, agreement, and the automatic rewards against the votes: a page and CSV files."""
    with needing("serve", "human-study results"):
        from pixrl.human_study.server import import_votes
    from pixrl.human_study import report
    from pixrl.human_study.results import compute
    from pixrl.human_study.study import open_study

    folder = open_study(study)
    if imported:
        typer.echo(f"Imported votes: {import_votes(folder, imported)}")
    found = compute(folder, least_checks=least_checks)
    place = out or study
    report.write(folder, found, place)
    typer.echo("\n".join(report.lines(found)))
    typer.echo(f"Page: {place / report.PAGE}; tables: {place / report.FIGURES}, {place / report.VOTES_TABLE}")
