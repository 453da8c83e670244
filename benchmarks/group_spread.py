"""How much do the samples of one group differ, by what makes them differ?

    python benchmarks/group_spread.py                    groups of 8 on toy:sd3, 24 prompts each

Noise alone, and E2PO's variants at growing distance from the prompt (`target`, the cosine to the anchor). Mean reward,
standard deviation within groups, share of groups without any, and CLIP diversity within groups; the untrained policy.
"""

import argparse
from typing import Any

from pixrl import config as recipes
from pixrl.algorithms.advantages import reward_metrics
from pixrl.metrics.diversity import group_diversity
from pixrl.runs.config import AlignConfig
from pixrl.runs.loaded import load_run, plan_batches

NEAR = {"exploration.target": 0.8, "exploration.max_norm": 0.5}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("8 noises", "toy/diffusion-nft", {"exploration.noises": 8}),
    ("2 noises", "toy/diffusion-nft", {"exploration.noises": 2}),
    ("2 x 4, cosine 0.8", "toy/e2po", NEAR),
    ("2 x 4, cosine 0.6", "toy/e2po", {}),
    ("2 x 4, cosine 0.4", "toy/e2po", {"exploration.target": 0.4}),
    ("2 x 4, cosine 0.2", "toy/e2po", {"exploration.target": 0.2}),
    ("2 x 4, cosine 0.6, static", "toy/e2po", {"exploration.schedule": "static"}),
)


def spread(recipe: str, changes: dict[str, Any], prompts: int) -> dict[str, float]:
    """Figures of one batch of groups."""
    values = {"prompts.per_step": prompts, **changes}
    shop = load_run(recipes.load(AlignConfig, recipe, values=values, kind="align"))
    aligner = shop.aligner(plan_batches(shop)[0])
    rollouts = aligner.collect(shop.prompts.groups(0), 0)
    scores = shop.rewards.score(rollouts.samples.batch(rollouts.images_BCHW))
    weights = shop.rewards.weights(0)
    size = rollouts.samples.per_group
    rewards = {name: scores[name].values_B.view(-1, size) for name in weights}
    metrics = reward_metrics(rewards, weights)
    return {
        "reward": float(next(iter(rewards.values())).nanmean()),
        "group_std": metrics["group_std"],
        "zero_std_share": metrics["zero_std_share"],
        "diversity": float(group_diversity(rollouts.images_BCHW, size, shop.features).mean()),
        "anchor_cosine": rollouts.metrics.get("anchor_cosine", 1.0),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24)
    arguments = parser.parse_args()
    for number, (name, recipe, changes) in enumerate(CASES):
        figures = spread(recipe, changes, arguments.prompts)
        if number == 0:
            print("| group | " + " | ".join(figures) + " |\n|---|" + "--:|" * len(figures))
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in figures.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
