"""The commands of fusion: fuse, select."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pixrl.cli_options import (
    Alpha,
    Balance,
    Budget,
    Compare,
    Concepts,
    Device,
    Exemplars,
    Force,
    Keep,
    Model,
    Out,
    Pairs,
    Presence,
    Recipe,
    Run,
    Sampler,
    Seed,
    Set,
)
from pixrl.cli_runs import resumable, say_where
from pixrl.errors import InputError

if TYPE_CHECKING:
    from pixrl.runs.config import FuseConfig

commands = typer.Typer()


@commands.command()
def fuse(
    concepts: Concepts = None,
    pairs: Pairs = None,
    model: Model = None,
    recipe: Recipe = None,
    sampler: Sampler = None,
    compare: Compare = None,
    budget: Budget = None,
    exemplars: Exemplars = None,
    alpha: Alpha = None,
    seed: Seed = None,
    set_: Set = None,
    keep: Keep = None,
    presence: Presence = None,
    balance: Balance = None,
    out: Out = None,
    force: Force = False,
    device: Device = None,
) -> None:
    """Fuse two or more concepts into one new object: [bold]pixrl fuse owl snail[/bold]."""
    if pairs is not None and (concepts or compare):
        raise InputError("--pairs names the concepts and runs one sampler: leave out CONCEPTS and --compare.")
    if compare is not None and sampler is not None:
        raise InputError("--sampler names one sampler and --compare several: give one of them.")
    given = {
        "concepts": concepts or None,
        "model": model,
        "sampler": sampler,
        "budget": budget,
        "exemplars": exemplars,
        "alpha": alpha,
        "seed": seed,
        "keep": keep,
        "presence": presence,
        "balance": balance,
        "device": device,
    }
    config = _fuse_config(
        recipe, {name: value for name, value in given.items() if value is not None}, set_ or []
    )
    _start_fusion(config, pairs, compare, out, force)


def _fuse_config(recipe: str | None, values: dict[str, Any], overrides: list[str]) -> "FuseConfig":
    from pixrl import config
    from pixrl.runs.config import FuseConfig

    return config.load(FuseConfig, recipe, overrides, values=values, kind="fuse")


def _start_fusion(
    config: "FuseConfig", pairs: Path | None, compare: str | None, out: Path | None, force: bool
) -> None:
    from pixrl import api

    if pairs is not None:
        out = out or api.default_fuse_out(config, pairs=pairs)
        with resumable(out):
            api.run_pairs(config, pairs, out, force=force)
    elif compare is not None:
        names = "all" if compare == "all" else [name.strip() for name in compare.split(",")]
        out = out or api.default_fuse_out(config, compare=True)
        with resumable(out):
            api.run_compare(config, names, out, force=force)
    else:
        out = out or api.default_fuse_out(config)
        with resumable(out):
            result = api.run_fuse(config, out, force=force)
            typer.echo(result.selection.summary(out))
    say_where(out)


@commands.command()
def select(run: Run, keep: Keep = None, presence: Presence = None, balance: Balance = None) -> None:
    """Select from a finished run again, with other thresholds; generates nothing."""
    from pixrl import api

    typer.echo(api.select_run(run, keep=keep, presence=presence, balance=balance).summary(run))
    say_where(run)
