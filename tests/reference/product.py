"""The product's own training of the tiny world: one process, two threads that are each other's world, or real ones."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from pixrl.algorithms.exploration import SHOWN, Group
from pixrl.algorithms.loss import Rollouts
from pixrl.algorithms.sft import TARGET
from pixrl.algorithms.trainer import Aligner, Method, MicroBatches
from pixrl.algorithms.world import Alone, World
from pixrl.data.preferences import LOSER, WINNER
from pixrl.runs.data import share
from pixrl.types import Scores
from tests.reference import world
from tests.reference.world import Scene, TinyPolicy

MICRO = MicroBatches(rollout=4, train=5)
"""Neither divides a group, so that rows of two prompts meet in one batch."""


@dataclass(frozen=True)
class Run:
    """What is trained."""

    method: Method
    seed: int
    steps: Sequence[int]
    rewards: Sequence[str]
    trained: Callable[[int], Mapping[str, float]]
    references: int = 0
    scale_loss: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    slots: dict[str, Tensor]
    log: list[dict[str, float]]
    rollouts: list[Rollouts]


def group_of(scene: Scene) -> Group:
    several = len(scene.shown) > 1
    classes = {"subjects": [{"class": scene.word}, {"class": "cup"}]} if several else {"class": scene.word}
    metadata = {**classes, SHOWN: scene.shown}
    metadata |= {} if scene.target is None else {TARGET: scene.target}
    metadata |= dict(zip((WINNER, LOSER), scene.pair, strict=True))
    return Group(scene.place, scene.epoch, scene.index, scene.prompt, metadata)


def begin(run: Run, processes: World | None = None) -> tuple[TinyPolicy, Aligner]:
    """A fresh model and its trainer."""
    policy = TinyPolicy()
    scale = run.scale_loss
    return policy, Aligner(
        policy, policy.lora, run.method, MICRO, seed=run.seed, world=processes, scale_loss=scale
    )


def train(run: Run, processes: World | None = None) -> Outcome:
    """All steps of this process's share of the prompts."""
    processes = processes or Alone()
    policy, aligner = begin(run, processes)
    log, rollouts = [], []
    for step in run.steps:
        groups = [group_of(scene) for scene in world.scenes(step, run.references)]
        mine = share(len(groups), processes.rank, processes.size)
        rollouts.append(aligner.collect(groups[mine], step))
        given = {name: _scores(world.scores(name, step, run.method.group_size)[mine]) for name in run.rewards}
        log.append(aligner.update(rollouts[-1], given, run.trained(step)))
    return Outcome(policy.lora.state(), log, rollouts)


def _scores(values_PS: Tensor) -> Scores:
    values_B = values_PS.flatten()
    return Scores(values_B, tuple("broken" if x != x else None for x in values_B.tolist()))


class Threads:
    """A world of threads of this process: each leaves its value, waits, and reads all."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.left: list[object] = [None] * size


@dataclass(frozen=True)
class ThreadPeer:
    """One of them."""

    threads: Threads
    rank: int

    @property
    def size(self) -> int:
        return len(self.threads.left)

    def gather(self, value):
        self.threads.left[self.rank] = value
        self.threads.barrier.wait(60)
        values = list(self.threads.left)
        self.threads.barrier.wait(60)
        return values

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self.gather(values)).sum(dim=0)


def train_in_two(run: Callable[[], Run]) -> list[Outcome]:
    """The outcome of each of two processes; `run` is called in each, since methods keep what they learned."""
    threads = Threads(2)

    def play(rank: int) -> Outcome:
        with ExitStack() as on_failure:
            on_failure.callback(threads.barrier.abort)  # or the other would wait
            outcome = train(run(), ThreadPeer(threads, rank))
            on_failure.pop_all()
        return outcome

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(play, rank) for rank in range(2)]
    causes = [future.exception() for future in futures]
    for cause in causes:
        if cause is not None and not isinstance(cause, threading.BrokenBarrierError):
            raise cause
    return [future.result() for future in futures]
