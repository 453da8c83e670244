"""A run's folder knows its process; a stop is asked of that process alone, and ends the run as Ctrl-C does."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pixrl.errors import RunError
from pixrl.runs import process
from pixrl.runs.display import Silent
from pixrl.runs.loop import Loop, Pace
from pixrl.runs.place import PROCESS, STOP
from pixrl.runs.process import RunProcess, ask_to_stop, attending, is_stopping, process_of


class Counting:
    """An algorithm that draws nothing, a record that keeps steps in memory."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.saved: list[int] = []

    def images(self, step: int) -> int:
        return 1

    def collect(self, step: int, clock: object) -> int:
        return step

    def score(self, rollouts: int, clock: object) -> int:
        return rollouts

    def update(self, rollouts: int, scores: int, clock: object) -> dict[str, float]:
        return {}

    def tensors(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: object, state: object) -> None: ...
    def step(self, rollouts: int, scores: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(rollouts)

    def save(self, step: int, tensors: object, state: object) -> None:
        self.saved.append(step)

    def wait(self) -> None: ...
    def close(self) -> None: ...


class AsksAt(Silent):
    """Asks the run to stop in the middle of a step."""

    def __init__(self, run: Path, step: int) -> None:
        self.run, self.at = run, step
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, images: int, metrics: Mapping[str, float]) -> None:
        self.at -= 1
        if self.at == 0:
            ask_to_stop(self.run)
            assert is_stopping(self.run)


def play(run: Path, ask_at: int) -> tuple[Counting, AsksAt]:
    parts, monitor = Counting(), AsksAt(run, ask_at)
    loop = Loop(algorithm=parts, record=parts, monitor=monitor, pace=Pace(5, save_every=4), kept={})
    loop.run(run, 0, 0)
    return parts, monitor


def test_a_stop_ends_the_run_after_the_step_in_hand_which_is_saved(tmp_path: Path) -> None:
    parts, monitor = Counting(), AsksAt(tmp_path, 2)
    loop = Loop(algorithm=parts, record=parts, monitor=monitor, pace=Pace(5, save_every=4), kept={})
    with pytest.raises(KeyboardInterrupt):
        loop.run(tmp_path, 0, 0)
    assert (parts.steps, parts.saved) == ([0, 1], [2])
    assert any("asked this run to stop" in text for text in monitor.said)
    assert not list(tmp_path.iterdir())  # who resumes it is not stopped by what was asked before


def test_what_was_asked_of_an_earlier_process_stops_nobody(tmp_path: Path) -> None:
    own = RunProcess.own()
    (tmp_path / STOP).write_text(json.dumps(asdict(replace(own, started=own.started - 60))))
    parts, _ = play(tmp_path, -1)
    assert parts.steps == [0, 1, 2, 3, 4] and parts.saved == [4, 5]


def test_a_process_is_known_while_it_trains_and_forgotten_after_it(tmp_path: Path) -> None:
    assert process_of(tmp_path) is None
    with attending(tmp_path) as attendance:
        assert process_of(tmp_path) == RunProcess.own() == attendance.own
        assert not is_stopping(tmp_path) and not attendance.stop_is_wanted()
        assert ask_to_stop(tmp_path) == RunProcess.own()
        assert is_stopping(tmp_path) and attendance.stop_is_wanted()
    assert process_of(tmp_path) is None
    with pytest.raises(RunError, match="No process trains"):
        ask_to_stop(tmp_path)


def test_a_run_that_another_process_took_over_keeps_its_name(tmp_path: Path) -> None:
    other = RunProcess("elsewhere", 7, 1.0)
    with attending(tmp_path):
        (tmp_path / PROCESS).write_text(json.dumps(asdict(other)))
    assert process_of(tmp_path) == other  # of another machine, which cannot be asked whether it lives
    assert not other.is_here


@pytest.mark.parametrize("moved", [-3600.0, -2 * process.CLOCK, 2 * process.CLOCK])
def test_a_stranger_with_the_same_pid_is_not_the_runs_process(tmp_path: Path, moved: float) -> None:
    own = RunProcess.own()
    (tmp_path / PROCESS).write_text(json.dumps(asdict(replace(own, started=own.started + moved))))
    assert process_of(tmp_path) is None
    with pytest.raises(RunError):
        ask_to_stop(tmp_path)
    assert not (tmp_path / STOP).exists()


def test_a_killed_process_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pixrl.runs.process import attending\n"
        "with attending(Path(sys.argv[1])): print('ready', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    found = process_of(tmp_path)
    assert found is not None and found.pid == child.pid
    child.kill()
    while child.poll() is None and process_of(tmp_path) is not None:
        time.sleep(0.01)
    assert process_of(tmp_path) is None and (tmp_path / PROCESS).exists()
    child.communicate()
    assert process_of(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"host": "x"}', '{"host": "x", "pid": "y", "started": 1}']
)
def test_a_damaged_file_names_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / PROCESS).write_text(content)
    assert process_of(tmp_path) is None
