"""`pixrl vote RECIPE`: train on what people like, who vote on a local page while the run goes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixrl.cli.options import (
    HOW,
    WHERE,
    Device,
    Force,
    Out,
    Seed,
    Set,
    Steps,
    needing,
    option,
    resumable,
    say_where,
)
from pixrl.errors import InputError

if TYPE_CHECKING:
    from pixrl.runs.config import AlignConfig

commands = typer.Typer()


@commands.command()
def vote(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN",
            help="A recipe with the reward votes: toy/vote; or the folder of such a run, to go on with it.",
            show_default=False,
        ),
    ],
    steps: Steps = None,
    seed: Seed = None,
    simulate: Annotated[
        str | None,
        option("A reward of the recipe that a simulated voter goes by, in the place of people.", HOW),
    ] = None,
    wrong: Annotated[
        float | None, option("Share of the simulated voter's wrong votes.", HOW, "0", min=0, max=1)
    ] = None,
    set_: Set = None,
    out: Out = None,
    force: Force = False,
    device: Device = None,
    page_only: Annotated[
        bool,
        option("Serve the page of a run that another process trains.", WHERE, flag="--page-only"),
    ] = False,
    host: Annotated[str, option("Address to listen at.", WHERE, "127.0.0.1")] = "127.0.0.1",
    port: Annotated[int, option("0 takes any that is free.", WHERE, "8767", min=0, max=65535)] = 8767,
) -> None:
    """Train on people's votes, given on a local page: [bold]pixrl vote toy/vote[/bold]."""
    from pixrl import api

    if not host:
        raise InputError("An empty --host would listen everywhere: say 0.0.0.0 if that is meant.")
    if wrong is not None and simulate is None:
        raise InputError("--wrong is the simulated voter's: give --simulate REWARD with it.")
    run = Path(target)
    if (run / "recipe.yaml").is_file():
        given = {"--steps": steps, "--seed": seed, "--out": out, "--device": device, "--simulate": simulate}
        idle = [name for name, value in given.items() if value is not None] + ["--force"] * force
        if idle:
            raise InputError(
                f"{target} is a run, which goes on as it began: leave {idle[0]} out, or use --set."
            )
        config = api.read_recipe(run, set_ or [])
        _train(target, config, run, host, port, page_only, lambda: api.resume(run, set_ or []))
        return
    if page_only:
        raise InputError(f"--page-only serves the page of a run, and {target} is none. Give a run's folder.")
    settings = None if device is None else {"machine.device": device}
    config = api.load(target, set_ or [], steps=steps, seed=seed, settings=settings)
    if simulate is not None:
        from pixrl.rewards.votes.reward import with_simulated_voter

        rewards = with_simulated_voter(config.rewards, simulate, wrong or 0.0, config.seed)
        config = config.model_copy(update={"rewards": rewards})
    place = out or api.default_out(target, config)
    _train(target, config, place, host, port, False, lambda: api.run_align(config, place, force=force))


def _train(
    target: str,
    config: "AlignConfig",
    run: Path,
    host: str,
    port: int,
    page_only: bool,
    train: Callable[[], object],
) -> None:
    """Train, or with `page_only` wait, beside the page of votes.

    Raises:
        InputError: a package is missing, nobody is asked in this run, or the address cannot be listened at.
    """
    from pixrl.rewards.http import is_loopback
    from pixrl.rewards.votes.reward import Ask, votes_reward

    setting = votes_reward(config.rewards)
    if setting is None:
        named = ", ".join(one.name for one in config.rewards)
        raise InputError(
            f"{target} has no reward that people vote on, only {named}. Add `- {{name: votes}}` to its rewards, or "
            "begin with: pixrl vote toy/vote"
        )
    with needing("serve", "pixrl vote"):
        from pixrl.human_study.live import VoteServer
    try:
        ask = Ask(setting.options.get("ask", Ask.BEST))
    except ValueError:
        raise InputError(f"votes: ask is one of {', '.join(Ask)}, got {setting.options['ask']!r}.") from None
    server = VoteServer(run, ask, config.steps, host, port)
    if not is_loopback(host):
        typer.echo(
            "Other machines can reach it by the link, and nothing is encrypted: use a network that you trust."
        )
    typer.echo(f"Vote at {server.link}")
    if page_only:
        typer.echo("Ctrl-C stops the page; votes are kept, and the run goes on.")
        try:
            server.serve()
        except KeyboardInterrupt:
            typer.echo("\nStopped; every vote is kept.")
        return
    with resumable(run), server.serving():
        train()
    say_where(run)
