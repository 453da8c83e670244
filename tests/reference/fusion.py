"""RMLer (Eqs. 2 to 5), and PPO and GRPO on the same policies, as plain loops on a synthetic reward.

The fused embedding is the state; a Gaussian over actions proposes the next mixing coefficients; the clipped surrogate
improves it. One action after the other, one state after the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.reference import plain, world
from tests.reference.world import Weights


def similarities(step: int, coefficients_ND: Tensor) -> list[float]:
    """How much of each concept the synthetic judge sees in a picture of these coefficients, each in (0, 1)."""
    concepts, columns = coefficients_ND.shape
    taste = world.normal(f"taste {step}", concepts, columns, scale=1.5)
    return [(taste[n] * coefficients_ND[n]).mean().sigmoid().item() for n in range(concepts)]


def noises_of(step: int, count: int) -> list[int]:
    """Which noise each picture is drawn from: in odd steps some share one."""
    return [place // 3 if step % 2 and place < 6 else 100 + place for place in range(count)]


def failed(step: int, place: int) -> bool:
    return place == step + 2


def xavier(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A layer's weights as they are drawn."""
    most = math.sqrt(6 / (rows + columns))
    return torch.empty(rows, columns, dtype=torch.float64).uniform_(-most, most, generator=generator)


def zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64)


