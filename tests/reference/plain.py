"""What the plain loops have in common: which random numbers belong to whom, advantages, AdamW. torch and math alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations

import torch
from torch import Tensor

from tests.reference import world
from tests.reference.world import Scene, Weights

NAN = math.nan
Row = tuple[int, int]
"""A sample: the place of its prompt in the step, and its own in the group."""
Table = list[list[float]]
"""One number a sample, [P][S]."""

# -- random numbers: a function of what they are for, whoever draws them ---------------------------------------


def key(*parts: int) -> int:
    """63 bits from four numbers."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1


def drawer(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(key(*parts))


def first_noise(seed: int, scene: Scene, place: int, starts: int) -> Tensor:
    """The noise that a sample begins at: that of its place among the group's `starts` noises."""
    return world.latent_noise(key(seed, scene.epoch, scene.index, place % starts))


def later_noise(seed: int, scene: Scene, place: int, use: int, number: int) -> Tensor:
    """A sample's own further noises. use 1: of a random sampling step; use 2: of a trained noise level."""
    stream = key(seed, scene.epoch, scene.index, place)
    return world.latent_noise(key(stream, use, number, 0))


def shuffled_levels(seed: int, scene: Scene, place: int, first: int, end: int) -> list[int]:
    """Steps first .. end - 1 in an order of the sample's own."""
    stream = key(seed, scene.epoch, scene.index, place)
    return [first + int(one) for one in torch.randperm(end - first, generator=drawer(stream, 3, 0, 0))]


def shared_out(seed: int, step: int, number: int, updates: int, counts: list[list[bool]]) -> list[Row]:
    """The samples of one of a step's optimizer steps: dealt out over all prompts, those that do not count left out."""
    per_group = len(counts[0])
    lots = torch.randperm(len(counts) * per_group, generator=drawer(seed, step, -3, 0)).tolist()
    rows = [(p, s) for p in range(len(counts)) for s in range(per_group)]
    return [
        row for row, lot in zip(rows, lots, strict=True) if lot % updates == number and counts[row[0]][row[1]]
    ]


# -- the model --------------------------------------------------------------------------------------------------

Condition = tuple[Tensor, Tensor, tuple[Tensor, ...]]
"""Tokens [L, D], pooled [E] and reference latents [C, h, w] of one sample."""


def anchor(scene: Scene, references: bool = True) -> Condition:
    """c_0: the prompt itself, with what the model is shown."""
    tokens, pooled = world.text(scene.prompt)
    shown = [white_square(image, 2 * world.SIDE) for image in scene.shown] if references else []
    return tokens, pooled, tuple(world.encoded(image[None])[0] for image in shown)


def white_square(image: Tensor, side: int) -> Tensor:
    """A picture [3, H, W] in the middle of a white square; the longer side fits it already."""
    square = torch.ones(3, side, side, dtype=torch.float64)
    top, left = (side - image.shape[1]) // 2, (side - image.shape[2]) // 2
    square[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return square


def velocity(extra: Weights | None, x: Tensor, t: float, condition: Condition) -> Tensor:
    """The model for one sample, [C, h, w]."""
    tokens, pooled, references = condition
    time = torch.tensor([t], dtype=torch.float64)
    shown = [one[None] for one in references]
    return world.velocity(extra, x[None], time, tokens[None], pooled[None], shown)[0]


# -- advantages -------------------------------------------------------------------------------------------------


def failed_samples(rewards: Mapping[str, Table], trained: Mapping[str, float]) -> list[list[bool]]:
    """A sample that one trained reward could not score counts for none of them."""
    tables = [rewards[name] for name in trained]
    return [
        [any(math.isnan(table[p][s]) for table in tables) for s in range(len(tables[0][0]))]
        for p in range(len(tables[0]))
    ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else NAN


def deviation(values: Sequence[float]) -> float:
    """Population standard deviation."""
    middle = mean(values)
    return math.sqrt(mean([(value - middle) ** 2 for value in values])) if values else NAN


def normalized(table: Table, failed: list[list[bool]], scale: str, eps: float) -> Table:
    """A reward minus its group's mean, over the group's or the whole step's deviation + eps; 0 where it failed."""
    known = [[x for x, bad in zip(*rows, strict=True) if not bad] for rows in zip(table, failed, strict=True)]
    everywhere = deviation([x for row in known for x in row])
    found = []
    for row, bad, own in zip(table, failed, known, strict=True):
        flat = not own or max(own) == min(own)
        middle = mean(own)
        divisor = {"group": deviation(own) + eps, "global": everywhere + eps, "none": 1.0}[scale]
        found.append(
            [0.0 if lost or flat else (x - middle) / divisor for x, lost in zip(row, bad, strict=True)]
        )
    return found


def synergy(a: float, b: float, kind: str) -> float:
    """Customized-GRPO Eq. 10, and the rivals of its Table 3."""
    if kind == "harmonic":
        # the pole at a = -b is guarded: |a + b| counts for a tenth of |a| + |b| at least
        below = math.copysign(max(abs(a + b), 0.1 * (abs(a) + abs(b))), a + b)
        return 2 * a * b / below if below else 0.0
    return {"tanh": math.tanh(a * b), "min": min(a, b), "max": max(a, b)}[kind]


def prompt_share(
    step: int,
    steps: int,
    w_max=0.7,
    w_min=0.3,
    start=6.0,
    end=22.0,
    steepness=0.8,
    center=14.0,
    inverted=False,
) -> float:
    """Customized-GRPO Eq. 12 at a true step, 0 the noisiest; its numbers are given for 25 steps."""
    stretch = steps / 25
    first, last = (w_min, w_max) if inverted else (w_max, w_min)
    if step < start * stretch:
        return first
    if step >= end * stretch:
        return last
    gone = 1 / (1 + math.exp(-steepness / stretch * (step - center * stretch)))
    return last + (first - last) * (1 - gone)


def advantages(
    rewards: Mapping[str, Table],
    trained: Mapping[str, float],
    steps: int,
    *,
    scale: str = "group",
    clamp: float | None = 5.0,
    eps: float = 1e-4,
    skip_flat: bool = False,
    synergy_of: Mapping[str, object] | None = None,
    time: Mapping[str, object] | None = None,
) -> list[Table]:
    """[T][P][S]: every reward normalized, then weighted and added; nan where a sample failed. Eqs. 8, 10 to 12."""
    failed = failed_samples(rewards, trained)
    parts = {name: normalized(rewards[name], failed, scale, eps) for name in trained}
    shape = {"kind": "tanh", "alpha": 0.5, "recenter": False} | dict(synergy_of or {})
    found = []
    for step in range(steps):
        weights = weights_at(step, steps, trained, time)
        table = []
        for p, bad in enumerate(failed):
            row = []
            for s in range(len(bad)):
                total = sum(weights[name] * parts[name][p][s] for name in trained)
                if synergy_of is not None:
                    terms = []
                    for one, other in combinations(trained, 2):
                        a, b = parts[one][p][s], parts[other][p][s]
                        sign = 1 if a > 0 or b > 0 else -1
                        terms.append(sign * synergy(a, b, shape["kind"]))
                    total += shape["alpha"] * mean(terms)
                row.append(total)
            if shape["recenter"]:
                middle = mean([x for x, lost in zip(row, bad, strict=True) if not lost])
                row = [x - middle for x in row]
            if clamp is not None:
                row = [min(clamp, max(-clamp, x)) for x in row]
            table.append([NAN if lost else x for x, lost in zip(row, bad, strict=True)])
        found.append(table)
    return found


def weights_at(
    step: int, steps: int, trained: Mapping[str, float], time: Mapping[str, object] | None
) -> dict[str, float]:
    """What each reward counts at a step; with TDW its share among those of its role, times the role's."""
    if time is None:
        return dict(trained)
    options = dict(time)
    identity = options.pop("identity")
    prompt = prompt_share(step, steps, **options)
    whole = {
        role: sum(w for name, w in trained.items() if (name in identity) is role) for role in (True, False)
    }
    return {
        name: w / whole[name in identity] * (1 - prompt if name in identity else prompt)
        for name, w in trained.items()
    }


def counted(table: list[Table], skip_flat: bool) -> list[list[bool]]:
    """Which samples are learned from: all but those that failed, and with `skip_flat` groups with nothing to teach."""
    found = []
    for p in range(len(table[0])):
        known = [not math.isnan(x) for x in table[0][p]]
        taught = any(x != 0 and not math.isnan(x) for step in table for x in step[p])
        found.append(known if taught or not skip_flat else [False] * len(known))
    return found


# -- the optimizer ----------------------------------------------------------------------------------------------


@dataclass
class AdamW:
    """Loshchilov & Hutter's, on the slot `current`, with what the product's recipes say of it."""

    weights: Weights
    lr: float = 3e-4
    warmup: int = 0
    decay_steps: int | None = None
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = 1.0
    updates: int = 1
    ema: float | None = 0.9
    taken: int = 0
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """The learning rate of a training step."""
        left = 1.0 if self.decay_steps is None else max(0.0, 1 - step / self.decay_steps)
        return self.lr * min(1.0, (step + 1) / (self.warmup + 1)) * left

    def descend(self, step: int, losses: list[Tensor]) -> float:
        """One step down the mean of the losses; the gradient's norm before the clip."""
        names = list(self.weights)
        gradients = torch.autograd.grad(sum(losses) / len(losses), [self.weights[name] for name in names])
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
        shrink = min(1.0, self.grad_clip / (norm + 1e-6))
        self.taken += 1
        lr, (keep, keep2) = self.rate(step), self.betas
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                g = shrink * gradient
                self.first[name] = keep * self.first.get(name, 0) + (1 - keep) * g
                self.second[name] = keep2 * self.second.get(name, 0) + (1 - keep2) * g**2
                m = self.first[name] / (1 - keep**self.taken)
                v = self.second[name] / (1 - keep2**self.taken)
                w = self.weights[name] * (1 - lr * self.weight_decay) - lr * m / (v.sqrt() + self.eps)
                self.weights[name] = w.requires_grad_()
        return norm


def blended(kept: Weights, taken: Weights, decay: float) -> Weights:
    """decay kept + (1 - decay) taken."""
    return {name: decay * kept[name] + (1 - decay) * taken[name].detach() for name in kept}


# -- the log ----------------------------------------------------------------------------------------------------


def reward_figures(
    rewards: Mapping[str, Table], trained: Mapping[str, float], scale: str, eps: float
) -> dict[str, float]:
    """What the log says of a step's rewards."""
    found = {}
    for name, table in rewards.items():
        known = [x for row in table for x in row if not math.isnan(x)]
        found |= {f"reward/{name}/mean": mean(known), f"reward/{name}/std": deviation(known)}
    failed = failed_samples(rewards, trained)
    spreads = []
    for p, bad in enumerate(failed):
        total = [
            sum(w * rewards[name][p][s] for name, w in trained.items()) for s in range(len(bad)) if not bad[s]
        ]
        spreads += [deviation(total)] if total else []
    lost = [x for row in failed for x in row]
    found |= {"group_std": mean(spreads), "zero_std_share": mean([float(x <= 1e-6) for x in spreads])}
    found |= {"failed_share": mean([float(x) for x in lost])}
    return found | conflict_figures(rewards, trained, failed, scale, eps)


def conflict_figures(
    rewards: Mapping[str, Table],
    trained: Mapping[str, float],
    failed: list[list[bool]],
    scale: str,
    eps: float,
) -> dict[str, float]:
    """How often two rewards' advantages have opposite signs (0 has none), and their correlation; means over pairs."""
    shares, correlations = [], []
    for pair in combinations(trained, 2):
        one, other = (
            [x for row, bad in zip(normalized(rewards[name], failed, scale, eps), failed, strict=True)
             for x, lost in zip(row, bad, strict=True) if not lost]
            for name in pair
        )  # fmt: skip
        shares.append(mean([float(a * b < 0) for a, b in zip(one, other, strict=True)]))
        product = sum(a * b for a, b in zip(one, other, strict=True))
        size = math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
        correlations.append(product / size if size > 0 else NAN)
    return {"conflict_share": mean(shares), "reward_correlation": mean(correlations)} if shares else {}


def mean_advantage(table: list[Table]) -> float:
    return mean([x for step in table for row in step for x in row if not math.isnan(x)])
