"""Small studies: three systems that draw each prompt in their own shade."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from pixrl.human_study.make import make, parse_systems
from pixrl.human_study.study import Folder, StudySettings, parse_criteria

PROMPTS = ("an owl", "a snail", "a red cat", "a cactus", "two dogs")
SYSTEMS = ("ours-secret", "base-secret", "closed-secret")
Make = Callable[..., Folder]


def write_system(folder: Path, shade: int, prompts: tuple[str, ...] = PROMPTS, side: int = 40) -> Path:
    folder.mkdir(parents=True)
    for number, prompt in enumerate(prompts):
        picture = Image.linear_gradient("L").resize((side, side)).convert("RGB")
        picture.putpixel((0, 0), (shade, number, 0))
        picture.save(folder / f"{folder.name}-{number}.png")
        (folder / f"{folder.name}-{number}.txt").write_text(f"{prompt}\n", encoding="utf-8")
    return folder


@pytest.fixture
def systems(tmp_path: Path) -> list[str]:
    return [str(write_system(tmp_path / name, 60 * n)) for n, name in enumerate(SYSTEMS)]


@pytest.fixture
def made(tmp_path: Path, systems: list[str]) -> Make:
    def study(
        criteria: tuple[str, ...] = ("rmler",), people: int = 3, count: int = 3, **settings: object
    ) -> Folder:
        preset = parse_criteria(criteria)
        values = {"criteria": preset.criteria, "ties": preset.ties, **settings}
        asked = StudySettings.model_validate(values)
        return make(parse_systems(systems[:count]), asked, tmp_path / "study", participants=people)

    return study


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(study: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    """`pixrl human-study serve` as a process of its own, once it answers."""
    command = [sys.executable, "-m", "pixrl", "human-study", "serve", str(study), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        assert process.stdout is not None
        while not re.search(r"Serving at http://127\.0\.0\.1:\d+", said):
            line = process.stdout.readline()
            assert line, said
            said += line
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()
