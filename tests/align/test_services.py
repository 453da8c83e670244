"""A reward server that dies in the middle of an epoch: a real process, really killed, under a real run."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import pixrl
from pixrl.errors import ServiceError
from pixrl.jobs import align as align_job
from pixrl.runs.folder import RunFolder
from tests.align.parts import JUDGE, final, recipe, same
from tests.rewards.services import TOKEN, Process, free_port

FUNCTION = """
import os, signal
from pathlib import Path
from PIL import ImageStat
import numpy as np

CALLS, DIE_AT = (Path(__file__).with_name(name) for name in ("calls", "die_at"))

def brightness(images, prompts, metadata):
    number = int(CALLS.read_text()) if CALLS.is_file() else 0
    if DIE_AT.is_file() and prompts != ["a photo"]:
        CALLS.write_text(str(number + 1))
        if number == int(DIE_AT.read_text()):
            DIE_AT.unlink()
            CALLS.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    return [float(np.asarray(image).mean()) / 255 for image in images]
"""
MIDDLE = "8"
"""Of the requests of two pictures: two to try the reward out, two for the evaluation before, three for step
0, the second one of step 1."""


class Mortal:
    """A reward server that dies in the middle of step 1, once armed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mine.py").write_text(FUNCTION)
        self.process = Process(folder, f"{folder / 'mine.py'}:brightness", free_port())
        self.process.start()

    def arm(self) -> None:
        (self.folder / "die_at").write_text(MIDDLE)

    def rise_again(self) -> None:
        self.process.wait()
        self.process.start()


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortal]:
    found = Mortal(tmp_path_factory.mktemp("server"))
    yield found
    found.process.kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path, prompt_file: Path) -> Path:
    """A run that nothing broke, its reward in its own process."""
    rewards = [{"name": "bright", "kind": "python", "options": {"function": f"{JUDGE}:brightness"}}]
    settings = recipe(sd3_folder, prompt_file, rewards=rewards, steps=2)
    return pixrl.align(settings, out=tmp_path_factory.mktemp("whole") / "run").run


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXRL_REWARD_TOKEN", TOKEN)


def remote(mortal: Mortal, sd3_folder: Path, prompt_file: Path, patience: float) -> dict[str, Any]:
    url = f"http://127.0.0.1:{mortal.process.port}"
    options = {"url": url, "reward": "mine", "batch": 2, "patience": patience}
    rewards = [{"name": "bright", "kind": "remote", "options": options}]
    return recipe(sd3_folder, prompt_file, rewards=rewards, steps=2)


def rows(run: Path) -> list[dict[str, Any]]:
    return [row.model_dump() for row in RunFolder.open(run).manifest()]


def the_same(one: Path, other: Path) -> None:
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = (final(one), final(other))
    assert same(*tensors)
    assert rows(one) == rows(other)


def test_the_run_waits_and_loses_nothing(
    tmp_path: Path,
    mortal: Mortal,
    whole: Path,
    sd3_folder: Path,
    prompt_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mortal.arm()
    nurse = threading.Thread(target=mortal.rise_again)
    nurse.start()
    done = pixrl.align(remote(mortal, sd3_folder, prompt_file, patience=600.0), out=tmp_path / "run")
    nurse.join()
    the_same(whole, done.run)
    assert "does not answer" in caplog.text and "is back" in caplog.text


def test_it_gives_up_and_can_be_resumed(
    tmp_path: Path, mortal: Mortal, whole: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    mortal.arm()
    run = tmp_path / "run"
    with pytest.raises(ServiceError, match=rf"stayed away for .* type: pixrl resume {run}") as error:
        pixrl.align(remote(mortal, sd3_folder, prompt_file, patience=0.3), out=run)
    assert error.value.exit_code == 1
    assert [row["step"] for row in RunFolder.open(run).metrics()] == [0]
    mortal.rise_again()
    the_same(whole, align_job.go_on(run))
