"""A user's function as a reward: what it sees, and that whatever goes wrong is a failed score, never 0."""

import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pixrl import rewards
from pixrl.errors import ConfigError
from pixrl.rewards.python import PythonReward, import_function, to_pil
from pixrl.types import RewardBatch, Scores

PROMPTS = ["a", "b", "c"]


@pytest.fixture
def batch() -> RewardBatch:
    images = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(3, 3, 4, 6)
    return RewardBatch(images, PROMPTS, [{"n": n} for n in range(3)])


def score(function: Callable[..., object], batch: RewardBatch) -> Scores:
    return PythonReward(function, time_limit=60).score(batch)  # type: ignore[arg-type]


def test_it_sees_pictures_prompts_and_metadata(batch: RewardBatch) -> None:
    seen: list[object] = []

    def look(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, object]]) -> list[float]:
        seen.extend([images, prompts, metadata])
        return [0.5, 1, -2]

    scores = score(look, batch)
    assert scores.values_B.tolist() == [0.5, 1.0, -2.0]
    assert scores.reasons == (None,) * 3
    images, prompts, metadata = seen
    assert isinstance(images, list)
    assert [(one.size, one.mode, one.getpixel((5, 3))) for one in images] == [
        ((6, 4), "RGB", (level,) * 3) for level in (0, 128, 255)
    ]
    assert prompts == PROMPTS
    assert metadata == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_pil_round_trip() -> None:
    levels = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    back = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in to_pil(levels / 255)]
    assert torch.equal(torch.stack(back), levels.byte())


@pytest.mark.parametrize(
    "given", [[1, 2.5, True], (1, 2.5, True), np.array([1, 2.5, 1]), torch.tensor([1, 2.5, 1])]
)
def test_numbers_of_every_kind(given: object, batch: RewardBatch) -> None:
    assert score(lambda i, p, m: given, batch).values_B.tolist() == [1.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "the function gave None"),
        (math.nan, "the function gave nan"),
        (math.inf, "the function gave inf"),
        (-math.inf, "the function gave -inf"),
        (1e300, r"the function gave 1e\+300"),
        (10**400, "the function gave int 1000"),
        ("0.5", "the function gave '0.5', not a number"),
        ([1.0], r"the function gave \[1.0\], not a number"),
    ],
)
def test_one_bad_number_fails_its_picture_alone(given: object, reason: str, batch: RewardBatch) -> None:
    scores = score(lambda i, p, m: [1.0, given, 2.0], batch)
    assert scores.values_B[[0, 2]].tolist() == [1.0, 2.0]
    assert scores.values_B[1].isnan()
    assert scores.reasons[0] is scores.reasons[2] is None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(scores.reasons[1])


def broken(images: object, prompts: object, metadata: object) -> list[float]:
    raise ZeroDivisionError("no pixels")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (broken, "ZeroDivisionError: no pixels (test_python_reward.py:"),
        (lambda i, p, m: [1.0, 2.0], "the function gave 2 scores for 3 pictures"),
        (lambda i, p, m: [], "the function gave 0 scores for 3 pictures"),
        (lambda i, p, m: None, "the function gave None, not a list of 3 numbers"),
        (lambda i, p, m: 0.5, "the function gave 0.5, not a list of 3 numbers"),
        (lambda i, p, m: "abc", "the function gave 'abc', not a list"),
        (lambda i, p, m: {0: 1, 1: 1, 2: 1}, "not a list"),
    ],
)
def test_a_bad_answer_fails_every_picture(
    function: Callable[..., object], reason: str, batch: RewardBatch
) -> None:
    scores = score(function, batch)
    assert scores.values_B.isnan().all()
    assert all(given is not None and reason in given for given in scores.reasons)


def test_hanging_fails_every_picture(batch: RewardBatch) -> None:
    free = threading.Event()
    reward = PythonReward(lambda i, p, m: [float(free.wait())] * 3, time_limit=0.05)
    scores = reward.score(batch)
    assert scores.reasons == ("no answer within 0.05 s",) * 3
    assert scores.values_B.isnan().all()
    free.set()


