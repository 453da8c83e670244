"""What a run gained on held-out prompts, and what it kept of the base's diversity.

    python benchmarks/lift.py RUN [--per-prompt 4] [--steps 10] [--seed 0] [--features toy:identity]
                             [--preference toy:preference]

Base and trained weights draw the same held-out prompts (all of the recipe's `evaluation.source`) from the same noise.
The averaged weights are measured where the run has them. Diversity is the mean of 1 - cosine over pairs of a prompt's
pictures; `--features` names the eyes, best ones that no reward has. The seeds are others than those of the run's own
evaluations.
"""

import argparse
from pathlib import Path

import torch

from pixrl.algorithms.sampling import Solver
from pixrl.models.slots import Slot
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.measure import Drawing, Evaluation, evaluate, evaluated_slot, load_meter, open_run


def main() -> None:
    """Prints one line a figure: base, trained, difference or share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", default="toy:identity")
    parser.add_argument("--preference", help="a preference model that judges beside the run's rewards")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    judge = {"name": "preference_beside", "kind": "preference", "options": {"model": arguments.preference}}
    beside = [RewardSetting.model_validate({**judge, "held_out": True})] if arguments.preference else []
    shop = open_run(arguments.run, beside)
    drawing = Drawing(arguments.per_prompt, arguments.steps, Solver.DPM, arguments.seed, 64)
    meter, prompts = load_meter(arguments.features, None), list(shop.held_out)
    before, after = (
        evaluate(shop.policy, slot, prompts, drawing, shop.rewards, meter)
        for slot in (Slot.REFERENCE, evaluated_slot(shop.config))
    )
    print(
        f"{len(prompts)} held-out prompts x {drawing.per_prompt} pictures, {drawing.steps} steps, seed {drawing.seed}"
    )
    for name in before.rewards:
        show(name, before.rewards[name].mean, after.rewards[name].mean)
        for task in before.rewards[name].tasks:
            show(f"  {task}", before.rewards[name].tasks[task], after.rewards[name].tasks[task])
    show_share(f"diversity by {arguments.features}", before, after)


def show(name: str, before: float, after: float) -> None:
    """A figure and what it gained."""
    print(f"{name:32} {before:8.4f} {after:8.4f} {after - before:+8.4f}")


def show_share(name: str, before: Evaluation, after: Evaluation) -> None:
    """Diversity and the share that is left of the base's."""
    print(
        f"{name:32} {before.distance:8.4f} {after.distance:8.4f} {after.distance / before.distance:8.3f} of the base's"
    )


if __name__ == "__main__":
    main()
