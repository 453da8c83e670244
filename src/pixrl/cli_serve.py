"""The command that serves rewards to runs in other environments: serve-rewards."""

import logging
import os
import secrets
from typing import Annotated

import typer

from pixrl.cli_options import HOW, WHERE, Set, option
from pixrl.errors import InputError

TOKEN_ENV = "PIXRL_REWARD_TOKEN"
commands = typer.Typer()


@commands.command("serve-rewards")
def serve_rewards(
    rewards: Annotated[
        str,
        typer.Argument(
            metavar="REWARDS",
            help="A YAML file with the table `rewards`, or a name under recipes/: toy/serve-rewards.",
            show_default=False,
        ),
    ],
    host: Annotated[str | None, option("Address to listen at.", WHERE, "127.0.0.1")] = None,
    port: Annotated[int | None, option("0 takes any that is free.", WHERE, "8765")] = None,
    token_env: Annotated[
        str, option("Environment variable with the token that clients show.", HOW, TOKEN_ENV)
    ] = TOKEN_ENV,
    set_: Set = None,
) -> None:
    """Serve rewards of this environment to runs in another one, as their reward [bold]remote[/bold]."""
    from pixrl import config
    from pixrl.serve.server import RewardServer, ServeSettings, is_open_to_others

    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = config.load(ServeSettings, rewards, set_ or [], values=given, kind="serve-rewards")
    open_to_others = is_open_to_others(settings)
    token, made_up = _token(token_env, open_to_others)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    server = RewardServer(settings, token)
    server.open()
    for one in server.served:
        typer.echo(f"{one.name}: {one.provenance['model']}, licence: {one.licence}")
    if made_up:
        typer.echo(f"Token, made up for this time: export {token_env}={token}")
    if open_to_others:
        typer.echo("Other machines can reach it, and nothing is encrypted: use a network that you trust.")
    typer.echo(f"Serving rewards at {server.url}; Ctrl-C stops it.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("\nStopped. Runs that use it wait for it to come back.")
    finally:
        server.server_close()


def _token(variable: str, open_to_others: bool) -> tuple[str, bool]:
    """The token, and whether it was made up here.

    Raises:
        InputError: other machines would reach the server, and no token is set.
    """
    given = os.environ.get(variable, "")
    if given:
        return given, False
    if open_to_others:
        raise InputError(
            f"A server that other machines reach needs a token of yours, and {variable} is not set. Type: "
            f"export {variable}=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')"
        )
    return secrets.token_urlsafe(32), True
