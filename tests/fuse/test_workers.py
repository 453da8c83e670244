"""Runs that are spread over processes, or over a real Ray cluster of two nodes."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pixrl import api
from pixrl.errors import InputError, RunError
from pixrl.fusion.config import FuseConfig
from pixrl.runs.place import has_saved
from pixrl.runs.process import process_of
from pixrl.workers import LOSSES, Workers, connect, share_of
from studies.grid import Kind, Record, Study, Task, run_grid

PAIRS = ["owl & snail", "frog & car"]


def config() -> FuseConfig:
    return FuseConfig(model="toy:sd3", budget=16, batch=8, exemplars=1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs, one after the other in this process."""
    return api.run_pairs(config(), PAIRS, tmp_path_factory.mktemp("alone") / "run", live=False)


def same_runs(one: Path, other: Path) -> bool:
    files = ("rollouts/manifest.jsonl", "selection.json", "world.json")
    runs = sorted(path.name for path in (one / "runs").iterdir())
    assert len(runs) == len(PAIRS) and runs == sorted(path.name for path in (other / "runs").iterdir())
    return all((one / "runs" / run / file).read_bytes() == (other / "runs" / run / file).read_bytes()
               for run in runs for file in files)  # fmt: skip


def squared(number: int) -> int:
    return number**2


def killed_once(place: tuple[Path, int]) -> int:
    """Save a number, die by a signal at the first attempt, and go on from what was saved at the second."""
    file = place[0] / f"{place[1]}.txt"
    if not file.is_file():
        file.write_text(str(place[1] + 100))
        os.kill(os.getpid(), signal.SIGKILL)
    return int(file.read_text())


def always_killed(folder: Path) -> None:
    with (folder / "tries.txt").open("a") as file:
        file.write(".")
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int) -> int:
    if number == 1:
        raise RunError("The disk is full.")
    return number


def test_processes_make_the_same_runs(alone: Path, tmp_path: Path) -> None:
    spread = api.run_pairs(config(), PAIRS, tmp_path / "run", live=False, workers=Workers(2))
    assert same_runs(alone, spread)
    numbers = [1, -2, -3]  # abs, which a new process has without importing this file
    assert sorted(Workers(2).each(abs, numbers)) == list(Workers().each(abs, numbers)) == [1, 2, 3]


class Squares(Study):
    """A study whose cells are numbers to be squared."""

    kind = "squares"
    numbers: tuple[int, ...] = (1, 2, 3)

    def tasks(self) -> Iterator[Task]:
        yield from ((number,) for number in self.numbers)

    def check(self) -> None: ...


def square_cell(study: Squares, task: Task, out: Path) -> Record:
    return {"number": task[0], "square": squared(task[0])}


@dataclass(frozen=True)
class Nodes:
    """A cluster of two nodes with a CPU each, of which one can be taken away."""

    address: str
    second: Any
    """ray's own object, with the processes of the node."""
    lose_second: Callable[[], None]

    def run_on_second(self, out: Path) -> Path | None:
        """Return the run that the second node is in the middle of, once a step of it is saved."""
        raylet = self.second.all_processes["raylet"][0].process.pid
        for run in out.glob("runs/*"):
            process = process_of(run)
            if process is not None and has_saved(run) and psutil.Process(process.pid).ppid() == raylet:
                return run
        return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Ray's workers are of low priority, and would wait for other tests
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_worker_niceness", "0")
    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args=size)
    second = made.add_node(**size)
    yield Nodes(made.address, second, lambda: made.remove_node(second, allow_graceful=False))
    ray.shutdown()
    made.shutdown()
    monkeypatch.undo()


def test_a_killed_worker_is_replaced_and_its_work_goes_on(cluster: Nodes, tmp_path: Path) -> None:
    workers = Workers(ray=cluster.address, cpus=0.5)
    assert sorted(workers.each(killed_once, [(tmp_path, number) for number in range(3)])) == [100, 101, 102]
    with pytest.raises(RunError, match=f"was lost {LOSSES + 1} times"):
        list(workers.each(always_killed, [tmp_path]))
    assert len((tmp_path / "tries.txt").read_text()) == LOSSES + 1


def test_what_a_worker_raises_is_raised_here(cluster: Nodes) -> None:
    with pytest.raises(RunError, match=r"^The disk is full\.$"):
        list(Workers(ray=cluster.address).each(failing, [0, 1]))


def test_a_share_that_no_node_has_is_refused(cluster: Nodes) -> None:
    with pytest.raises(RunError, match=r"has 4 CPUs and 0 GPUs\. The nodes have 1 CPUs"):
        list(Workers(ray=cluster.address, cpus=4).each(squared, [1]))


def test_a_node_that_has_left_has_no_room() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    ray: Any = SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: {"CPU": 8.0, "GPU": 1.0})
    assert share_of(ray, 8, 0.25) == {"num_cpus": 8, "num_gpus": 0.25}
    assert share_of(ray, 1, None) == {"num_cpus": 1, "num_gpus": 1}
    with pytest.raises(RunError, match="9 CPUs"):
        share_of(ray, 9, 0)


def test_a_study_has_the_same_records(cluster: Nodes, tmp_path: Path) -> None:
    kind = Kind(Squares, ("number",), square_cell, lambda *given: None, lambda *given: "")
    here = run_grid(kind, Squares(), tmp_path / "here", quiet=True)
    there = run_grid(kind, Squares(), tmp_path / "there", workers=Workers(ray=cluster.address), quiet=True)
    assert sorted(there, key=lambda row: row["number"]) == here


def test_the_run_of_a_lost_node_is_finished_on_another(cluster: Nodes, alone: Path, tmp_path: Path) -> None:
    """The last test of the cluster, which it leaves with one node."""
    out, lost = tmp_path / "run", list[Path]()

    def lose() -> None:
        while not lost:
            lost.extend(filter(None, [cluster.run_on_second(out)]))
            time.sleep(0.01)
        cluster.lose_second()

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    api.run_pairs(config(), PAIRS, out, live=False, workers=Workers(ray=cluster.address))
    thread.join()  # it was in the middle of a run
    assert same_runs(alone, out)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"processes": 2, "ray": "local"}, "give one of them"),
        ({"cpus": 0.5}, "add --ray local"),
        ({"gpus": 1.0}, "add --ray local"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Workers(**given)


@pytest.mark.parametrize(
    "address", ["nowhere", "host:", ":6379", "host:port", "host:99999", "ray://host:10001"]
)
def test_what_is_no_address(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="no address of a Ray cluster"):
        connect(address)


def test_an_address_that_does_not_answer() -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RunError, match=f"Nobody answers at the Ray address {address}"):
            connect(address)


def test_a_policy_that_is_carried_over_needs_one_worker(tmp_path: Path) -> None:
    conditional = config().model_copy(update={"options": {"policy": "conditional"}})
    with pytest.raises(InputError, match="leave out --workers and --ray"):
        api.run_pairs(conditional, PAIRS, tmp_path / "run", carry=True, workers=Workers(2))
    assert not (tmp_path / "run").exists()
