"""Real processes: two gloo ones under `torchrun` or `accelerate launch` end as one; a killed run as one never killed.

Where no GPU is, `accelerate launch` starts the processes that it is told of with --multi_gpu, and one without.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pixrl import cli
from pixrl.runs.folder import METRICS, RunFolder
from pixrl.runs.reading import START, sample_scores, samples_of
from tests.align.launching import Launch, free_port
from tests.align.parts import E2PO, GRPO, final, recipe, same, with_reward
from tests.tolerance import GRADIENT, PICTURE, agree_after_adam, rounding

ROOT = Path(__file__).parents[2]


def torchrun(port: str) -> list[str]:
    return [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1",
        "--nproc-per-node",
        "2",
        "--master-port",
        port,
        "-m",
    ]


def accelerate(port: str) -> list[str]:
    """--multi_gpu asks for several processes: gloo ones where no GPU is."""
    machine = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    several = ["--multi_gpu", "--num_processes", "2", "--main_process_port", port]
    return ["-m", "accelerate.commands.launch", *several, *machine, "-m"]


Launcher = Callable[[str], list[str]]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def write_recipe(folder: Path, settings: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"kind": "align", **settings}))
    return file


EPS = 1e-2
"""Of Adam in these tests: with its own 1e-8 an element whose gradient is rounding alone steps by lr, up or down."""


def trained(run: Path) -> dict[str, Tensor]:
    """The last checkpoint's slots and optimizer; what an exploration learned is a cache of the process that writes."""
    return {name: x for name, x in final(run).items() if not name.startswith("exploration/")}


def assert_trained_alike(one: Path, other: Path) -> None:
    """But for rounding, two runs ended with the same weights and the same moments (gradients, of any size).

    LoRA's up projections begin at zero: how far they are from it says how far the weights moved.
    """
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    slots = [{name: x for name, x in end.items() if name.startswith("slots/")} for end in (first, second)]
    start = {name: torch.zeros_like(x) if "lora_B" in name else x for name, x in slots[0].items()}
    assert agree_after_adam(*slots, start, GRADIENT)
    for name in first.keys() - start.keys():
        x, y = {name: first[name]}, {name: second[name]}
        nothing = {name: torch.zeros_like(first[name])}
        assert torch.equal(first[name], second[name]) or agree_after_adam(x, y, nothing, GRADIENT), name


def processes_of(run: Path) -> int:
    """How many processes a run was shared out to, as its start says."""
    notes = json.loads((run / START).read_text())["notes"]
    (found,) = [re.search(r"over (\d+) process", note) for note in notes if "process(es)" in note]
    assert found is not None
    return int(found[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "launcher"),
    [({}, torchrun), (GRPO | E2PO, accelerate)],
    ids=["nft-torchrun", "e2po-grpo-accelerate"],
)
def test_two_processes_end_as_one(
    tmp_path: Path,
    sd3_folder: Path,
    prompt_file: Path,
    launch: Launch,
    method: dict[str, Any],
    launcher: Launcher,
) -> None:
    settings = recipe(sd3_folder, prompt_file, **method)
    settings["prompts"]["per_step"] = 3  # shared out as 1 and 2
    settings["optimizer"] = {"lr": 1e-3, "updates": 2, "eps": EPS}
    file = write_recipe(tmp_path, settings)
    one, two = tmp_path / "1", tmp_path / "2"
    assert launch(1, "align", str(file), "--out", str(one)) == [0]
    words = [sys.executable, *launcher(str(free_port())), "pixrl", "align", str(file), "--out", str(two)]
    subprocess.run(words, env=environment(), check=True, timeout=900)
    assert [processes_of(run) for run in (one, two)] == [1, 2]
    assert_trained_alike(one, two)
    level = 1 / 255 + rounding(torch.float32, PICTURE)  # rounding, and what 8 bits make of it
    manifests = [RunFolder.open(run).manifest() for run in (one, two)]
    for first, second in zip(*manifests, strict=True):
        assert (first.index, first.prompt, first.seed, first.variant) == (
            second.index, second.prompt, second.seed, second.variant,
        )  # fmt: skip
        assert first.scores["python"] == pytest.approx(second.scores["python"], abs=level)
        assert (two / str(second.file)).is_file()
    metrics = [RunFolder.open(run).metrics() for run in (one, two)]
    assert metrics[0][0]["reward/python/mean"] == pytest.approx(
        metrics[1][0]["reward/python/mean"], abs=level
    )
    assert metrics[0][0]["grad_norm"] == pytest.approx(metrics[1][0]["grad_norm"], rel=1e-2)
    assert metrics[1][0]["gradient_disagreement"] < 1e-6
    for step in (0, 3):
        folders = [RunFolder.open(run) for run in (one, two)]
        assert all(len(list(samples_of(folder, step).glob("*.png"))) == 4 for folder in folders)
        known = [sample_scores(folder, step)["python"] for folder in folders]
        assert known[0] == pytest.approx(known[1], abs=level) and len(set(known[0])) == 4


