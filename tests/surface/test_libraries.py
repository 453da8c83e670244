"""A library that is missing, or a torchvision that breaks the others, gives one sentence that says what to type."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pixrl.errors import RunError
from pixrl.libraries import check_torchvision, require

ROOT = Path(__file__).parents[2]

CALLS = """
import torch
from pixrl import rewards
from pixrl.errors import RunError
from pixrl.hub import fetch_pipeline
from pixrl.models.slots import LoraSlots

def slots():
    LoraSlots(torch.nn.Linear(2, 2), rank=1, alpha=1.0, targets=("x",), seed=0)

for call in (lambda: rewards.load("clip_text", model="toy:clip"), lambda: fetch_pipeline("owner/name"), slots):
    try:
        call()
    except RunError as error:
        print("said:", error)
try:
    from transformers import CLIPModel
except Exception as error:
    print("misled:", error)
"""


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> Path:
    """A folder for sys.path: torchvision's metadata, and a package that fails as a CUDA wheel does on a CPU torch."""
    package, metadata = tmp_path / "torchvision", tmp_path / "torchvision-0.28.0.dist-info"
    package.mkdir(), metadata.mkdir()
    (package / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist\\nand more")'
    )
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    return tmp_path


def test_a_torchvision_for_another_torch(broken_torchvision: Path) -> None:
    path = os.pathsep.join([str(broken_torchvision), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    lines = done.stdout.splitlines()
    said = [line for line in lines if line.startswith("said:")]
    assert len(said) == 3, done.stdout
    for line in said:
        assert line.startswith("said: torchvision 0.28.0 does not match torch 2.")
        assert "(operator torchvision::nms does not exist)" in line
        assert "pip uninstall torchvision" in line
    # without the check, what one is told does not name torchvision: the trap is real
    (misled,) = (line for line in lines if line.startswith("misled:"))
    assert "CLIPModel" in misled and "torchvision" not in misled


@pytest.mark.parametrize("command", [["verify", "clip"], ["build", "--stage", "clip"]])
def test_the_toy_world_says_so_too(broken_torchvision: Path, command: list[str]) -> None:
    path = os.pathsep.join([str(broken_torchvision), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-m", "pixrl", "toy", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 1
    assert "torchvision 0.28.0 does not match torch 2." in done.stderr
    assert "Traceback" not in done.stderr


def test_without_torchvision_there_is_nothing_to_say() -> None:
    check_torchvision()


def test_a_missing_library_names_its_extra() -> None:
    with pytest.raises(RunError, match=r"^This needs no_such_library, .*pip install 'pixrl\[compbench\]'$"):
        require("no_such_library", "compbench", "This")
    assert require("json", "compbench", "This").dumps([]) == "[]"


def test_every_extra_that_a_message_names_exists() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    calls = [
        line.strip()
        for path in (ROOT / "src").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith(('require("', 'spacy = require("'))
    ]
    assert calls
    for call in calls:
        assert call.split('"')[3] in extras, call
