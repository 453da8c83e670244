"""Commands around runs: doctor, export, draw, studio, serve-rewards, study; and toy build, toy verify."""

import contextlib
import json
import logging
import math
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pixrl.cli.options import (
    HOW,
    INTERRUPTED,
    WHAT,
    WHERE,
    AtATime,
    CheckedRecipe,
    Cpus,
    Force,
    Gpus,
    Out,
    Ray,
    Run,
    Seed,
    Set,
    Steps,
    SubjectFolder,
    needing,
    option,
)
from pixrl.errors import InputError
from pixrl.hub import TOY_PREFIX
from pixrl.libraries import check_torchvision, from_checkout

commands = typer.Typer()


@commands.command()
def doctor(
    recipe: CheckedRecipe = None,
    subject: SubjectFolder = None,
    steps: Steps = None,
    seed: Seed = None,
    set_: Set = None,
    processes: Annotated[
        int | None, option("How many would share the work.", default="as a launcher started, else 1", min=1)
    ] = None,
    out: Out = None,
    force: Force = False,
    score: Annotated[
        bool, option("Also load the rewards and score a synthetic batch, as a run does.", flag="--score")
    ] = False,
    gpu: Annotated[
        str | None,
        option("Plan for such cards instead, from configs alone: a size in GiB, 4090, a100-80, h100 ..."),
    ] = None,
    as_json: Annotated[bool, option("Print one JSON object.", flag="--json")] = False,
) -> None:
    """What a fuse, align or personalize recipe needs, and whether it can run here; exit code 1 when not."""
    from pixrl import api

    count = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if gpu is not None:
        if score or force or out is not None:
            raise InputError("--gpu plans from configs alone: leave --score, --out and --force out.")
        plans = api.plan_card(
            recipe, gpu, set_ or [], subject=subject, steps=steps, seed=seed, processes=count
        )
        named = " ".join(([recipe] if recipe else []) + ([f"--subject {subject}"] if subject else []))
        typer.echo(json.dumps(plans.to_json(), indent=1) if as_json else "\n".join(plans.lines(named)))
        if plans.chosen is None:
            raise typer.Exit(1)
        return
    found = api.examine(
        recipe,
        set_ or [],
        subject=subject,
        steps=steps,
        seed=seed,
        processes=count,
        out=out,
        force=force,
        score=score,
    )
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(found.lines()))
    if not found.can_run:
        raise typer.Exit(1)


@commands.command()
def export(
    run: Run,
    layout: Annotated[
        str | None,
        option(
            "Of a LoRA: diffusers', comfyui's or uno's key names; of train: full: diffusers' folder, or weights.",
            default="diffusers",
            flag="--format",
        ),
    ] = None,
    slot: Annotated[
        str | None,
        option("Of trained weights: current or ema.", default="ema, where the run has averaged weights"),
    ] = None,
    child: Annotated[
        int | None, option("Of a fusion: whose coefficients.", default="the best of the selection")
    ] = None,
    out: Annotated[Path | None, option("The folder.", default="export/FORMAT in the run's")] = None,
) -> None:
    """Write a run's LoRA, or all its weights, for other programs, with a card; of a fusion, a child's coefficients."""
    from pixrl.models.slots import parse_slot
    from pixrl.report import export as exporting

    if child is not None or exporting.is_fusion(run):
        for name, given in (("--format", layout), ("--slot", slot)):
            if given is not None:
                raise InputError(
                    f"{name} is for trained weights, and a child of a fusion has coefficients: leave it out."
                )
        found = exporting.export_child(run, child, out)
        typer.echo(f"Coefficients of child {found.child}: {found.file}")
        typer.echo(f"Prompts, in this order: {'; '.join(found.prompts)}")
        return
    done = exporting.export(
        run,
        out=out,
        layout=exporting.parse_format(layout or "diffusers"),
        slot=None if slot is None else parse_slot(slot),
    )
    typer.echo(f"{done.what} ({done.slot.value}, step {done.step}): {done.file}")
    typer.echo(f"Card: {done.card}")


@commands.command()
def draw(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run's folder; a LoRA with --model; or a model.", show_default=False
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to draw; none for a fusion.", show_default=False),
    ] = None,
    n: Annotated[int, option("How many pictures.", HOW, "4", flag="--n")] = 4,
    size: Annotated[
        str | None,
        option("Their pixels: 1024, or width x height: 832x1216.", HOW, "the run's, or the model's"),
    ] = None,
    seed: Annotated[int, option("Of the noises.", HOW, "0")] = 0,
    guidance: Annotated[float | None, option("Guidance scale.", HOW, "the run's, or the model's")] = None,
    negative_prompt: Annotated[
        str | None, option("What guidance leads away from.", HOW, "the run's, or the model's own")
    ] = None,
    child: Annotated[
        int | None, option("Of a fusion: the child to draw again, its own noise first, then others.", HOW)
    ] = None,
    subject: Annotated[
        str | None, option("Of a personalization: whose references are shown.", HOW, "its only subject")
    ] = None,
    model: Annotated[str | None, option("The model that a LoRA belongs to.", HOW)] = None,
    out: Annotated[Path | None, option("A new folder.", WHERE, "one under drawn/")] = None,
    device: Annotated[str | None, option("auto, cpu, cuda or cuda:1.", WHERE, "the run's")] = None,
) -> None:
    """Draw with what a run has learned, or a child of a fusion again."""
    from pixrl import api

    drawn = api.draw(
        what,
        prompt,
        n,
        size,
        seed,
        out,
        guidance=guidance,
        negative_prompt=negative_prompt,
        model=model,
        subject=subject,
        child=child,
        device=device,
    )
    typer.echo(f"{len(drawn)} pictures: {drawn.files[0].parent}")