class Compact:
    """u has a balance and one offset a group of columns, for each logit; its Gaussian comes from a small network."""

    def __init__(
        self, features_ND: Tensor, seed: int, groups: int, hidden: int, std: float, balance_std: float
    ) -> None:
        concepts, columns = features_ND.shape
        generator = plain.drawer(seed, -2, 0, 0)
        self.logits = 1 if concepts == 2 else concepts
        groups = min(groups, columns)
        self.size = self.logits * (1 + groups)
        self.group_D = (torch.randperm(columns, generator=generator) % groups).tolist()
        self.middle = features_ND.mean(dim=0)
        self.spread = ((features_ND - self.middle) ** 2).mean().sqrt()
        scale = 1.0 if concepts == 2 else 1 / math.sqrt(2)
        stds = [math.log(balance_std * scale), *[math.log(std * scale)] * groups] * self.logits
        self.weights: Weights = {
            "trunk.weight": xavier(hidden, columns, generator),
            "trunk.bias": zeros(hidden),
            "head.weight": torch.zeros(2 * self.size, hidden, dtype=torch.float64),
            "head.bias": torch.cat([zeros(self.size), torch.tensor(stds, dtype=torch.float64)]),
        }
        # a step moves the mean by about the learning rate, at any width
        slower = {"trunk": columns, "head": hidden}
        self.shares = {"head.bias": 1.0, "head.weight": 1 / hidden}
        self.shares |= dict.fromkeys(("trunk.weight", "trunk.bias"), 1 / slower["trunk"])

    def gaussian(self, weights: Weights, state: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the deviation, [X] each."""
        hidden = torch.tanh(
            weights["trunk.weight"] @ ((state - self.middle) / self.spread) + weights["trunk.bias"]
        )
        both = weights["head.weight"] @ hidden + weights["head.bias"]
        return both[: self.size], both[self.size :]

    def coefficients(self, action: Tensor) -> Tensor:
        """[N, D]; every column on the simplex."""
        numbers = action.view(self.logits, -1)
        logits = torch.stack([numbers[:, 0] + numbers[:, 1 + group] for group in self.group_D], dim=1)
        if self.logits == 1:
            share = 1 / (1 + torch.exp(-logits[0]))
            return torch.stack([share, 1 - share])
        return torch.exp(logits) / torch.exp(logits).sum(dim=0)


class Conditional:
    """One network for every concept, which sees it, what all have in common, how they are mixed and what is missing."""

    def __init__(
        self, features_ND: Tensor, seed: int, groups: int, hidden: int, std: float, balance_std: float
    ) -> None:
        self.concepts, columns = features_ND.shape
        generator = plain.drawer(seed, -2, 0, 0)
        self.groups = min(groups, columns)
        self.group_D = torch.randperm(columns, generator=generator) % self.groups
        self.size = self.concepts * (1 + self.groups)
        self.middle = features_ND.mean(dim=0)
        self.spread = ((features_ND - self.middle) ** 2).mean().sqrt()
        self.own = [(one - self.middle) / self.spread for one in features_ND]
        self.common = self.middle / (self.middle**2).mean().sqrt()
        inputs = 3 * columns + 1
        stds = [balance_std / math.sqrt(2), *[std / math.sqrt(2)] * self.groups]
        self.weights: Weights = {
            "trunk.weight": xavier(hidden, inputs, generator), "trunk.bias": zeros(hidden),
            "head.weight": torch.zeros(2 * (1 + self.groups), hidden, dtype=torch.float64),
            "head.bias": torch.cat([zeros(1 + self.groups), torch.log(torch.tensor(stds, dtype=torch.float64))]),
        }  # fmt: skip
        self.shares = {"head.bias": 1.0, "head.weight": 1 / hidden}
        self.shares |= dict.fromkeys(("trunk.weight", "trunk.bias"), 1 / inputs)

    def gaussian(self, weights: Weights, state: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        means, log_stds = [], []
        for n in range(self.concepts):
            missing = (seen.mean() - seen[n]) / 0.22925
            given = torch.cat([self.own[n], self.common, (state - self.middle) / self.spread, missing[None]])
            hidden = torch.tanh(weights["trunk.weight"] @ given + weights["trunk.bias"])
            both = weights["head.weight"] @ hidden + weights["head.bias"]
            means.append(both[: 1 + self.groups])
            log_stds.append(both[1 + self.groups :])
        return torch.cat(means), torch.cat(log_stds)

    def coefficients(self, action: Tensor) -> Tensor:
        numbers = action.view(self.concepts, -1)
        powers = torch.stack([numbers[:, 0] + numbers[:, 1 + group] for group in self.group_D], dim=1).exp()
        return powers / powers.sum(dim=0)


class Paper:
    """The published network: the action is the coefficient itself, with a deviation of 1 and more."""

    def __init__(self, features_ND: Tensor, seed: int, hidden: int) -> None:
        concepts, columns = features_ND.shape
        generator = plain.drawer(seed, -2, 0, 0)
        self.free, self.columns, self.share = concepts - 1, columns, 2 / concepts
        self.size = self.free * columns
        self.weights: Weights = {}
        for net in ("mean_net", "std_net"):
            sizes = ((hidden, columns), (hidden, hidden), (self.size, hidden))
            for layer, (rows, own) in zip((0, 2, 4), sizes, strict=True):
                self.weights[f"{net}.{layer}.weight"] = xavier(rows, own, generator)
                self.weights[f"{net}.{layer}.bias"] = zeros(rows)
        self.shares = dict.fromkeys(self.weights, 1.0)

    def gaussian(self, weights: Weights, state: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for net in ("mean_net", "std_net"):
            x = state
            for layer in (0, 2, 4):
                x = weights[f"{net}.{layer}.weight"] @ x + weights[f"{net}.{layer}.bias"]
                x = x.clamp_min(0) if layer < 4 else x
            outputs.append(x)
        return torch.sigmoid(outputs[0]) * self.share, 0.1 * softplus(outputs[1])

    def coefficients(self, action: Tensor) -> Tensor:
        own = action.view(self.free, self.columns)
        return torch.cat([own, 1 - own.sum(dim=0, keepdim=True)])


@dataclass
class Adam:
    """Kingma & Ba's, with a rate of its own for each tensor."""

    weights: Weights
    rates: Mapping[str, float]
    taken: int = 0
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)

    def descend(self, loss: Tensor) -> float:
        """One step; the gradient's norm."""
        names = list(self.weights)
        gradients = torch.autograd.grad(loss, [self.weights[name] for name in names])
        self.taken += 1
        for name, g in zip(names, gradients, strict=True):
            self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * g
            self.second[name] = 0.999 * self.second.get(name, 0) + 0.001 * g**2
            m, v = self.first[name] / (1 - 0.9**self.taken), self.second[name] / (1 - 0.999**self.taken)
            moved = self.weights[name].detach() - self.rates[name] * m / (v.sqrt() + 1e-8)
            self.weights[name] = moved.requires_grad_()
        return math.sqrt(sum((g**2).sum().item() for g in gradients))


