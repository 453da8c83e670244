"""The commands of the toy world: toy build, toy verify."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixrl.cli_options import option
from pixrl.cli_runs import INTERRUPTED
from pixrl.libraries import check_torchvision

if TYPE_CHECKING:
    from pixrl.toy.verify import Gate

commands = typer.Typer(help="The embedded toy world: build and verify its checkpoints.", no_args_is_help=True)


@commands.command("build")
def toy_build(
    stage: Annotated[
        list[str] | None, option("Only this stage; repeat for more.", default="all of them")
    ] = None,
    resume: Annotated[bool, option("Go on with a build that was killed.", flag="--resume")] = False,
    out: Annotated[Path | None, option("Where the checkpoints go.", default="into the package")] = None,
    device: Annotated[str, option("cpu, cuda or mps.", default="cpu")] = "cpu",
) -> None:
    """Train the toy world's checkpoints from nothing: hours on two cores, minutes on a GPU."""
    check_torchvision()
    from pixrl.toy.build import build

    try:
        folder = build(stage or [], resume=resume, out=out, device=device)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. To go on, add --resume to the same command.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"Checkpoints: {folder}")


@commands.command("verify")
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
    typer.echo(_gates_as_json(gates, passed) if as_json else "\n".join(map(_gate_line, gates)))
    if not passed:
        raise typer.Exit(1)


def _gates_as_json(gates: "Sequence[Gate]", passed: bool) -> str:
    rows = [{**asdict(gate), "passed": gate.passed} for gate in gates]
    finite = [{key: x if x not in (math.inf, -math.inf) else None for key, x in row.items()} for row in rows]
    return json.dumps({"passed": passed, "gates": finite}, indent=1)


def _gate_line(gate: "Gate") -> str:
    limits = (
        f"{gate.at_least:g} or more" if math.isinf(gate.at_most) else f"{gate.at_least:g} to {gate.at_most:g}"
    )
    return f"{'ok  ' if gate.passed else 'FAIL'}  {gate.checkpoint:<11}{gate.figure:<48}{gate.value:>9.3f}  ({limits})"