def test_a_broken_picture_is_not_shown(batch: RewardBatch) -> None:
    images = batch.images_BCHW.clone()
    images[1, 0, 0, 0] = torch.inf
    scores = score(lambda i, p, m: [float(ord(text)) for text in p], RewardBatch(images, PROMPTS))
    assert scores.reasons == (None, "the picture is not finite", None)
    assert scores.values_B[[0, 2]].tolist() == [97.0, 99.0]
    nothing = score(broken, RewardBatch(torch.full_like(images, torch.nan), PROMPTS))
    assert nothing.reasons == ("the picture is not finite",) * 3


def test_the_function_cannot_change_the_batch(batch: RewardBatch) -> None:
    def spoil(
        images: list[Image.Image], prompts: list[str], metadata: list[dict[str, object]]
    ) -> list[float]:
        images[0].putpixel((0, 0), (9, 9, 9))
        prompts.clear()
        metadata[0]["n"] = "gone"
        return [1.0] * 3

    before = batch.images_BCHW.clone()
    score(spoil, batch)
    assert torch.equal(batch.images_BCHW, before)
    assert batch.prompts == PROMPTS
    assert batch.metadata[0] == {"n": 0}


SOURCE = """
from dataclasses import dataclass
import math

@dataclass
class Helper:
    value: float

def half(images, prompts, metadata):
    return [Helper(0.5).value] * len(images)

def two(images, prompts):
    return []

number = 3
"""


def test_import_by_file(tmp_path: Path, batch: RewardBatch) -> None:
    file = tmp_path / "my rewards.py"
    file.write_text(SOURCE)
    reward = rewards.load("python", function=f"{file}:half")
    assert reward.score(batch).values_B.tolist() == [0.5] * 3
    first = reward.score(batch).provenance["model"]
    assert first.startswith(f"{file}:half (")
    file.write_text(SOURCE.replace("0.5", "0.25"))
    changed = rewards.load("python", function=f"{file}:half")
    assert changed.score(batch).values_B.tolist() == [0.25] * 3
    assert changed.score(batch).provenance["model"] != first


def test_import_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pixrl_test_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert import_function("pixrl_test_rewards:half")([], [], []) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("half", "Type my_module:f or path/to/file.py:f"),
        (":half", "is no import path"),
        ("mine.py:", "is no import path"),
        ("{file}:hafl", "Did you mean 'half'"),
        ("{file}:number", "is 3, not a function"),
        (
            "{file}:two",
            r"must take three arguments, f\(images, prompts, metadata\), but is f\(images, prompts\)",
        ),
        ("{folder}/nowhere.py:half", "There is no file"),
        ("{folder}/bad.py:half", r"could not be imported: RuntimeError: at import \(bad.py:1\)"),
        ("{folder}/wrong.py:half", "could not be imported: SyntaxError"),
        ("pixrl_no_such_module:half", "PYTHONPATH; a file is given as path/to/file.py:f"),
    ],
)
def test_what_cannot_be_imported(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "bad.py").write_text("raise RuntimeError('at import')")
    (tmp_path / "wrong.py").write_text("def half(:\n")
    with pytest.raises(ConfigError, match=message):
        rewards.load("python", function=path.format(file=tmp_path / "mine.py", folder=tmp_path))


def test_the_path_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="function: my_module:f"):
        rewards.load("python")


def test_scores_are_float32_on_the_cpu(batch: RewardBatch) -> None:
    values: Tensor = score(lambda i, p, m: [1 / 3] * 3, batch).values_B
    assert values.dtype is torch.float32
    assert values.device.type == "cpu"


def test_a_recipes_code_is_announced_before_it_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SECURITY.md promises it. A function that is given in Python is the caller's own."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import sys\nprint('it runs', file=sys.stderr)\ndef f(images, prompts, metadata): return []\n"
    )
    PythonReward(f"{file}:f")
    assert capfd.readouterr().err == f"Running Python code that the recipe names: {file}:f\nit runs\n"
    PythonReward(lambda images, prompts, metadata: [])
    assert capfd.readouterr().err == ""
