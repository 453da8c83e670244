"""DiffusionNFT (E2PO section 3.2, Eqs. 3 to 7), and E2PO on top of it (Eqs. 8 and 13), as one plain loop.

No batches: one sample after the other, one noise level after the other, all losses of an optimizer step averaged.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.reference import plain, world
from tests.reference.plain import AdamW, Condition
from tests.reference.world import Scene, Weights

Sampled = Callable[[Scene, int, float], Condition]
"""A prompt, a variant's number and the flow's time: the condition that samples are drawn under."""


def prompt_alone(scene: Scene, variant: int, t: float) -> Condition:
    """Noise alone explores: every variant is the prompt."""
    return plain.anchor(scene)


def train(
    *,
    seed: int,
    steps: Sequence[int],
    noises: int,
    optimizer: Mapping[str, object],
    advantage: Mapping[str, object],
    trained: Callable[[int], Mapping[str, float]],
    rewards: Sequence[str],
    sampling_steps: int,
    timesteps: int,
    solver: str = "euler",
    beta: float = 1.0,
    kl: float = 1e-4,
    levels: tuple[int, int] | None = None,
    certain: float = 5.0,
    old_decay: Callable[[int], float] = lambda step: min(0.001 * step, 0.5),
    variants: int = 1,
    sampled: Sampled = prompt_alone,
    references: int = 0,
    kl_rows: int = 0,
) -> tuple[dict[str, Weights], list[dict[str, float]]]:
    """The slots after the training steps, and each step's figures.

    `kl_rows`: without a KL weight the log still says how far the reference is, by that many rows.
    """
    current = {name: x.requires_grad_() for name, x in world.added("current").items()}
    old, ema = world.added("old"), world.added("ema")
    adam = AdamW(current, **optimizer)
    sigmas, per_group = world.noise_levels(sampling_steps), noises * variants
    log = []
    for step in steps:
        scenes = world.scenes(step, references)
        drawn = {
            (p, s): draw(
                old, scene, sampled, s // noises, plain.first_noise(seed, scene, s, noises), sigmas, solver
            )
            for p, scene in enumerate(scenes)
            for s in range(per_group)
        }
        scores = {name: world.scores(name, step, per_group).tolist() for name in rewards}
        table = plain.advantages(scores, trained(step), sampling_steps, **advantage)
        counts = plain.counted(table, bool(advantage.get("skip_flat")))
        losses_all, distances, kls, norms = [], [], [], []
        for number in range(adam.updates):
            losses = []
            for place, (p, s) in enumerate(plain.shared_out(seed, step, number, adam.updates, counts)):
                scene, x0, c0 = scenes[p], drawn[p, s], plain.anchor(scenes[p])
                order = plain.shuffled_levels(seed, scene, s, *(levels or (0, sampling_steps)))
                for part in range(timesteps):
                    level = order[part]
                    t = sigmas[level]
                    eps = plain.later_noise(seed, scene, s, 2, part)
                    x_t = (1 - t) * x0 + t * eps
                    v = plain.velocity(current, x_t, t, c0)
                    v_old = plain.velocity(old, x_t, t, c0)
                    v_ref = plain.velocity(None, x_t, t, c0)
                    r = 0.5 + 0.5 * min(1.0, max(-1.0, table[level][p][s] / certain))
                    good = x_t - t * ((1 - beta) * v_old + beta * v)
                    bad = x_t - t * ((1 + beta) * v_old - beta * v)
                    loss = 5 / beta * (r * self_weighted(good, x0) + (1 - r) * self_weighted(bad, x0))
                    distance = ((v - v_ref) ** 2).mean()
                    losses.append(loss + kl * distance)
                    if kl > 0 or (number == 0 and place < kl_rows):
                        kls.append(distance.item())
                    distances.append(((v - v_old) ** 2).mean().item())
            if not losses:
                norms.append(0.0)
                continue
            norms.append(adam.descend(step, losses))
            losses_all += [loss.item() for loss in losses]
        d = old_decay(step)
        old = plain.blended(old, current, d)
        if adam.ema is not None:
            ema = plain.blended(ema, current, adam.ema)
        figures = plain.reward_figures(
            scores, trained(step), advantage.get("scale", "group"), advantage.get("eps", 1e-4)
        )
        log.append(
            figures
            | {"advantage_mean": plain.mean_advantage(table), "lr": adam.rate(step), "skipped_updates": 0.0}
            | {"grad_norm": plain.mean(norms), "loss": plain.mean(losses_all)}
            | {"kl": plain.mean(kls), "old_distance": plain.mean(distances)}
        )
    return {"current": current, "old": old, "ema": ema}, log


@torch.no_grad()
def draw(
    weights: Weights,
    scene: Scene,
    sampled: Sampled,
    variant: int,
    x: Tensor,
    sigmas: list[float],
    solver: str,
) -> Tensor:
    """A sample of the old policy: the flow's ODE from noise to data."""
    before = None
    for i, t in enumerate(sigmas[:-1]):
        after = sigmas[i + 1]
        v = plain.velocity(weights, x, t, sampled(scene, variant, t))
        if solver == "euler":
            x = x + (after - t) * v
            continue
        # DPM-Solver++ 2M (Lu et al. 2022), alpha = 1 - t, sigma = t, of second order where both half steps are finite
        x0 = x - t * v
        data = x0
        if before is not None and after > 0:
            h, h_before = log_snr(after) - log_snr(t), log_snr(t) - log_snr(sigmas[i - 1])
            ratio = h_before / h
            data = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * before
        decayed = math.exp(log_snr(t) - log_snr(after))
        x = after / t * x + (1 - after) * (1 - decayed) * data
        before = x0
    return x


def log_snr(t: float) -> float:
    """lambda = log(alpha / sigma)."""
    if t == 0:
        return math.inf
    return math.log((1 - t) / t) if t < 1 else -math.inf


def self_weighted(predicted: Tensor, x0: Tensor) -> Tensor:
    """The squared error over its own mean magnitude, which carries no gradient."""
    weight = (predicted - x0).abs().mean().clamp_min(1e-5).detach()
    return ((predicted - x0) ** 2).mean() / weight
