"""Which prompts a training step draws. A group is never cut: each process gets whole ones.

The order is a function of (seed, step) alone, so a resumed run needs nothing but its step.
"""

from functools import lru_cache

import torch

from pixrl.algorithms.base import Group
from pixrl.data.prompts import PromptSet
from pixrl.types import sample_seed

_ORDER_KEY = -4
"""Prompt index of the draws of the order; prompts use 0 and up."""


class PromptSampler:
    """Goes through a set again and again, each time in another order; a step takes the next `per_step`."""

    def __init__(self, prompts: PromptSet, *, per_step: int, seed: int) -> None:
        self.prompts = prompts
        self.per_step = per_step
        self.seed = seed
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def groups(self, step: int) -> list[Group]:
        """All groups of a training step. One prompt occurs once in an epoch, so its pass and number name a group."""
        first = step * self.per_step
        return [self._group(place, first + place) for place in range(self.per_step)]

    def _group(self, place: int, position: int) -> Group:
        epoch, turn = divmod(position, len(self.prompts))
        index = self._order(epoch)[turn]
        prompt = self.prompts[index]
        return Group(place, epoch, index, prompt.text, prompt.metadata)

    def _shuffled(self, epoch: int) -> list[int]:
        drawer = torch.Generator().manual_seed(sample_seed(self.seed, epoch, _ORDER_KEY, 0))
        order: list[int] = torch.randperm(len(self.prompts), generator=drawer).tolist()
        return order


def share(count: int, rank: int, size: int) -> slice:
    """The part of `count` things that process `rank` of `size` takes: neighbours, as even as can be."""
    return slice(count * rank // size, count * (rank + 1) // size)
