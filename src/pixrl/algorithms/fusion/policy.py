"""Stochastic policies over mixing coefficients: a Gaussian over actions u, and the coefficients that u stands for.

| paper                 | here                                                    |
|-----------------------|---------------------------------------------------------|
| s_t (h x w)           | `states_BS`: the fused embedding, averaged over the h tokens, and the last similarities |
| a_t (w)               | `coefficients_BND`, a_t of the first concept and the rest |
| pi_theta(a_t given s_t) | `log_prob(states_BS, actions_BX)`, [B]                |

S = D + N is the size of a state, X that of an action. Log-probabilities are of u, summed over X, in float32.

`PolicySampler` rolls a policy out over a batch and improves it by the clipped surrogate. The transition of the fusion
MDP depends on the action alone (s_{t+1} = fuse(a_t), always from the sources), so a batch of actions can be drawn one
after the other before any picture exists, and all its pictures rendered at once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pixrl.algorithms.fusion.base import Feedback, FusionTask, Proposal, Sampler
from pixrl.config import Count, Settings
from pixrl.equations import clipped_surrogate, fuse
from pixrl.errors import ShapeError
from pixrl.types import sample_seed

_LOG_2PI = math.log(2 * math.pi)


class FusionPolicy(nn.Module, ABC):
    """A diagonal Gaussian over actions, given the state."""

    action_size: int

    @abstractmethod
    def gaussian(self, states_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the logarithm of the standard deviation, [B, X] each."""

    @abstractmethod
    def coefficients(self, actions_BX: Tensor) -> Tensor:
        """Return the mixing coefficients [B, N, D] that actions stand for."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the parameters and their learning rates, for the optimizer."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def draw(self, states_BS: Tensor, noise_BX: Tensor) -> Tensor:
        """Draw actions [B, X] from standard normal noise."""
        mean_BX, log_std_BX = self.gaussian(states_BS)
        return mean_BX + log_std_BX.exp() * noise_BX

    def log_prob(self, states_BS: Tensor, actions_BX: Tensor) -> Tensor:
        """Return log pi(u given s), [B]: one action for each state, never one against all."""
        mean_BX, log_std_BX = self.gaussian(states_BS)
        if actions_BX.shape != mean_BX.shape:
            raise ShapeError(
                f"actions_BX is {list(actions_BX.shape)}, the states want {list(mean_BX.shape)}."
            )
        scaled_BX = (actions_BX - mean_BX) * (-log_std_BX).exp()
        log_prob_B = -(0.5 * scaled_BX**2 + log_std_BX + 0.5 * _LOG_2PI).sum(dim=1)
        assert log_prob_B.shape == (states_BS.shape[0],)
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
        return by_fan_in(self.trunk, self.head, lr)

    def gaussian(self, states_BS: Tensor) -> tuple[Tensor, Tensor]:
        scaled_BD = (states_BS[:, : len(self._center_D)] - self._center_D) / self._spread
        mean_BX, log_std_BX = self.head(torch.tanh(self.trunk(scaled_BD))).chunk(2, dim=1)
        return mean_BX, log_std_BX

    def coefficients(self, actions_BX: Tensor) -> Tensor:
        u_BMX = actions_BX.view(actions_BX.shape[0], self.logits, 1 + self.groups)
        logits_BMD = u_BMX[:, :, :1] + u_BMX[:, :, 1:][:, :, self._group_D]
        if self.logits > 1:
            return logits_BMD.softmax(dim=1)
        a_BD = torch.sigmoid(logits_BMD[:, 0])
        return torch.stack((a_BD, 1 - a_BD), dim=1)


UNMIXED = (0.2380 + 0.2205) / 2
"""The imbalance of pictures of one concept alone that RMLer reports (its Table 2): the unit of what a policy sees."""


class ConditionalPolicy(FusionPolicy):
    """One network for any concepts: it is shown each of them, how they are mixed now, and how much of each was seen.

    Every concept's numbers come from the same network, so that naming the concepts in another order gives the same
    mixtures, and what is learned on one pair of concepts can serve another. u has 1 + G numbers a concept, as in
    `CompactPolicy`; the softmax over the concepts makes the coefficients.
    """

    _group_D: Tensor
    _concepts_NI: Tensor
    _center_D: Tensor
    _spread: Tensor

    def __init__(
        self, task: FusionTask, *, groups: int, hidden: int, std: float, balance_std: float, seed: int
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.concepts, self.columns = task.features_ND.shape
        self.groups = min(groups, self.columns)
        self.action_size = self.concepts * (1 + self.groups)
        # kept with the weights: they mean something for this partition alone
        self.register_buffer("_group_D", torch.randperm(self.columns, generator=generator) % self.groups)
        center_D = task.features_ND.mean(dim=0)
        spread = (task.features_ND - center_D).square().mean().sqrt().clamp_min(1e-6)
        common_D = center_D / center_D.square().mean().sqrt().clamp_min(1e-6)
        own_ND = (task.features_ND - center_D) / spread
        concepts_NI = torch.cat((own_ND, common_D.expand_as(own_ND)), dim=1)
        self.register_buffer("_concepts_NI", concepts_NI, persistent=False)
        self.register_buffer("_center_D", center_D, persistent=False)
        self.register_buffer("_spread", spread, persistent=False)
        self.trunk = linear(3 * self.columns + 1, hidden, generator)
        self.head = linear(hidden, 2 * (1 + self.groups), generator)
        nn.init.zeros_(self.head.weight)
        # the difference of two concepts' logits has the given spread
        deviations = torch.tensor([balance_std, *[std] * self.groups]) / math.sqrt(2)
        with torch.no_grad():
            self.head.bias[1 + self.groups :] = deviations.log()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return by_fan_in(self.trunk, self.head, lr)

    def gaussian(self, states_BS: Tensor) -> tuple[Tensor, Tensor]:
        states_BD, seen_BN = states_BS[:, : self.columns], states_BS[:, self.columns :]
        mixed_BD = (states_BD - self._center_D) / self._spread
        missing_BN = (seen_BN.mean(dim=1, keepdim=True) - seen_BN) / UNMIXED
        shape = (len(states_BS), self.concepts, -1)
        given_BNI = torch.cat(
            (self._concepts_NI.expand(shape), mixed_BD[:, None].expand(shape), missing_BN[..., None]), dim=2
        )
        numbers_BNX = self.head(torch.tanh(self.trunk(given_BNI)))
        mean_BNX, log_std_BNX = numbers_BNX.chunk(2, dim=2)
        return mean_BNX.flatten(1), log_std_BNX.flatten(1)

    def coefficients(self, actions_BX: Tensor) -> Tensor:
        u_BNX = actions_BX.view(len(actions_BX), self.concepts, 1 + self.groups)
        return (u_BNX[:, :, :1] + u_BNX[:, :, 1:][:, :, self._group_D]).softmax(dim=1)


class PublishedPolicy(FusionPolicy):
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

    def gaussian(self, states_BS: Tensor) -> tuple[Tensor, Tensor]:
        states_BD = states_BS[:, : self.columns]
        mean_BX = torch.sigmoid(self.mean_net(states_BD)) * self._share
        return mean_BX, 0.1 * nn.functional.softplus(self.std_net(states_BD))

    def coefficients(self, actions_BX: Tensor) -> Tensor:
        a_BMD = actions_BX.view(actions_BX.shape[0], self.free, self.columns)
        return torch.cat((a_BMD, 1 - a_BMD.sum(dim=1, keepdim=True)), dim=1)


def by_fan_in(trunk: nn.Linear, head: nn.Linear, lr: float) -> list[dict[str, Any]]:
    """Let weights learn more slowly by their fan-in, so that a step moves the mean by about lr at any width."""
    return [
        {"params": [head.bias], "lr": lr},
        {"params": [head.weight], "lr": lr / head.in_features},
        {"params": list(trunk.parameters()), "lr": lr / trunk.in_features},
    ]


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Make a layer with Xavier weights from the generator and zero bias; torch's global random state stays."""
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