@pytest.mark.slow
def test_pictures_are_the_same_bit_for_bit_on_any_number_of_processes(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch
) -> None:
    """A group at a time, so that no process computes with another batch; shared out as 3, 1 and 2, and 1, 1 and 1."""
    settings = recipe(sd3_folder, prompt_file, steps=1)
    settings["prompts"]["per_step"] = 3
    settings["machine"]["rollout_batch"] = 3
    file = str(write_recipe(tmp_path, settings))
    runs = [tmp_path / str(processes) for processes in (1, 2, 3)]
    for processes, run in enumerate(runs, 1):
        assert launch(processes, "align", file, "--out", str(run)) == [0] * processes
        assert processes_of(run) == processes
    rows = [RunFolder.open(run).manifest() for run in runs]
    assert len(rows[0]) == 9
    for same_row in zip(*rows, strict=True):
        pictures = [(run / str(row.file)).read_bytes() for run, row in zip(runs, same_row, strict=True)]
        assert pictures[0] == pictures[1] == pictures[2]


@pytest.mark.slow
def test_more_processes_than_prompts(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch
) -> None:
    settings = recipe(sd3_folder, prompt_file, steps=1)
    settings["prompts"]["per_step"] = 1
    file = write_recipe(tmp_path, settings)
    assert launch(2, "align", str(file), "--out", str(tmp_path / "run")) == [0, 0]
    assert processes_of(tmp_path / "run") == 2
    assert len(RunFolder.open(tmp_path / "run").manifest()) == 3


@pytest.mark.slow
def test_failed_scores_of_one_process_are_a_share_of_all(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch
) -> None:
    """All of the first process's pictures fail, a third of the step's: no reason to stop."""
    settings = recipe(sd3_folder, prompt_file, **with_reward("fails_on_the_first_process"), steps=1)
    settings["prompts"]["per_step"] = 3  # shared out as 1 and 2
    file = write_recipe(tmp_path, settings)
    assert launch(2, "align", str(file), "--out", str(tmp_path / "run")) == [0, 0]
    (row,) = RunFolder.open(tmp_path / "run").metrics()
    assert processes_of(tmp_path / "run") == 2
    assert row["failed_share"] == pytest.approx(1 / 3)


KILLS = 10
STEPS = 24
"""Enough that ten pieces of a run are not the whole of it."""


@pytest.fixture
def fork() -> Iterator[Callable[..., BaseProcess]]:
    """Runs a pixrl command in a process of its own, forked from one that has imported everything; all end with it."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pixrl.jobs.align", "diffusers", "transformers", "peft"])
    begun: list[BaseProcess] = []

    def begin(*words: str) -> BaseProcess:
        process = server.Process(target=_play, args=(words,))
        process.start()
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.join(60)


def _play(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cli.app(list(words), standalone_mode=False)


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_resumed_ends_as_never_killed(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, fork: Callable[..., BaseProcess]
) -> None:
    """SIGKILL while it loads, or some way into one of its next two steps, however fast the machine is today."""
    settings = recipe(sd3_folder, prompt_file, **E2PO, steps=STEPS)
    file = write_recipe(tmp_path, settings)
    whole, run = tmp_path / "whole", tmp_path / "run"
    fork("--help").join(600)  # the server has imported everything now
    begun = time.monotonic()
    unbroken = fork("align", str(file), "--out", str(whole))
    _wait_for_lines(whole / METRICS, 1, unbroken)
    until_first = time.monotonic() - begun
    unbroken.join(900)
    a_step = (time.monotonic() - begun - until_first) / (STEPS - 1)
    assert unbroken.exitcode == 0
    drawer = random.Random(0)
    places = []
    for _ in range(KILLS):
        process = fork(*_begin_or_resume(file, run))
        further = drawer.choice((0, 1, 1, 2))
        if further:
            _wait_for_lines(run / METRICS, _lines(run / METRICS) + further, process)
        time.sleep(drawer.uniform(0, a_step if further else 0.9 * until_first))
        assert process.is_alive(), "it ended before it could be killed"
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        places.append(_lines(run / METRICS))
    assert len(set(places)) > 2, f"it was killed at the same step every time: {places}"
    last = fork(*_begin_or_resume(file, run))
    last.join(900)
    assert last.exitcode == 0
    assert same(final(whole), final(run))
    rows = [[row.model_dump() for row in RunFolder.open(one).manifest()] for one in (whole, run)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in RunFolder.open(run).metrics()] == list(range(STEPS))


def _begin_or_resume(file: Path, run: Path) -> list[str]:
    """What a person types after a kill: a folder that exists is gone on with."""
    if run.exists():
        return ["resume", str(run)]
    return ["align", str(file), "--out", str(run)]


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _wait_for_lines(file: Path, count: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + 600
    while _lines(file) < count:
        assert process.is_alive() and time.monotonic() < deadline, "it ended before its first line"
        time.sleep(0.01)
