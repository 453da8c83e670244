"""SFT, DPO, RPO and DRaFT as plain loops: one sample after the other, all losses of an optimizer step averaged."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.reference import nft, plain, world
from tests.reference.plain import AdamW
from tests.reference.world import Weights

Found = tuple[dict[str, Weights], list[dict[str, float]]]
"""The slots after the training steps, and each step's figures."""


def sft(
    *, seed: int, steps: Sequence[int], noises: int, optimizer: Mapping[str, object], timesteps: int,
    sampling_steps: int, references: int, rewards: Sequence[str], trained: Mapping[str, float], kl_rows: int,
) -> Found:  # fmt: skip
    """Flow matching on the target pictures; no score is learned from."""
    current = {name: x.requires_grad_() for name, x in world.added("current").items()}
    old, ema = world.added("old"), world.added("ema")
    adam, sigmas, log = AdamW(current, **optimizer), world.noise_levels(sampling_steps), []
    for step in steps:
        scenes = world.scenes(step, references)
        everyone = [[True] * noises for _ in scenes]
        losses_all, kls, norms = [], [], []
        for number in range(adam.updates):
            losses = []
            for place, (p, s) in enumerate(plain.shared_out(seed, step, number, adam.updates, everyone)):
                scene, c0 = scenes[p], plain.anchor(scenes[p])
                x0 = world.encoded(plain.white_square(scene.target, 2 * world.SIDE)[None])[0]
                order = plain.shuffled_levels(seed, scene, s, 0, sampling_steps)
                for part in range(timesteps):
                    t, eps = sigmas[order[part]], plain.later_noise(seed, scene, s, 2, part)
                    x_t = (1 - t) * x0 + t * eps
                    v = plain.velocity(current, x_t, t, c0)
                    losses.append(((v - (eps - x0)) ** 2).mean())
                    if number == 0 and place < kl_rows:
                        kls.append(((v - plain.velocity(None, x_t, t, c0)) ** 2).mean().item())
            norms.append(adam.descend(step, losses))
            losses_all += [loss.item() for loss in losses]
        if adam.ema is not None:
            ema = plain.blended(ema, current, adam.ema)
        scores = {name: world.scores(name, step, noises).tolist() for name in rewards}
        log.append(
            plain.reward_figures(scores, trained, "group", 1e-4)
            | {"lr": adam.rate(step), "skipped_updates": 0.0, "grad_norm": plain.mean(norms)}
            | {"loss": plain.mean(losses_all), "kl": plain.mean(kls)}
        )
    return {"current": current, "old": old, "ema": ema}, log


def dpo(
    *, seed: int, steps: Sequence[int], noises: int, optimizer: Mapping[str, object], timesteps: int,
    sampling_steps: int, rewards: Sequence[str], trained: Mapping[str, float], beta: float, kl_rows: int,
) -> Found:  # fmt: skip
    """Diffusion-DPO on given pairs: every other place of a group is its winner, with noises of that place's own."""
    current = {name: x.requires_grad_() for name, x in world.added("current").items()}
    old, ema = world.added("old"), world.added("ema")
    adam, sigmas, log = AdamW(current, **optimizer), world.noise_levels(sampling_steps), []
    for step in steps:
        scenes = world.scenes(step)
        wins = [[s % 2 == 0 for s in range(noises)] for _ in scenes]
        losses_all, accuracies, kls, norms = [], [], [], []
        for number in range(adam.updates):
            losses = []
            for place, (p, s) in enumerate(plain.shared_out(seed, step, number, adam.updates, wins)):
                scene, c0 = scenes[p], plain.anchor(scenes[p])
                order = plain.shuffled_levels(seed, scene, s, 0, sampling_steps)
                for part in range(timesteps):
                    t, eps = sigmas[order[part]], plain.later_noise(seed, scene, s, 2, part)
                    gains = []
                    for image in scene.pair:
                        x0 = world.encoded(plain.white_square(image, 2 * world.SIDE)[None])[0]
                        x_t = (1 - t) * x0 + t * eps
                        v, v_ref = plain.velocity(current, x_t, t, c0), plain.velocity(None, x_t, t, c0)
                        better = ((v_ref - (eps - x0)) ** 2).mean() - ((v - (eps - x0)) ** 2).mean()
                        gains.append(better)
                        if len(gains) == 1 and number == 0 and place < kl_rows:
                            kls.append(((v - v_ref) ** 2).mean().item())
                    margin = beta * (gains[0] - gains[1]) / 2
                    losses.append(torch.log1p(torch.exp(-margin)))
                    accuracies.append(float(gains[0] > gains[1]))
            norms.append(adam.descend(step, losses))
            losses_all += [loss.item() for loss in losses]
        if adam.ema is not None:
            ema = plain.blended(ema, current, adam.ema)
        scores = {name: world.scores(name, step, noises).tolist() for name in rewards}
        log.append(
            plain.reward_figures(scores, trained, "group", 1e-4)
            | {"lr": adam.rate(step), "skipped_updates": 0.0, "grad_norm": plain.mean(norms)}
            | {"loss": plain.mean(losses_all), "kl": plain.mean(kls), "pair_accuracy": plain.mean(accuracies)}
        )
    return {"current": current, "old": old, "ema": ema}, log


