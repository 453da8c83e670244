"""At which noise levels does the gradient of an alignment carry a signal, and how much?

    python benchmarks/gradient_signal.py toy/diffusion-nft --batches 12
    python benchmarks/gradient_signal.py toy/flow-grpo --batches 12
    python benchmarks/gradient_signal.py toy/customized-grpo --batches 12

Draws batches of different prompts with the untrained policy, takes the loss's gradient level by level, and compares it
between batches. What two batches agree on is signal, the rest is noise: with gradients g_i of n batches, signal is the
mean of <g_i, g_j> over pairs and total the mean of |g_i|^2; the figure is signal / (total - signal), the squared
signal-to-noise ratio of one batch. About zero, or below: nothing can be learned there at this batch size. It says
nothing of whether what is agreed on is the reward's doing; compare with `--shuffled`, which deals each group's scores
out at random.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from pixrl import api
from pixrl.algorithms.grpo import GRPOSettings
from pixrl.algorithms.loss import Rollouts
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.trainer import Aligner
from pixrl.models.pipeline import chunks
from pixrl.models.slots import Slot
from pixrl.runs.loaded import LoadedRun, load_run, plan_batches

LEVELS = 10


def workshop(recipe: str, prompts: int, changed: Sequence[str]) -> LoadedRun:
    """The recipe with all of ten noise levels trained, and no pull towards other policies."""
    config = api.load(recipe, changed)
    changes = [*changed, f"prompts.per_step={prompts}", f"sampling.steps={LEVELS}", "loss.kl=0"]
    if isinstance(config.loss, NFTSettings):
        changes += [f"loss.timesteps={LEVELS}", "loss.levels=null"]
    if isinstance(config.loss, GRPOSettings):
        changes += ["loss.clip=null", "optimizer.updates=1"]
    return load_run(api.load(recipe, changes))


def batch_gradients(shop: LoadedRun, aligner: Aligner, step: int, shuffled: bool) -> dict[int, Tensor]:
    """Noise level -> mean gradient of one batch there."""
    rollouts = aligner.collect(shop.prompts.groups(step), step)
    scores = shop.rewards.score(rollouts.samples.batch(rollouts.images_BCHW))
    rewards = {name: one.values_B.view(-1, rollouts.samples.per_group) for name, one in scores.items()}
    if shuffled:
        drawer = torch.Generator().manual_seed(step)
        rewards = {
            name: torch.stack([row[torch.randperm(len(row), generator=drawer)] for row in rows])
            for name, rows in rewards.items()
        }
    loss, method = aligner.method.loss, aligner.method
    weights = shop.rewards.weights(step)
    advantages = loss.advantages(rewards, weights, method.advantage, rollouts.schedule.steps)
    advantage_TB = advantages.advantage_TPS.flatten(1)
    found: dict[int, Tensor] = {}
    for level, part, rows in _terms(aligner, rollouts):
        advantage_B = advantage_TB[level, list(rows)]
        with shop.policy.slot(Slot.CURRENT):
            terms = loss.terms(shop.policy, rollouts, rows, advantage_B, part, with_kl=False)
        gradient = _gradient(aligner, terms.loss_B.sum() / len(rollouts))
        found[level] = found.get(level, torch.zeros_like(gradient)) + gradient
    return found


def _terms(aligner: Aligner, rollouts: Rollouts) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Noise level, part and rows of every term of a batch."""
    loss = aligner.method.loss
    for part in range(loss.parts(rollouts)):
        level_of = loss.steps(rollouts, range(len(rollouts)), part)
        order = sorted(range(len(rollouts)), key=level_of.__getitem__)
        for level, rows in groupby(order, key=level_of.__getitem__):
            own = list(rows)
            yield from ((level, part, own[piece]) for piece in chunks(len(own), aligner.micro_batches.train))


def _gradient(aligner: Aligner, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, aligner.parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(parts, aligner.parameters, strict=True)
        ]
    )


def signal_to_noise(gradients_NP: Tensor) -> float:
    """Squared, of one batch; see above."""
    products_NN = gradients_NP @ gradients_NP.T
    count, total = len(products_NN), products_NN.diagonal().mean()
    signal = (products_NN.sum() - products_NN.diagonal().sum()) / (count * (count - 1))
    return float(signal / (total - signal))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe"
    )
    parser.add_argument("--shuffled", action="store_true", help="the control: scores dealt out at random")
    arguments = parser.parse_args()
    shop = workshop(arguments.recipe, arguments.prompts, arguments.set)
    aligner = shop.aligner(plan_batches(shop)[0])
    batches = [batch_gradients(shop, aligner, step, arguments.shuffled) for step in range(arguments.batches)]
    levels = sorted(batches[0])
    print(f"{arguments.recipe}, {arguments.batches} batches; level, noise, (signal / noise)^2 of a batch")
    sigmas = aligner.collect(shop.prompts.groups(0)[:1], 0).schedule.sigmas
    for level in levels:
        figure = signal_to_noise(torch.stack([batch[level] for batch in batches]))
        print(f"{level:5d}  {sigmas[level]:.2f}  {figure:8.4f}")
    for name, chosen in (("noisiest 4", levels[:4]), ("all", levels), ("least noisy half", levels[5:])):
        sums = torch.stack([torch.stack([batch[level] for level in chosen]).sum(dim=0) for batch in batches])
        print(f"{name}: {signal_to_noise(sums):.4f}")


if __name__ == "__main__":
    main()
