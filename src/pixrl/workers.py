"""Independent pieces of work, one after another here, in several processes, or on a Ray cluster.

What is spread are whole runs: the pairs of `pixrl fuse --pairs`, the cells of `pixrl study`. Each writes into a folder
of its own and goes on from its last checkpoint, so that a run whose worker is lost continues elsewhere.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pixrl.errors import InputError, RunError
from pixrl.libraries import require

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
LOCAL, AUTO = "local", "auto"
"""The Ray addresses of a cluster of this machine alone, and of the one that this machine belongs to."""
LOSSES = 3
"""The number of times that a piece of work is begun again after its worker was lost."""
ANSWER = 5.0
"""Seconds in which a Ray address must answer."""


@dataclass(frozen=True)
class Workers:
    """Where pieces of work are done.

    Args:
        processes: how many processes of this machine, one thread each; 1: this very process.
        ray: a Ray cluster instead: local, auto, or host:port. Its nodes share this machine's files and installation.
        cpus: CPUs, and so threads, of a piece of work on the cluster; may be a fraction.
        gpus: GPUs of a piece of work; None: 1 where the cluster has any.

    Raises:
        InputError: both processes and a cluster are asked for, or shares of a cluster without one.
    """

    processes: int = 1
    ray: str | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.ray is not None and self.processes > 1:
            raise InputError(
                "--workers are processes of this machine and --ray is a cluster: give one of them."
            )
        if self.ray is None and (self.cpus != 1 or self.gpus is not None):
            raise InputError(
                "--cpus and --gpus are a run's share of a Ray cluster: add --ray local, or its host:port."
            )

    @property
    def are_others(self) -> bool:
        """Whether the work is done outside of this process."""
        return self.ray is not None or self.processes > 1

    def each(self, work: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> Iterator[ResultT]:
        """Do the work of every task and yield the results as they come; in order where this process does it.

        Args:
            work: a function of a module, or a `functools.partial` of one, so that others can import it.
            tasks: what it is called with.

        Raises:
            RunError: the cluster does not answer or has no node that is large enough, Ray is not installed, or a task's
                worker was lost more than `LOSSES` times.
            Exception: whatever the work raises.
        """
        if self.ray is not None:
            ray = connect(self.ray)
            share = share_of(ray, self.cpus, self.gpus)
            remote, here = ray.remote(_act).options(max_retries=LOSSES, **share), Place.own(self.cpus)
            waiting = {remote.remote(here, [ray.put(partial(work, task))]): task for task in tasks}
            try:
                while waiting:
                    (done,), _ = ray.wait(list(waiting), num_returns=1)
                    task = waiting.pop(done)
                    try:
                        yield ray.get(done)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause from error
                    except ray.exceptions.RayError as error:
                        raise RunError(
                            f"The worker of {task} was lost {LOSSES + 1} times ({type(error).__name__}); what it has "
                            "saved is kept. Look at its memory (ray list workers), then type the same command again, "
                            "which goes on."
                        ) from error
            finally:
                for left in waiting:
                    ray.cancel(left, force=True)
        elif self.processes > 1:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                self.processes, mp_context=context, initializer=_use_threads, initargs=(1,)
            ) as pool:
                for future in as_completed([pool.submit(work, task) for task in tasks]):
                    yield future.result()
        else:
            yield from map(work, tasks)


HERE = Workers()
"""This very process."""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def connect(address: str) -> ModuleType:
    """Connect this process to a Ray cluster, unless it is already, and return the module `ray`.

    Raises:
        InputError: the address is none.
        RunError: Ray is not installed, or nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", "ray", "--ray")
    require_answer(address)
    if ray.is_initialized():
        return ray
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(
            f"No Ray cluster can be reached at {address!r} ({str(error).splitlines()[0]}). Start one with ray start "
            "--head, or take this machine alone: --ray local"
        ) from error
    return ray


def require_answer(address: str) -> None:
    """Ask a cluster's port whether anybody is there: Ray itself asks for minutes, and then ends the process.

    Raises:
        InputError: the address is none.
        RunError: nobody answers.
    """
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise InputError(
            f"{address!r} is no address of a Ray cluster. Type local, auto or host:port, such as 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except OSError as error:
        raise RunError(
            f"Nobody answers at the Ray address {address} ({error.strerror or error}). Start the cluster there with "
            "ray start --head, or take this machine alone: --ray local"
        ) from error


def share_of(ray: ModuleType, cpus: float, gpus: float | None) -> dict[str, float]:
    """Return what a piece of work takes of a cluster, as Ray's options.

    Args:
        ray: the module, connected.
        cpus: CPUs; may be a fraction.
        gpus: GPUs; None: 1 where the cluster has any.

    Raises:
        RunError: no node has as much; Ray would wait for one without end.
    """
    gpus = gpus if gpus is not None else float("GPU" in ray.cluster_resources())
    rooms = [
        (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]
    if not any(has_cpus >= cpus and has_gpus >= gpus for has_cpus, has_gpus in rooms):
        held = "; ".join(f"{has_cpus:g} CPUs and {has_gpus:g} GPUs" for has_cpus, has_gpus in rooms)
        raise RunError(
            f"No node of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs. The nodes have {held}. "
            "Take less: 1 CPU and 0 GPUs, for example."
        )
    return {"num_cpus": cpus, "num_gpus": gpus}


@dataclass(frozen=True)
class Place:
    """Where a process works: what a node of a cluster must share with it."""

    folder: str
    modules: tuple[str, ...]
    threads: int

    @staticmethod
    def own(cpus: float) -> "Place":
        """Return this process's place, with as many threads as it is given CPUs."""
        return Place(os.getcwd(), tuple(sys.path), max(1, int(cpus)))

    def take(self) -> None:
        """Make this process work there.

        Raises:
            RunError: the node does not see the folder.
        """
        if not Path(self.folder).is_dir():
            raise RunError(
                f"A node of the Ray cluster has no folder {self.folder}: all nodes must see this machine's files."
            )
        os.chdir(self.folder)
        sys.path.extend(entry for entry in self.modules if entry not in sys.path)
        _use_threads(self.threads)


def _use_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def _act(place: Place, work: Sequence[Any]) -> Any:
    """Do a piece of work on a node.

    Ray leaves a reference within a list as it is; the work is fetched here, once its modules can be imported.
    """
    import ray

    place.take()
    return ray.get(work[0])()
