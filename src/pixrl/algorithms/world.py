"""The processes that share a training step: joining them, and sums and statistics over all of them.

Several are started by `--processes N` (cli/launch.py), or by `torchrun` or `accelerate launch` on one host or more
(docs/scaling.md), and talk by gloo on CPUs and NCCL on GPUs; one process needs no launcher. On a machine without a GPU,
`accelerate launch` starts several only with `--multi_gpu`.

Gradients are summed once an update by accelerate's `reduce`, and no DistributedDataParallel wraps the model. It was
tried on two gloo processes (docs/log.md): its mean over processes is off by a quarter where they hold one picture and
two; it sums in every backward pass, so that a process whose pictures all failed, or that has fewer micro-batches,
leaves the other waiting until it times out; and what it would hide is one sum of LoRA's gradients an update. Weights
that are trained and divided among processes are summed by FSDP2 in the backward pass (`models/memory/sharding.py`).
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from pixrl.device import choose_device
from pixrl.errors import InputError

AnyT = TypeVar("AnyT")


class World(Protocol):
    """The processes that work on one run: what `Team` and `Alone` offer."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """The number of processes."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes, to each of them."""

    def gather(self, value: AnyT) -> list[AnyT]:
        """Return every process's value in order of rank, to each of them."""


@dataclass(frozen=True)
class Alone:
    """A world of one process."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: AnyT) -> list[AnyT]:
        return [value]


@dataclass(frozen=True)
class Statistics:
    """Count, sum, sum of squares and range of the values of one figure; two of them add up."""

    count: int
    total: float
    squares: float
    least: float
    greatest: float

    @staticmethod
    def of(values: Tensor) -> "Statistics":
        """Return the statistics of a tensor of any shape, which may be empty."""
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
        """The mean; nan where nothing was counted."""
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        """The population standard deviation; nan where nothing was counted."""
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2)) if self.count else math.nan


@dataclass
class Tally:
    """Statistics by name, gathered over micro-batches and then over processes."""

    figures: dict[str, Statistics] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count further values of each name."""
        for name, one in values.items():
            self.merge({name: Statistics.of(one)})

    def merge(self, others: Mapping[str, Statistics]) -> None:
        """Add the statistics of another tally."""
        for name, one in others.items():
            self.figures[name] = self.figures[name] + one if name in self.figures else one

    def over(self, world: World) -> "Tally":
        """Return the tally of all processes, sorted by name."""
        whole = Tally()
        for figures in world.gather(self.figures):
            whole.merge(figures)
        return Tally(dict(sorted(whole.figures.items())))

    def means(self, spread: str = "") -> dict[str, float]:
        """Return the mean of each name; of the name `spread` its NAME_mean, NAME_min, NAME_max and NAME_std instead."""
        found = {name: one.mean for name, one in self.figures.items() if name != spread}
        if spread in self.figures:
            one = self.figures[spread]
            spreads = {"mean": one.mean, "min": one.least, "max": one.greatest, "std": one.std}
            found |= {f"{spread}_{which}": value for which, value in spreads.items()}
        return found


BUCKET = 2**24
"""Values of the gradients that are summed at a time: 64 MiB, so that their sum takes little beside a whole model's."""


def sum_gradients(world: World, parameters: Sequence[nn.Parameter], flag: float) -> float:
    """Set each gradient to its sum over all processes, and return the sum of `flag`; a missing gradient counts as 0.

    Gradients of divided parameters are summed already.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    buckets: list[list[Tensor]] = [[]]
    for gradient in gradients:
        if buckets[-1] and sum(one.numel() for one in buckets[-1]) + gradient.numel() > BUCKET:
            buckets.append([])
        buckets[-1].append(gradient)
    total, own = 0.0, parameters[0].new_full((1,), flag) if gradients else torch.tensor([flag])
    for bucket in buckets:
        flat = world.sum(torch.cat([*(gradient.flatten() for gradient in bucket), own]))
        sizes = [gradient.numel() for gradient in bucket]
        for gradient, summed in zip(bucket, flat[:-1].split(sizes), strict=True):
            gradient.copy_(summed.view_as(gradient))
        total += flat[-1].item()
        own = torch.zeros_like(own)
    return total


def disagreement(world: World, values: Iterable[Tensor]) -> float:
    """Return how far the processes' copies of some tensors are apart.

    That is the largest relative difference of three checksums of each: sum, norm and a weighted sum that sees swapped
    values.
    """
    own: list[float] = []
    for one in values:
        x = one.detach().double().cpu().flatten()
        weights = torch.linspace(-1, 1, max(1, len(x)), dtype=torch.float64)[: len(x)]
        own += [x.sum().item(), x.norm().item(), (x * weights).sum().item()]
    sums: list[list[float]] = world.gather(own)
    scale = max((abs(one) for row in sums for one in row), default=0.0) or 1.0
    apart: float = max((max(column) - min(column) for column in zip(*sums, strict=True)), default=0.0)
    return apart / scale


class Team:
    """The world that a launcher started, or this process alone where none did."""

    def __init__(self, device: str = "auto") -> None:
        """Join the process group, if there is one.

        Args:
            device: used as given by a single process; of several GPUs each process takes its own.

        Raises:
            InputError: the device does not exist, or there are fewer GPUs than processes.
        """
        asked = choose_device(device)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if asked.type == "cuda" and local > (cards := torch.cuda.device_count()):
            raise InputError(
                f"{local} processes share a step, each on a GPU of its own, and this machine has {cards}. "
                "Start fewer, or compute on the CPU (--device cpu)."
            )
        self._state = PartialState(cpu=asked.type == "cpu")
        alone = self._state.num_processes == 1
        self.device = str(asked) if alone or asked.type == "cpu" else str(self._state.device)

    @property
    def rank(self) -> int:
        return int(self._state.process_index)

    @property
    def size(self) -> int:
        return int(self._state.num_processes)

    @property
    def local(self) -> int:
        """The number of processes on this host, as the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @property
    def leads(self) -> bool:
        """Whether this process (rank 0) writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        if self.size == 1:
            return values
        total: Tensor = reduce(values.to(self._state.device), "sum")
        return total.to(values.device)

    def gather(self, value: AnyT) -> list[AnyT]:
        if self.size == 1:
            return [value]
        values: list[AnyT] = gather_object([value])
        return values

    def mesh(self, *, trained: bool = False) -> DeviceMesh:
        """Return the processes that divide a model among them, as torch's mesh of one dimension: see `sharers`.

        `trained`: its weights have gradients, which copies must tell each other; where there are several copies the
        mesh has two dimensions then, hosts and the processes of each.
        """
        each = sharers(self.size, self.local)
        hosts = init_device_mesh(
            self._state.device.type, (self.size // each, each), mesh_dim_names=("host", "part")
        )
        return hosts if trained and each < self.size else hosts["part"]

    def wait(self) -> None:
        """Block until every process has called this."""
        self._state.wait_for_everyone()


def sharers(size: int, local: int) -> int:
    """Return how many processes divide one copy of a model: those of a host, whose links are fast; all, if it has one.

    Frozen weights have no gradients, so hosts with copies of their own have nothing more to tell each other; trained
    ones are summed over the hosts once a backward pass.
    """
    return local if local > 1 and size % local == 0 else size


def limit_threads(size: int) -> None:
    """Divide torch's threads among the `size` CPU processes of a host, which would otherwise each take every core."""
    if size > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
