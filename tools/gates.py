#!/usr/bin/env python3
"""Prints the gates of the shipped toy checkpoints as a markdown table, from the figures in their provenance.json."""

import json
from typing import Any

from pixrl.hub import TOY_NAMES
from pixrl.toy import CHECKPOINTS


def main() -> None:
    print("| checkpoint | figure | measured | gate | |")
    print("|---|---|---|---|---|")
    for name in TOY_NAMES:
        path = CHECKPOINTS / name / "provenance.json"
        if not path.exists():
            print(f"| `{name}` | | | | not built |")
            continue
        for gate in json.loads(path.read_text())["gates"]:
            print(
                f"| `{name}` | {gate['figure']} | {gate['value']:.3f} | {_limits(gate)} | {_verdict(gate)} |"
            )


def _limits(gate: dict[str, Any]) -> str:
    if not gate["at_least"]:
        return ""
    return f"≥ {gate['at_least']:g}" + (f", ≤ {gate['at_most']:g}" if "at_most" in gate else "")


def _verdict(gate: dict[str, Any]) -> str:
    if not gate["at_least"]:
        return "no gate"
    return "passed" if gate["passed"] else "**not passed**"


if __name__ == "__main__":
    main()
