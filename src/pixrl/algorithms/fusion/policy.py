"""Stochastic policies over mixing coefficients: a Gaussian over actions u, and the coefficients that u stands for.

| paper                 | here                                                    |
|-----------------------|---------------------------------------------------------|
| s_t (h x w)           | `states_BD`, averaged over the h tokens                 |
| a_t (w)               | `coefficients_BND`, a_t of the first concept and the rest |
| pi_theta(a_t given s_t) | `log_prob(states_BD, actions_BX)`, [B]                |

X is the size of an action. Log-probabilities are of u, summed over X, in float32.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from pixrl.algorithms.fusion.base import FusionTask
from pixrl.errors import ShapeError

_LOG_2PI = math.log(2 * math.pi)


class FusionPolicy(nn.Module, ABC):
    """A diagonal Gaussian over actions, given the state."""

    action_size: int

    @abstractmethod
    def gaussian(self, states_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation, [B, X] each."""

    @abstractmethod
    def coefficients(self, actions_BX: Tensor) -> Tensor:
        """The mixing coefficients [B, N, D] that actions stand for."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters and their learning rates, for the optimizer."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def draw(self, states_BD: Tensor, noise_BX: Tensor) -> Tensor:
        """Actions from standard normal noise."""
        mean_BX, log_std_BX = self.gaussian(states_BD)
        return mean_BX + log_std_BX.exp() * noise_BX

    def log_prob(self, states_BD: Tensor, actions_BX: Tensor) -> Tensor:
        """log pi(u given s), [B]: one action for each state, never one against all."""
        mean_BX, log_std_BX = self.gaussian(states_BD)
        if actions_BX.shape != mean_BX.shape:
            raise ShapeError(
                f"actions_BX is {list(actions_BX.shape)}, the states want {list(mean_BX.shape)}."
            )
        scaled_BX = (actions_BX - mean_BX) * (-log_std_BX).exp()
        log_prob_B = -(0.5 * scaled_BX**2 + log_std_BX + 0.5 * _LOG_2PI).sum(dim=1)
        assert log_prob_B.shape == (states_BD.shape[0],)
        return log_prob_B


class CompactPolicy(FusionPolicy):
    """Bounded coefficients from few numbers: a balance and one offset for each group of columns.

    u has 1 + G numbers for each logit. The logit of column d is u_0 + u_g(d), with a random partition of the columns
    into G groups; the coefficients are its sigmoid for two concepts (logit-normal), and the softmax over one logit a
    concept for more (logistic-normal). Every column therefore stays on the simplex.
    """

    _group_D: Tensor
    _center_D: Tensor
    _spread: Tensor

    def __init__(
        self, task: FusionTask, *, groups: int, hidden: int, std: float, balance_std: float, seed: int
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        concepts, columns = task.features_ND.shape
        self.logits = 1 if concepts == 2 else concepts
        self.groups = min(groups, columns)
        self.action_size = self.logits * (1 + self.groups)
        group_D = torch.randperm(columns, generator=generator) % self.groups
        center_D = task.features_ND.mean(dim=0)
        spread = (task.features_ND - center_D).square().mean().sqrt().clamp_min(1e-6)
        self.register_buffer("_group_D", group_D, persistent=False)
        self.register_buffer("_center_D", center_D, persistent=False)
        self.register_buffer("_spread", spread, persistent=False)
        self.trunk = linear(columns, hidden, generator)
        self.head = linear(hidden, 2 * self.action_size, generator)
        nn.init.zeros_(self.head.weight)
        # for any number of concepts the difference of two logits has the same spread
        scale = 1.0 if concepts == 2 else 1 / math.sqrt(2)
        std_L = torch.tensor([balance_std, *[std] * self.groups]) * scale
        with torch.no_grad():
            self.head.bias[self.action_size :] = std_L.log().repeat(self.logits)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Weights learn more slowly by their fan-in, so that a step moves the mean by about lr at any width."""
        return [
            {"params": [self.head.bias], "lr": lr},
            {"params": [self.head.weight], "lr": lr / self.head.in_features},
            {"params": list(self.trunk.parameters()), "lr": lr / self.trunk.in_features},
        ]

    def gaussian(self, states_BD: Tensor) -> tuple[Tensor, Tensor]:
        scaled_BD = (states_BD - self._center_D) / self._spread
        mean_BX, log_std_BX = self.head(torch.tanh(self.trunk(scaled_BD))).chunk(2, dim=1)
        return mean_BX, log_std_BX

    def coefficients(self, actions_BX: Tensor) -> Tensor:
        u_BMX = actions_BX.view(actions_BX.shape[0], self.logits, 1 + self.groups)
        logits_BMD = u_BMX[:, :, :1] + u_BMX[:, :, 1:][:, :, self._group_D]
        if self.logits > 1:
            return logits_BMD.softmax(dim=1)
        a_BD = torch.sigmoid(logits_BMD[:, 0])
        return torch.stack((a_BD, 1 - a_BD), dim=1)


class PaperPolicy(FusionPolicy):
    """The published network: two MLPs of two hidden layers, mean sigmoid(.) and std exp(0.1 softplus(.)) >= 1.

    The action is the coefficient itself, one a column for all concepts but the last, which takes the rest. Nothing
    bounds it: with a std above 1, most coefficients leave [0, 1].
    """

    _share: Tensor

    def __init__(self, task: FusionTask, *, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        concepts, columns = task.features_ND.shape
        self.free = concepts - 1
        self.columns = columns
        self.action_size = self.free * columns
        self.register_buffer("_share", torch.tensor(2 / concepts), persistent=False)
        self.mean_net = _mlp(columns, hidden, self.action_size, generator)
        self.std_net = _mlp(columns, hidden, self.action_size, generator)

    def gaussian(self, states_BD: Tensor) -> tuple[Tensor, Tensor]:
        mean_BX = torch.sigmoid(self.mean_net(states_BD)) * self._share
        return mean_BX, 0.1 * nn.functional.softplus(self.std_net(states_BD))

    def coefficients(self, actions_BX: Tensor) -> Tensor:
        a_BMD = actions_BX.view(actions_BX.shape[0], self.free, self.columns)
        return torch.cat((a_BMD, 1 - a_BMD.sum(dim=1, keepdim=True)), dim=1)


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A layer with Xavier weights from the generator and zero bias; torch's global random state is not touched."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(inputs: int, hidden: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    return nn.Sequential(
        linear(inputs, hidden, generator),
        nn.ReLU(),
        linear(hidden, hidden, generator),
        nn.ReLU(),
        linear(hidden, outputs, generator),
    )