_INIT = -2
"""Epoch of the seed that initializes networks; steps are 0 and up."""


class PolicyKind(StrEnum):
    """The network that proposes the coefficients."""

    COMPACT = "compact"
    """Few numbers, for the concepts of one run."""
    CONDITIONAL = "conditional"
    """As few, from what the concepts are and from what was seen of them: it can serve other concepts too."""
    PAPER = "paper"
    """The published network."""


Defaults = dict[PolicyKind, dict[str, Any]]

SMALL = {"lr": 0.07, "epochs": 8, "hidden": 32, "groups": 4, "std": 0.3, "balance_std": 0.5}
DEFAULTS: Defaults = {
    PolicyKind.COMPACT: SMALL,
    PolicyKind.CONDITIONAL: SMALL,
    PolicyKind.PAPER: {"lr": 3e-6, "epochs": 1, "hidden": 4096},
}
"""Chosen by measurement on the toy world (docs/log.md)."""


class PolicySettings(Settings):
    """The settings of a policy and its updates. What is not given takes the policy's own default."""

    defaults: ClassVar[Defaults] = DEFAULTS

    policy: PolicyKind = PolicyKind.COMPACT
    lr: float = Field(gt=0)
    """Adam's learning rate."""
    epochs: Count
    """Passes over a batch; the clip takes effect from the second on."""
    clip: float = Field(0.2, gt=0)
    """Half width of the trusted probability ratios."""
    hidden: int = Field(ge=1, le=65536)
    """Width of the hidden layers."""
    groups: int | None = Field(None, ge=1)
    """compact, conditional: groups of columns that share a coefficient."""
    std: float | None = Field(None, gt=0)
    """compact, conditional: first standard deviation of a group's offset."""
    balance_std: float | None = Field(None, gt=0)
    """compact, conditional: first standard deviation of the balance."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("policy", PolicyKind.COMPACT) not in list(PolicyKind):
            return given
        kind = PolicyKind(given.get("policy", PolicyKind.COMPACT))
        without_effect = [
            name
            for name in ("groups", "std", "balance_std")
            if kind is PolicyKind.PAPER and given.get(name) is not None
        ]
        if without_effect:
            raise ValueError(f"{' and '.join(without_effect)} would have no effect with policy 'paper'")
        return {**cls.defaults[kind], **given}


PolicySettingsT = TypeVar("PolicySettingsT", bound=PolicySettings)


class PolicySampler(Sampler[PolicySettingsT]):
    """A sampler that draws coefficients from a policy and improves it after every batch."""

    Settings = PolicySettings
    has_policy = True

    def __init__(self, task: FusionTask, settings: PolicySettingsT) -> None:
        super().__init__(task, settings)
        self.policy = _build(task, settings)
        self.optimizer = torch.optim.Adam(self.policy.parameter_groups(settings.lr))
        self.state_D = task.features_ND.mean(dim=0)
        """Of s_t: the fused embedding that the last action made; at first the mean of the sources."""
        self.seen_N = torch.zeros(task.concepts)
        """Of s_t: the mean similarities of the last batch; at first 0."""

    def ask(self, count: int, step: int) -> Proposal:
        noise_BX = torch.randn(count, self.policy.action_size, generator=self.task.generator(step))
        states, coefficients, actions = [], [], []
        state_D = self.state_D
        with torch.no_grad():
            for noise_X in noise_BX:
                state_S = torch.cat((state_D, self.seen_N))
                action_BX = self.policy.draw(state_S[None], noise_X[None])
                coefficients_ND = self.policy.coefficients(action_BX)[0]
                states.append(state_S)
                actions.append(action_BX[0])
                coefficients.append(coefficients_ND)
                state_D = self.transition(coefficients_ND)
            states_BS, actions_BX = torch.stack(states), torch.stack(actions)
            log_prob_B = self.policy.log_prob(states_BS, actions_BX)
        trace = {
            "states_BS": states_BS,
            "actions_BX": actions_BX,
            "log_prob_B": log_prob_B,
            "next_D": state_D,
        }
        return Proposal(torch.stack(coefficients), trace)

    def transition(self, coefficients_ND: Tensor) -> Tensor:
        """Return the embedding of s_{t+1}: the sources, mixed anew."""
        return fuse(self.task.features_ND[:, None], coefficients_ND)[0]

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        scored_B = ~feedback.rewards_B.isnan()
        self.state_D = proposal.trace["next_D"]
        self.observe(feedback)
        if int(scored_B.sum()) < 2:
            return {}
        return self.improve(proposal, self.advantages(proposal, feedback), scored_B)

    def observe(self, feedback: Feedback) -> None:
        scored_B = ~feedback.rewards_B.isnan()
        if bool(scored_B.any()):
            self.seen_N = feedback.similarities_BN[scored_B].mean(dim=0)

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin with the policy of another run's sampler; state and optimizer stay this run's own."""
        prefix = "policy/"
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        self.policy.load_state_dict(own)

    @abstractmethod
    def advantages(self, proposal: Proposal, feedback: Feedback) -> Tensor:
        """Return how much better each action was than expected, [B]; 0 where scoring failed."""

    def penalty(self, states_BS: Tensor) -> Tensor | None:
        """Return a further term of the loss, [B]; None where there is none."""
        return None

    def improve(self, proposal: Proposal, advantages_B: Tensor, scored_B: Tensor) -> dict[str, float]:
        """Take several epochs of the clipped surrogate (Eq. 4) over one batch, failed samples left out."""
        states_BS, actions_BX, old_B = (proposal.trace[k] for k in ("states_BS", "actions_BX", "log_prob_B"))
        figures: dict[str, float] = {}
        for epoch in range(self.settings.epochs):
            log_prob_B = self.policy.log_prob(states_BS, actions_BX)
            loss_B = clipped_surrogate(log_prob_B, old_B, advantages_B, self.settings.clip)
            penalty_B = self.penalty(states_BS)
            if penalty_B is not None:
                loss_B = loss_B + penalty_B
            self.optimizer.zero_grad()
            torch.autograd.backward(loss_B[scored_B].mean())
            grad_norm = nn.utils.get_total_norm(
                p.grad for p in self.policy.parameters() if p.grad is not None
            )
            self.optimizer.step()
            ratio_B = (log_prob_B.detach() - old_B).exp()[scored_B]
            if epoch == 0:
                figures["ratio_first"] = float(ratio_B.mean())
            figures["ratio_mean"] = float(ratio_B.mean())
            figures["clipped_share"] = float(((ratio_B - 1).abs() > self.settings.clip).float().mean())
            figures["grad_norm"] = float(grad_norm)
        with torch.no_grad():
            figures["policy_std"] = float(self.policy.gaussian(states_BS)[1].exp().mean())
        return figures

    def tensors(self) -> dict[str, Tensor]:
        state = {"state_D": self.state_D, "seen_N": self.seen_N}
        return state | module_tensors("policy", self.policy, self.optimizer)

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.state_D = tensors["state_D"]
        self.seen_N = tensors.get("seen_N", self.seen_N)  # runs of before policies saw it have none
        restore_module("policy", self.policy, self.optimizer, tensors)


def _build(task: FusionTask, settings: PolicySettings) -> FusionPolicy:
    seed = sample_seed(task.seed, _INIT, 0, 0)
    if settings.policy is PolicyKind.PAPER:
        return PublishedPolicy(task, hidden=settings.hidden, seed=seed)
    assert settings.groups is not None and settings.std is not None and settings.balance_std is not None
    kind = ConditionalPolicy if settings.policy is PolicyKind.CONDITIONAL else CompactPolicy
    return kind(
        task,
        groups=settings.groups,
        hidden=settings.hidden,
        std=settings.std,
        balance_std=settings.balance_std,
        seed=seed,
    )


def module_tensors(name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a module's parameters and its optimizer's moments under flat names."""
    found = {f"{name}/{key}": value for key, value in module.state_dict().items()}
    for row, moments in optimizer.state_dict()["state"].items():
        found |= {f"{name}.optimizer/{row}/{key}": value for key, value in moments.items()}
    return found


def restore_module(
    name: str, module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `module_tensors` returned."""
    prefix = f"{name}/"
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{name}.optimizer/"):
            _, row, moment = key.split("/")
            moments.setdefault(int(row), {})[moment] = value
    if moments:
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