TOKEN_ENV = "PIXRL_REWARD_TOKEN"


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
    from pixrl.rewards.http import is_loopback

    with needing("serve", "serve-rewards"):
        from pixrl.serve.server import RewardServer, ServeSettings

    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = config.load(ServeSettings, rewards, set_ or [], values=given, kind="serve-rewards")
    open_to_others = not is_loopback(settings.host)
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
    with contextlib.suppress(KeyboardInterrupt):  # which a shell's background jobs are never given
        server.serve()
    typer.echo("\nStopped. Runs that use it wait for it to come back.")


def _token(variable: str, open_to_others: bool) -> tuple[str, bool]:
    """Return the token of a reward server, and whether it was made up here.

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


@commands.command()
def study(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A YAML file of kind fuse-study, align-study or personalize-study, or a name under recipes/: "
            "toy/align-study.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, option("The study's folder.", WHERE, "runs/ and the recipe's name")] = None,
    workers: AtATime = 1,
    ray: Ray = None,
    cpus: Cpus = 1.0,
    gpus: Gpus = None,
    set_: Set = None,
    table: Annotated[
        bool, option("Only write the tables and charts of the records so far.", flag="--table")
    ] = False,
) -> None:
    """Compare variants of a recipe over seeds, with tables and intervals; the same command goes on with it."""
    command = from_checkout("studies.command", "Studies", "pixrl study")
    from pixrl.workers import Workers

    try:
        typer.echo(
            command.run(recipe, out, set_ or [], workers=Workers(workers, ray, cpus, gpus), only_tables=table)
        )
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on where it stopped.", err=True)
        raise typer.Exit(INTERRUPTED) from None


STUDIO_TOKEN = "PIXRL_STUDIO_TOKEN"


@commands.command()
def studio(
    runs: Annotated[
        Path, typer.Argument(metavar="RUNS", help="A folder of runs, or a run.", show_default="runs")
    ] = Path("runs"),
    host: Annotated[
        str,
        option(f"Address to listen at; another than this machine needs {STUDIO_TOKEN}.", WHERE, "127.0.0.1"),
    ] = "127.0.0.1",
    model: Annotated[
        str, option("What draws fusions: toy:NAME, a folder, or a hub id.", WHAT, "toy:turbo")
    ] = "toy:turbo",
    port: Annotated[int, option("0 takes any that is free.", WHERE, "8767", min=0, max=65535)] = 8767,
) -> None:
    """Show runs while they train, on a local page, and fuse concepts there by hand."""
    with needing("studio", "studio"):
        from pixrl.studio.app import Studio, launch
    from pixrl.toy.vocabulary import KINDS

    page = Studio(runs, KINDS if model.startswith(TOY_PREFIX) else (), model)
    url = launch(page, host, port, os.environ.get(STUDIO_TOKEN))
    typer.echo(f"Studio: {url}  (Ctrl-C closes it; runs go on)")
    try:
        page.page.block_thread()
    except KeyboardInterrupt:
        typer.echo("\nClosed.")


toy = typer.Typer(help="The embedded toy world: build and verify its checkpoints.", no_args_is_help=True)


@toy.command("build")
def build_toy_world(
    stage: Annotated[
        list[str] | None, option("Only this stage; repeat for more.", default="all of them")
    ] = None,
    out: Annotated[Path | None, option("Where the checkpoints go.", default="into the package")] = None,
    device: Annotated[str, option("cpu, cuda or mps.", default="cpu")] = "cpu",
) -> None:
    """Train the toy world's checkpoints from nothing: a day on two cores, minutes on a GPU.

    A build that was killed goes on where it stopped.
    """
    check_torchvision()
    toy_build = from_checkout("toy_build", "Builds of the toy checkpoints", "pixrl toy build")
    try:
        folder = toy_build.build(stage or [], out=out, device=device)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on where it stopped.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"Checkpoints: {folder}")


@toy.command("verify")
def toy_verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Only these: clip sd3 ...; without one, all.", show_default=False
        ),
    ] = None,
    quick: Annotated[bool, option("Take a quarter of the samples.", flag="--quick")] = False,
    as_json: Annotated[bool, option("Print one JSON object.", flag="--json")] = False,
) -> None:
    """Measure the shipped checkpoints on held-out scenes against their gates; exit code 1 when one fails."""
    check_torchvision()
    from pixrl.toy.verify import verify

    gates = verify(names or [], quick=quick)
    passed = all(gate.passed for gate in gates)
    if as_json:
        rows = [{**asdict(gate), "passed": gate.passed} for gate in gates]
        finite = [
            {key: x if x not in (math.inf, -math.inf) else None for key, x in row.items()} for row in rows
        ]
        typer.echo(json.dumps({"passed": passed, "gates": finite}, indent=1))
    else:
        for gate in gates:
            most = " or more" if math.isinf(gate.at_most) else f" to {gate.at_most:g}"
            typer.echo(
                f"{'ok  ' if gate.passed else 'FAIL'}  {gate.checkpoint:<11}{gate.figure:<48}{gate.value:>9.3f}  "
                f"({gate.at_least:g}{most})"
            )
    if not passed:
        raise typer.Exit(1)
