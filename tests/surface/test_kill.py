"""A real process, really stopped: Ctrl-C and kill -9 in the middle of a run, then `pixrl resume`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixrl import cli
from pixrl.jobs import fuse as fuse_job
from pixrl.runs.folder import MANIFEST
from tests.fuse.world import fake_world

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pixrl import cli
from pixrl.jobs import fuse as fuse_job
from tests.fuse.world import FakeRenderer, fake_world
paint = FakeRenderer.sample
FakeRenderer.sample = lambda *given: (time.sleep({pause}), paint(*given))[1]
fuse_job.load_world = lambda *given: fake_world()
cli.main()
"""
FUSE = ["fuse", "owl", "snail", "--budget", "64", "--set", "batch=4", "--out"]


def pixrl(folder: Path, words: list[str], pause: float = 0.0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM.format(pause=pause), *words]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The manifest of a run that nobody stopped."""
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: fake_world())
    run = tmp_path / "whole"
    assert CliRunner().invoke(cli.app, [*FUSE, str(run)]).exit_code == 0
    return (run / MANIFEST).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_resumed_is_as_never_stopped(tmp_path: Path, how: signal.Signals, whole: bytes) -> None:
    process = pixrl(tmp_path, [*FUSE, "run"], pause=0.05)
    manifest = tmp_path / "run" / MANIFEST
    deadline = time.monotonic() + 120
    while not (manifest.is_file() and manifest.read_bytes().count(b"\n") >= 8):
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it could be stopped"
        )
        time.sleep(0.01)
    process.send_signal(how)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == (130 if how is signal.SIGINT else -how)
    assert how is signal.SIGKILL or "pixrl resume run" in printed
    assert how is signal.SIGKILL or "Saved up to step " in printed
    assert manifest.read_bytes() != whole
    assert pixrl(tmp_path, ["resume", "run"]).wait(120) == 0
    assert manifest.read_bytes() == whole
