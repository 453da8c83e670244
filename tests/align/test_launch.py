"""`--processes N`: who speaks, whose exit code it is, and that nobody is left; and a run of two that it starts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from pixrl import cli
from pixrl.algorithms import world
from pixrl.algorithms.world import Team
from pixrl.cli import launch
from pixrl.errors import InputError
from tests.align.parts import recipe
from tests.align.test_processes import ROOT, environment, processes_of, write_recipe

Capture = pytest.CaptureFixture[str]
WAIT = "for _ in $(seq 300); do sleep 0.1; done; touch waited"
"""What a process does that waits for the others without end: half a minute here."""


@pytest.fixture
def acting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a script stands in Python's place: it writes down its place and does what its rank is told."""
    script = tmp_path / "acting"
    script.write_text(
        "#!/bin/sh\n"
        f"cd {tmp_path}; echo $$ > pid-$RANK\n"
        'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" > place-$RANK\n'
        ". ./rank-$RANK\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(script))
    return tmp_path


def run(acting: Path, *acts: str) -> int:
    for rank, act in enumerate(acts):
        (acting / f"rank-{rank}").write_text(act + "\n")
    return launch.run(["align", "mine.yaml"], len(acts))


def are_gone(acting: Path) -> bool:
    return not any(psutil.pid_exists(int(file.read_text())) for file in acting.glob("pid-*"))


def test_each_process_knows_its_place(acting: Path) -> None:
    assert run(acting, "true", "true", "true") == 0
    places = [(acting / f"place-{rank}").read_text().split() for rank in range(3)]
    ports = {place.pop(4) for place in places}
    assert len(ports) == 1 and ports.pop().startswith("127.0.0.1:")
    assert places == [
        [str(rank), str(rank), "3", "3", "-m", "pixrl", "align", "mine.yaml"] for rank in range(3)
    ]


@pytest.mark.parametrize(
    ("acts", "code", "said"),
    [
        (("echo fine >&2", "echo also fine >&2"), 0, "fine\n"),
        (("echo wrong >&2; exit 2", "echo wrong >&2; exit 2"), 2, "wrong\n"),
        (("sleep 0.3; echo wrong >&2; exit 2", "echo wrong >&2; exit 2"), 2, "wrong\n"),
        ((WAIT, "echo mine alone >&2; exit 3"), 3, "mine alone\n"),
        (("echo first >&2; exit 1", WAIT), 1, "first\n"),
        (("kill -9 $$", WAIT), 137, ""),
        (("echo stopped >&2; exit 130", "exit 130"), 130, "stopped\n"),
    ],
)
def test_one_speaks_and_nobody_is_left(
    acting: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, acts: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.setattr(launch, "GRACE", 1.0)
    assert run(acting, *acts) == code
    assert capfd.readouterr().err == said
    assert are_gone(acting) and not (acting / "waited").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_all_and_the_exit_code_is_theirs(acting: Path, number: int, code: int) -> None:
    """Ctrl-C is sent to all processes of the terminal at once, another signal to the one that was started."""
    for rank in range(2):
        (acting / f"rank-{rank}").write_text(
            f"trap 'exit {code}' INT TERM; touch here-{rank}; while :; do sleep 0.1; done\n"
        )
    program = (
        "import signal, sys; from pixrl.cli import launch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are told to ignore it\n"
        f"sys.executable = {launch.sys.executable!r}; sys.exit(launch.run(['align'], 2))"
    )
    python = Path(sys.prefix) / "bin" / "python"
    parent = subprocess.Popen([python, "-c", program], env=environment(), start_new_session=True)
    try:
        while len(list(acting.glob("here-*"))) < 2:
            assert parent.poll() is None
            time.sleep(0.05)
        (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
        assert parent.wait(60) == code
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert are_gone(acting)


def test_another_launchers_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = CliRunner().invoke(
        cli.app, ["align", "toy/e2po", "--processes", "2", "--out", str(tmp_path / "run")]
    )
    assert done.exit_code == 2 and "a launcher has started 3 already" in done.output
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes .* this machine has 1\. Start fewer"):
        Team("auto")


@pytest.mark.slow
def test_a_run_of_two_processes_speaks_once(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    file, run = write_recipe(tmp_path, recipe(sd3_folder, prompt_file, steps=1)), tmp_path / "run"
    words = [sys.executable, "-m", "pixrl", "align", str(file), "--out", str(run), "--processes", "2"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert processes_of(run) == 2
    assert done.stderr.count("evaluation at 0") == 1 and done.stdout.count("Report:") == 1
