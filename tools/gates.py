#!/usr/bin/env python3
"""Prints the gates of the shipped toy checkpoints as a markdown table, from the figures in their provenance.json."""

import json
from typing import Any

from pixrl.toy import CHECKPOINTS
from pixrl.toy.verify import checks


def main() -> None:
    print("| checkpoint | figure | measured | gate | |")
    print("|---|---|---|---|---|")
    for name in checks():
        path = CHECKPOINTS / name / "provenance.json"
        if not path.exists():
            print(f"| `{name}` | | | | not built |")
            continue
        for gate in json.loads(path.read_text())["gates"]:
            row = (f"`{name}`", gate["figure"], f"{gate['value']:.3f}", _limits(gate), _verdict(gate))
            print(f"| {' | '.join(row)} |")


def _verdict(gate: dict[str, Any]) -> str:
    return "passed" if gate["passed"] else "**not passed**"


def _limits(gate: dict[str, Any]) -> str:
    bounds = (("≥", "at_least"), ("≤", "at_most"))
    return ", ".join(f"{sign} {gate[key]:g}" for sign, key in bounds if key in gate)


if __name__ == "__main__":
    main()
