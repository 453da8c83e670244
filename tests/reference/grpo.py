"""Flow-GRPO, its Fast form with CPS, DanceGRPO, MixGRPO and Customized-GRPO (Eqs. 5 to 13) as one plain loop.

They differ in the random step (`flow_sde`, `dance`, `cps`), in which steps are random (`places`), in where a group
begins, and in the advantage. No batches: one sample after the other, one random step after the other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import plain, world
from tests.reference.nft import Sampled, prompt_alone
from tests.reference.plain import AdamW
from tests.reference.world import Scene, Weights

Move = tuple[Tensor, float]
"""Mean and standard deviation of a random step."""


def flow_sde(x: Tensor, v: Tensor, t: float, after: float, eta: float, second: float) -> Move:
    """Flow-GRPO; where t = 1 the schedule's second level stands in."""
    s = eta * math.sqrt(t / (1 - (second if t == 1 else t)))
    dt = after - t
    mean = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    return mean, s * math.sqrt(-dt)


def dance(x: Tensor, v: Tensor, t: float, after: float, eta: float, second: float) -> Move:
    dt = after - t
    x0 = x - t * v
    score = -(x - (1 - t) * x0) / t**2
    return x + dt * v - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)


def cps(x: Tensor, v: Tensor, t: float, after: float, eta: float, second: float) -> Move:
    std = after * math.sin(eta * math.pi / 2)
    x0, x1 = x - t * v, x + (1 - t) * v
    return (1 - after) * x0 + math.sqrt(after**2 - std**2) * x1, std


STEPS: dict[str, tuple[Callable[..., Move], float]] = {
    "flow_sde": (flow_sde, 0.7), "dance": (dance, 0.3), "cps": (cps, 0.8),
}  # fmt: skip
"""Each with its published eta."""