def rpo(
    *, seed: int, steps: Sequence[int], noises: int, optimizer: Mapping[str, object], timesteps: int,
    sampling_steps: int, solver: str, references: int, rewards: Sequence[str], trained: Mapping[str, float],
    scale: str, beta: float, similarity: float, shown: bool, kl_rows: int,
) -> Found:  # fmt: skip
    """Pairs of the frozen base by the harmonic mean of rewards; DPO on them, and flow matching on the reference."""
    current = {name: x.requires_grad_() for name, x in world.added("current").items()}
    old, ema = world.added("old"), world.added("ema")
    adam, sigmas, log = AdamW(current, **optimizer), world.noise_levels(sampling_steps), []
    for step in steps:
        scenes = world.scenes(step, references)
        drawn = {
            (p, s): nft.draw(
                None, scene, lambda scene, variant, t: plain.anchor(scene, references=shown), 0,
                plain.first_noise(seed, scene, s, noises), sigmas, solver,
            )
            for p, scene in enumerate(scenes)
            for s in range(noises)
        }  # fmt: skip
        scores = {name: world.scores(name, step, noises).tolist() for name in rewards}
        pairs = [best_and_worst(scores, trained, p, scale) for p in range(len(scenes))]
        wins = [[pair is not None and s == pair[0] for s in range(noises)] for pair in pairs]
        losses_all, accuracies, similarities, kls, norms = [], [], [], [], []
        for number in range(adam.updates):
            losses = []
            for place, (p, s) in enumerate(plain.shared_out(seed, step, number, adam.updates, wins)):
                scene, c0 = scenes[p], plain.anchor(scenes[p])
                won, lost = drawn[p, s], drawn[p, pairs[p][1]]
                order = plain.shuffled_levels(seed, scene, s, 0, sampling_steps)
                for part in range(timesteps):
                    t, eps = sigmas[order[part]], plain.later_noise(seed, scene, s, 2, part)
                    margin = 0.0
                    for sign, x0 in ((1, won), (-1, lost)):
                        x_t = (1 - t) * x0 + t * eps
                        v, v_ref = plain.velocity(current, x_t, t, c0), plain.velocity(None, x_t, t, c0)
                        gain = ((v - (eps - x0)) ** 2).mean() - ((v_ref - (eps - x0)) ** 2).mean()
                        margin = margin - beta / 2 * sign * gain
                        if sign == 1 and number == 0 and place < kl_rows:
                            kls.append(((v - v_ref) ** 2).mean().item())
                    loss = -logsigmoid(margin)
                    accuracies.append(float(margin > 0))
                    if similarity > 0:
                        article = "an" if scene.word[0] in "aeiou" else "a"
                        tokens, pooled = world.text(f"a photo of {article} {scene.word}")
                        first = c0[2][0]
                        x_t = (1 - t) * first + t * eps
                        v = plain.velocity(current, x_t, t, (tokens, pooled, c0[2]))
                        likeness = ((v - (eps - first)) ** 2).mean()
                        loss = loss + similarity * likeness
                        similarities.append(likeness.item())
                    losses.append(loss)
            if not losses:
                norms.append(0.0)
                continue
            norms.append(adam.descend(step, losses))
            losses_all += [loss.item() for loss in losses]
        if adam.ema is not None:
            ema = plain.blended(ema, current, adam.ema)
        log.append(
            plain.reward_figures(scores, trained, scale, 1e-4)
            | {"lr": adam.rate(step), "skipped_updates": 0.0, "grad_norm": plain.mean(norms)}
            | {"loss": plain.mean(losses_all), "pair_accuracy": plain.mean(accuracies)}
            | {"pair_share": plain.mean([float(pair is not None) for pair in pairs])}
            | ({"kl": plain.mean(kls)} if kls else {})
            | ({"similarity_loss": plain.mean(similarities)} if similarities else {})
        )
    return {"current": current, "old": old, "ema": ema}, log


