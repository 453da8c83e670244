"""The one interface of all fusion samplers: `ask` for mixing coefficients, `tell` what the pictures scored.

Every sampler gets the same budget of pictures, the same exemplars and the same selection, so that the only difference
between two runs is how the coefficients were chosen. A sampler draws from a generator of its own for every step, keyed
by (seed, step): its proposals depend on nothing but those and on what it was told.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from pixrl.config import Settings
from pixrl.equations import fusion_reward
from pixrl.errors import ShapeError
from pixrl.types import sample_seed

_SALT = -1
"""Prompt index of the samplers' own random numbers; pictures use 0 and up."""

SettingsT = TypeVar("SettingsT", bound=Settings)


class NoSettings(Settings):
    """The settings of a sampler that has none."""


@dataclass(frozen=True)
class FusionTask:
    """The task of a sampler, which is all that it knows before the first picture.

    `features_ND` is each concept's embedding averaged over its tokens: mixing columns and averaging tokens commute,
    so the mean over tokens of a fused embedding is `fuse(features_ND[:, None], coefficients_ND)`.
    """

    features_ND: Tensor
    seed: int
    budget: int
    batch: int

    def __post_init__(self) -> None:
        if self.features_ND.ndim != 2 or self.features_ND.shape[0] < 2:
            raise ShapeError(f"features_ND must be [N, D] with N >= 2, got {list(self.features_ND.shape)}.")

    @property
    def concepts(self) -> int:
        return self.features_ND.shape[0]

    @property
    def columns(self) -> int:
        return self.features_ND.shape[1]

    def generator(self, step: int) -> torch.Generator:
        """Make the generator of the sampler's random numbers of one step."""
        return torch.Generator().manual_seed(sample_seed(self.seed, step, _SALT, 0))


@dataclass(frozen=True)
class Proposal:
    """The coefficients of B pictures, [B, N, D], and what the sampler needs again in `tell`."""

    coefficients_BND: Tensor
    trace: Mapping[str, Tensor] = field(default_factory=dict)
    noises_B: Tensor | None = None
    """The number of the noise that each picture is to be drawn from; None: as the recipe's `noise` says."""

    def __len__(self) -> int:
        return self.coefficients_BND.shape[0]


@dataclass(frozen=True)
class Feedback:
    """The scores of a proposal's pictures; nan in the rows whose scoring failed."""

    similarities_BN: Tensor
    rewards_B: Tensor
    noise_B: Tensor
    """A number for each noise: pictures with the same one were drawn from the same noise."""

    @staticmethod
    def of(similarities_BN: Tensor, alpha: float, seeds: Sequence[int] = ()) -> "Feedback":
        """Make the feedback of similarities and the noises' seeds, which are all different when none are given."""
        count = len(similarities_BN)
        first = {seed: place for place, seed in reversed(list(enumerate(seeds or range(count))))}
        noise_B = torch.tensor([first[seed] for seed in seeds or range(count)], dtype=torch.long)
        return Feedback(similarities_BN, fusion_reward(similarities_BN, alpha), noise_B)

    def by_noise(self) -> Tensor:
        """Return rewards [P, G], one row a noise that several pictures share, all others in one row; nan elsewhere.

        Row p, column b holds picture b's reward if it belongs to row p.
        """
        numbers, place_B, count = self.noise_B.unique(return_inverse=True, return_counts=True)
        row_B = torch.where(count[place_B] > 1, place_B, len(numbers))
        rows = row_B.unique()
        return self.rewards_B.expand(len(rows), -1).masked_fill(rows[:, None] != row_B, torch.nan)


class Sampler(ABC, Generic[SettingsT]):
    """A sampler, which proposes coefficients and learns, or not, from what they scored."""

    Settings: ClassVar[type[Settings]] = NoSettings
    """Its own settings, the `options` of a fuse recipe."""
    has_policy: ClassVar[bool] = False
    """Whether it learns a distribution, from which a pool of pictures can be drawn when learning is done."""

    def __init__(self, task: FusionTask, settings: SettingsT) -> None:
        self.task = task
        self.settings = settings

    @abstractmethod
    def ask(self, count: int, step: int) -> Proposal:
        """Propose coefficients for `count` pictures of a step. Asking again for a step gives the same ones."""

    def tell(self, proposal: Proposal, feedback: Feedback) -> dict[str, float]:
        """Learn from the scores of a proposal, and return figures for the log."""
        return {}

    def observe(self, feedback: Feedback) -> None:
        """See the scores of a batch without learning from them."""
        return None

    @staticmethod
    def shortlist(settings: Any, similarities_BN: Tensor) -> Tensor:
        """Return which pictures of a run the method itself would pass on to the selection, bool [B]."""
        return torch.ones(len(similarities_BN), dtype=torch.bool)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state, for a checkpoint."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return the rest of the state as JSON values."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take up a saved state; the next `ask` and `tell` do what they would have done without the break."""
        return None