def log_density(gaussian: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
    """Of one action in one state, summed over its numbers."""
    mean, log_std = gaussian
    return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum()


def standardized(values: dict[int, float]) -> dict[int, float]:
    """Minus their mean, over their population deviation + 1e-4."""
    middle, spread = plain.mean(list(values.values())), plain.deviation(list(values.values()))
    return {place: (x - middle) / (spread + 1e-4) for place, x in values.items()}


def compared(step: int, count: int) -> list[list[int]]:
    """Pictures that are compared with each other: those of one noise, and all that share theirs with nobody."""
    noises = noises_of(step, count)
    alone = [place for place in range(count) if noises.count(noises[place]) == 1]
    shared = [
        [place for place in range(count) if noises[place] == noise]
        for noise in dict.fromkeys(noises)
        if noises.count(noise) > 1
    ]
    return [*shared, alone] if alone else shared


def train(
    kind: str, features_ND: Tensor, *, seed: int, batch: int, steps: int, policy: "Compact | Conditional | Paper",
    lr: float, epochs: int, clip: float, alpha: float, baseline: str = "leave_one_out", kl: float = 0.0,
    gamma: float = 0.0, lam: float = 0.0, value_lr: float = 0.0,
) -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, float]]]:  # fmt: skip
    """The trained tensors by the product's names, the coefficients of every step, and each step's figures.

    kind: rmler, ppo or grpo.
    """
    weights = {name: x.requires_grad_() for name, x in policy.weights.items()}
    adam = Adam(weights, {name: lr * share for name, share in policy.shares.items()})
    critic = Critic(features_ND, seed, value_lr) if kind == "ppo" else None
    state = features_ND.mean(dim=0)
    first = {name: x.detach().clone() for name, x in weights.items()}
    seen = zeros(len(features_ND))
    proposed, log = [], []
    for step in range(steps):
        noise = torch.randn(
            batch, policy.size, generator=plain.drawer(seed, step, -1, 0), dtype=torch.float64
        )
        states, actions, coefficients, old = [], [], [], []
        for b in range(batch):
            mean, log_std = (x.detach() for x in policy.gaussian(weights, state, seen))
            action = mean + log_std.exp() * noise[b]
            mixed = policy.coefficients(action)
            states.append(state)
            actions.append(action)
            coefficients.append(mixed)
            old.append(log_density((mean, log_std), action).item())
            if kind != "grpo":  # its states are all s_0
                state = sum(features_ND[n] * mixed[n] for n in range(len(features_ND)))
        proposed.append(torch.stack(coefficients))
        rewards, scores = {}, {}
        for b in range(batch):
            if not failed(step, b):
                scores[b] = similarities(step, coefficients[b])
                rewards[b] = sum(scores[b]) - alpha * (max(scores[b]) - min(scores[b]))
        returns: dict[int, float] = {}
        if critic is not None:
            estimates, returns = critic.estimate(states, state, rewards, gamma, lam)
            advantages = standardized(estimates)
        elif kind == "grpo":
            advantages = {}
            for group in compared(step, batch):
                advantages |= standardized({b: rewards[b] for b in group if b in rewards})
        elif baseline == "none":
            advantages = rewards
        else:
            centered = {}
            for group in compared(step, batch):
                for b in group:
                    if b in rewards:
                        others = [rewards[o] for o in group if o != b and o in rewards]
                        centered[b] = rewards[b] - plain.mean(others) if others else 0.0
            advantages = standardized(centered)
        figures: dict[str, float] = {}
        for epoch in range(epochs):
            losses, ratios = [], []
            for b, advantage in advantages.items():
                gaussian = policy.gaussian(weights, states[b], seen)
                ratio = (log_density(gaussian, actions[b]) - old[b]).exp()
                loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))
                begun = policy.gaussian(first, states[b], seen)
                losses.append(loss + (kl * divergence(gaussian, begun) if kl else 0.0))
                ratios.append(ratio.item())
            figures["grad_norm"] = adam.descend(sum(losses) / len(losses))
            if epoch == 0:
                figures["ratio_first"] = plain.mean(ratios)
            figures["ratio_mean"] = plain.mean(ratios)
            figures["clipped_share"] = plain.mean([float(abs(r - 1) > clip) for r in ratios])
        stds = [policy.gaussian(weights, one, seen)[1].detach().exp().mean().item() for one in states]
        figures["policy_std"] = plain.mean(stds)
        if critic is not None:
            for _ in range(epochs):
                figures["value_loss"] = critic.fit(states, returns)
        log.append(figures)
        seen = torch.tensor(list(scores.values()), dtype=torch.float64).mean(dim=0)
    found = {"state_D": state, "seen_N": seen} | {f"policy/{name}": x.detach() for name, x in weights.items()}
    if critic is not None:
        found |= {f"critic/{name}": x.detach() for name, x in critic.weights.items()}
    return found, proposed, log