def best_and_worst(
    scores: Mapping[str, plain.Table], trained: Mapping[str, float], p: int, scale: str
) -> tuple[int, int] | None:
    """Places of a group's winner and loser by sum w / sum (w / s), s = sigmoid(advantage); None where all are alike."""
    failed = plain.failed_samples(scores, trained)
    parts = {name: plain.normalized(scores[name], failed, scale, 1e-4) for name in trained}
    means = {}
    for s, bad in enumerate(failed[p]):
        if not bad:
            below = sum(w * (1 + math.exp(-parts[name][p][s])) for name, w in trained.items())
            means[s] = sum(trained.values()) / below
    best, worst = max(means, key=means.get), min(means, key=means.get)
    return (best, worst) if means[best] - means[worst] > 1e-6 else None


Reward = Callable[[Tensor, str], Tensor]
"""A picture [3, H, W] and its prompt to a score; nan where there is none."""


def draft(
    *, seed: int, steps: Sequence[int], noises: int, optimizer: Mapping[str, object], sampling_steps: int,
    last: int, kl: float, functions: Mapping[str, Reward], rewards: Sequence[str],
    trained: Callable[[int], Mapping[str, float]], kl_rows: int,
) -> Found:  # fmt: skip
    """The gradient of the rewards through the last K sampling steps, whose start stays as it was drawn."""
    current = {name: x.requires_grad_() for name, x in world.added("current").items()}
    old, ema = world.added("old"), world.added("ema")
    adam, sigmas, log = AdamW(current, **optimizer), world.noise_levels(sampling_steps), []
    for step in steps:
        scenes, start = world.scenes(step), sampling_steps - last
        begun = {}
        with torch.no_grad():
            for p, scene in enumerate(scenes):
                for s in range(noises):
                    x = plain.first_noise(seed, scene, s, noises)
                    for i in range(start):
                        v = plain.velocity(current, x, sigmas[i], plain.anchor(scene))
                        x = x + (sigmas[i + 1] - sigmas[i]) * v
                    begun[p, s] = x
        scores = {name: world.scores(name, step, noises).tolist() for name in rewards}
        failed = plain.failed_samples(scores, trained(step))
        counts = [[not bad for bad in row] for row in failed]
        losses_all, kls, norms = [], [], []
        for number in range(adam.updates):
            losses = []
            for place, (p, s) in enumerate(plain.shared_out(seed, step, number, adam.updates, counts)):
                x, c0, distances = begun[p, s], plain.anchor(scenes[p]), []
                for i in range(start, sampling_steps):
                    v = plain.velocity(current, x, sigmas[i], c0)
                    v_ref = plain.velocity(None, x.detach(), sigmas[i], c0)
                    distances.append(((v - v_ref) ** 2).mean())
                    x = x + (sigmas[i + 1] - sigmas[i]) * v
                image = world.decoded(x[None])[0]
                score = sum(w * functions[name](image, scenes[p].prompt) for name, w in trained(step).items())
                loss = -score if bool(score.isfinite()) else 0 * x.sum()
                distance = sum(distances) / len(distances)
                losses.append(loss + kl * distance)
                if kl > 0 or (number == 0 and place < kl_rows):
                    kls.append(distance.item())
            norms.append(adam.descend(step, losses))
            losses_all += [loss.item() for loss in losses]
        if adam.ema is not None:
            ema = plain.blended(ema, current, adam.ema)
        log.append(
            plain.reward_figures(scores, trained(step), "group", 1e-4)
            | {"lr": adam.rate(step), "skipped_updates": 0.0, "grad_norm": plain.mean(norms)}
            | {"loss": plain.mean(losses_all), "kl": plain.mean(kls)}
        )
    return {"current": current, "old": old, "ema": ema}, log
