#!/usr/bin/env python3
"""Prints the gates of the shipped toy checkpoints as a markdown table, from the figures in their provenance.json."""

import json

from pixrl.toy.build import CHECKPOINTS, STAGES


def main() -> None:
    print("| checkpoint | figure | measured | gate | |")
    print("|---|---|---|---|---|")
    for name in STAGES:
        path = CHECKPOINTS / name / "provenance.json"
        if not path.exists():
            print(f"| `{name}` | | | | not built |")
            continue
        for gate in json.loads(path.read_text())["gates"]:
            limits = f"≥ {gate['at_least']:g}" + (f", ≤ {gate['at_most']:g}" if "at_most" in gate else "")
            print(
                f"| `{name}` | {gate['figure']} | {gate['value']:.3f} | {limits if gate['at_least'] else ''} | "
                f"{'pass' if gate['passed'] else '**not passed**'} |"
            )


if __name__ == "__main__":
    main()