def density(kind: str, next_x: Tensor, move: Move) -> Tensor:
    """The mean over the latents of the log-density; CPS drops the variance and all constants."""
    mean, std = move
    if kind == "cps":
        return -((next_x - mean) ** 2).mean()
    return (-((next_x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()


def places(
    seed: int, step: int, steps: int, where: str, fraction: float = 1.0, window: int = 0, every: int = 1
) -> list[int]:
    """Which sampling steps are random in a training step, drawn once for all samples; never the last one."""
    if where == "fraction":
        count = max(1, round(fraction * (steps - 1)))
        return sorted(torch.randperm(steps - 1, generator=plain.drawer(seed, step, -2, 0))[:count].tolist())
    if where == "random_window":
        first = int(torch.randint(steps // 2 - window + 1, (), generator=plain.drawer(seed, step, -2, 0)))
        return list(range(first, first + window))
    if where == "sliding_window":
        first = step // every % (steps - 1 - window + 1)
        return list(range(first, first + window))
    return list(range(steps - 1))


@dataclass
class Taken:
    """A random step as it was drawn."""

    number: int
    x: Tensor
    next_x: Tensor
    old_log_prob: float


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
    noise: str,
    eta: float | None = None,
    where: Mapping[str, object] | None = None,
    solver: str = "euler",
    clip: float | None = None,
    kl: float = 0.0,
    kl_form: str = "flow_grpo",
    shared_start: bool = False,
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
    random_step, published = STEPS[noise]
    eta = published if eta is None else eta
    log = []
    for step in steps:
        scenes = world.scenes(step, references)
        stochastic = places(seed, step, sampling_steps, **{"where": "all"} | dict(where or {}))
        drawn = {}
        for p, scene in enumerate(scenes):
            for s in range(per_group):
                x = plain.first_noise(seed, scene, s, 1 if shared_start else noises)
                drawn[p, s] = draw(
                    current, scene, s, seed, sampled, s // noises, x, sigmas, stochastic, noise, eta, solver
                )
        scores = {name: world.scores(name, step, per_group).tolist() for name in rewards}
        table = plain.advantages(scores, trained(step), sampling_steps, **advantage)
        counts = plain.counted(table, bool(advantage.get("skip_flat")))
        losses_all, ratios, kls, norms = [], [], [], []
        for number in range(adam.updates):
            losses = []
            for place, (p, s) in enumerate(plain.shared_out(seed, step, number, adam.updates, counts)):
                c0 = plain.anchor(scenes[p])
                for taken in drawn[p, s]:
                    t, after = sigmas[taken.number], sigmas[taken.number + 1]
                    v = plain.velocity(current, taken.x, t, c0)
                    move = random_step(taken.x, v, t, after, eta, sigmas[1])
                    ratio = (density(noise, taken.next_x, move) - taken.old_log_prob).exp()
                    a = table[taken.number][p][s]
                    trusted = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
                    loss = torch.maximum(-a * ratio, -a * trusted)
                    if kl > 0 or (number == 0 and place < kl_rows):
                        with torch.no_grad():
                            v_ref = plain.velocity(None, taken.x, t, c0)
                        mean_ref, std = random_step(taken.x, v_ref, t, after, eta, sigmas[1])
                        # Flow-GRPO's form leaves sqrt(-dt) out of the deviation
                        spread = std / math.sqrt(t - after) if kl_form == "flow_grpo" else std
                        distance = ((move[0] - mean_ref) ** 2).mean() / (2 * spread**2)
                        loss = loss + kl * distance
                        kls.append(distance.item())
                    losses.append(loss)
                    ratios.append(ratio.item())
            if not losses:
                norms.append(0.0)
                continue
            norms.append(adam.descend(step, losses))
            losses_all += [loss.item() for loss in losses]
        if adam.ema is not None:
            ema = plain.blended(ema, current, adam.ema)
        figures = plain.reward_figures(
            scores, trained(step), advantage.get("scale", "group"), advantage.get("eps", 1e-4)
        )
        log.append(
            figures
            | {"advantage_mean": plain.mean_advantage(table), "lr": adam.rate(step), "skipped_updates": 0.0}
            | {"grad_norm": plain.mean(norms), "loss": plain.mean(losses_all)}
            | {"ratio_mean": plain.mean(ratios), "ratio_std": plain.deviation(ratios)}
            | {"ratio_min": min(ratios), "ratio_max": max(ratios)}
            | ({"kl": plain.mean(kls)} if kls else {})
            | ({} if clip is None else {"clip_share": plain.mean([float(abs(r - 1) > clip) for r in ratios])})
        )
    return {"current": current, "old": old, "ema": ema}, log


@torch.no_grad()
def draw(
    weights: Weights, scene: Scene, place: int, seed: int, sampled: Sampled, variant: int, x: Tensor,
    sigmas: list[float], stochastic: list[int], kind: str, eta: float, solver: str,
) -> list[Taken]:  # fmt: skip
    """A sample's random steps. It is drawn under its variant's condition, and its densities are those under c_0.

    Every other step is one of the ODE; DPM-Solver++ forgets what came before a random step.
    """
    random_step, _ = STEPS[kind]
    c0, found, before = plain.anchor(scene), [], None
    for i, t in enumerate(sigmas[:-1]):
        after = sigmas[i + 1]
        v = plain.velocity(weights, x, t, sampled(scene, variant, t))
        if i in stochastic:
            mean, std = random_step(x, v, t, after, eta, sigmas[1])
            next_x = mean + std * plain.later_noise(seed, scene, place, 1, i)
            under_c0 = random_step(x, plain.velocity(weights, x, t, c0), t, after, eta, sigmas[1])
            found.append(Taken(i, x, next_x, density(kind, next_x, under_c0).item()))
            x, before = next_x, None
        elif solver == "euler":
            x = x + (after - t) * v
        else:
            x, before = dpm(x, v, sigmas, i, before)
    return found


def dpm(x: Tensor, v: Tensor, sigmas: list[float], i: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """DPM-Solver++ 2M in the half log-SNR, written for finite levels and the two ends apart."""
    t, after = sigmas[i], sigmas[i + 1]
    x0 = x - t * v
    data = x0
    if before is not None and after > 0 and sigmas[i - 1] < 1:
        here, there, last = (math.log((1 - u) / u) for u in (t, after, sigmas[i - 1]))
        data = x0 + (there - here) / (here - last) / 2 * (x0 - before)
    return after * (x - data) / t + (1 - after) * data + after * data, x0
