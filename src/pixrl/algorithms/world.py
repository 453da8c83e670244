"""The processes that share a training step, and sums and figures over all of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

AnyT = TypeVar("AnyT")


class World(Protocol):
    """The processes that work on one run."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""

    def gather(self, value: AnyT) -> list[AnyT]:
        """Every process's value, in order of rank, on each of them."""


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: AnyT) -> list[AnyT]:
        return [value]


@dataclass(frozen=True)
class Statistics:
    """What is known of the values of one name."""

    count: int
    total: float
    squares: float
    least: float
    greatest: float

    @staticmethod
    def of(values: Tensor) -> "Statistics":
        x = values.detach().double().flatten()
        if not len(x):
            return Statistics(0, 0.0, 0.0, math.inf, -math.inf)
        return Statistics(len(x), x.sum().item(), (x * x).sum().item(), x.min().item(), x.max().item())

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            min(self.least, other.least),
            max(self.greatest, other.greatest),
        )

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2)) if self.count else math.nan


@dataclass
class Tally:
    """Figures by name, over micro-batches and then over processes."""

    figures: dict[str, Statistics] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count further values."""
        for name, one in values.items():
            self.merge({name: Statistics.of(one)})

    def merge(self, others: Mapping[str, Statistics]) -> None:
        """Count what another tally counted."""
        for name, one in others.items():
            self.figures[name] = self.figures[name] + one if name in self.figures else one

    def over(self, world: World) -> "Tally":
        """That of all processes, names in order."""
        whole = Tally()
        for figures in world.gather(self.figures):
            whole.merge(figures)
        return Tally(dict(sorted(whole.figures.items())))

    def means(self) -> dict[str, float]:
        """Name -> mean."""
        return {name: one.mean for name, one in self.figures.items()}


def disagreement(world: World, values: Tensor) -> float:
    """How far the processes' copies of a vector are apart: the largest relative difference of three checksums."""
    x = values.detach().double().cpu()
    weights = torch.linspace(-1, 1, max(1, len(x)), dtype=torch.float64)[: len(x)]
    sums: list[list[float]] = world.gather([x.sum().item(), x.norm().item(), (x * weights).sum().item()])
    scale = max(max(abs(one) for one in row) for row in sums) or 1.0
    apart: float = max(max(column) - min(column) for column in zip(*sums, strict=True))
    return apart / scale