def divergence(gaussian: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]) -> Tensor:
    """KL of the policy from the first one, summed over the action's numbers."""
    (mean, log_std), (mean_0, log_std_0) = gaussian, first
    variance, variance_0 = (2 * log_std).exp(), (2 * log_std_0).exp()
    return (log_std_0 - log_std + (variance + (mean - mean_0) ** 2) / (2 * variance_0) - 0.5).sum()


class Critic:
    """V(s): a network of 64 hidden units."""

    def __init__(self, features_ND: Tensor, seed: int, lr: float) -> None:
        generator = plain.drawer(seed, -3, 0, 0)
        self.middle = features_ND.mean(dim=0)
        self.spread = ((features_ND - self.middle) ** 2).mean().sqrt()
        weights = {
            "0.weight": xavier(64, features_ND.shape[1], generator), "0.bias": zeros(64),
            "2.weight": xavier(1, 64, generator), "2.bias": zeros(1),
        }  # fmt: skip
        self.weights = {name: x.requires_grad_() for name, x in weights.items()}
        self.adam = Adam(self.weights, dict.fromkeys(self.weights, lr))

    def value(self, state: Tensor) -> Tensor:
        w = self.weights
        hidden = torch.tanh(w["0.weight"] @ ((state - self.middle) / self.spread) + w["0.bias"])
        return (w["2.weight"] @ hidden + w["2.bias"])[0]

    def estimate(
        self, states: list[Tensor], after: Tensor, rewards: dict[int, float], gamma: float, lam: float
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Generalized advantages and returns of the scored; a failed picture counts as the mean of the others."""
        values = [self.value(state).item() for state in [*states, after]]
        filled = [rewards.get(b, plain.mean(list(rewards.values()))) for b in range(len(states))]
        deltas = [filled[b] + gamma * values[b + 1] - values[b] for b in range(len(states))]
        estimates = [
            sum((gamma * lam) ** (later - b) * deltas[later] for later in range(b, len(states)))
            for b in range(len(states))
        ]
        return {b: estimates[b] for b in rewards}, {b: estimates[b] + values[b] for b in rewards}

    def fit(self, states: list[Tensor], returns: dict[int, float]) -> float:
        loss = sum((self.value(states[b]) - wanted) ** 2 for b, wanted in returns.items()) / len(returns)
        self.adam.descend(loss)
        return loss.item()
