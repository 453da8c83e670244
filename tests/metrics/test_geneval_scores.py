"""GenEval's six task means, and the published layout of pictures."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixrl.errors import InputError
from pixrl.metrics.geneval import geneval_scores, score_folder
from pixrl.rewards.base import Reward
from pixrl.types import RewardBatch, Scores

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def entry(tag: str, kind: str = "owl") -> dict[str, object]:
    return {"tag": tag, "include": [{"class": kind, "count": 1}], "prompt": f"a photo of {kind}"}


def scored(*values: float) -> Scores:
    reasons = tuple("broken" if math.isnan(value) else None for value in values)
    return Scores(torch.tensor(values), reasons)


def test_the_overall_score_is_the_mean_of_the_six_tasks_not_of_the_pictures() -> None:
    entries = [entry(task) for task in TASKS] + [
        entry("single_object", kind) for kind in ("cat", "cat", "dog")
    ]
    found = geneval_scores(scored(1, 1, 0, 0, 0, 0, 1, 0, math.nan), entries)
    assert found.tasks == {
        **dict.fromkeys(TASKS, 0.0),
        "single_object": pytest.approx(2 / 3),
        "two_object": 1.0,
    }
    assert list(found.tasks) == list(TASKS)
    assert found.overall == pytest.approx((2 / 3 + 1) / 6)
    assert found.correct_images == pytest.approx(3 / 8)
    assert found.correct_prompts == pytest.approx(
        3 / 7
    )  # the cat has a correct picture, the dog no scored one
    assert (found.images, found.failed) == (9, 1)
    assert found.lines()[-2:] == ["overall        0.27778", "1 of 9 pictures failed"]


def test_a_task_without_scores_leaves_the_overall_score_open() -> None:
    found = geneval_scores(scored(1.0), [entry("colors")])
    assert found.tasks["colors"] == 1
    assert math.isnan(found.tasks["counting"]) and math.isnan(found.overall)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="graded"):
        geneval_scores(scored(0.5), [entry("colors")])
    with pytest.raises(InputError, match="Did you mean 'colors'"):
        geneval_scores(scored(1.0), [entry("color")])
    with pytest.raises(InputError, match="2 scores need one GenEval entry each, got 1"):
        geneval_scores(scored(1.0, 0.0), [entry("colors")])


class Bright(Reward):
    """1 where a picture is bright, and the entry arrived with it."""

    name = "geneval"

    def score(self, batch: RewardBatch) -> Scores:
        assert [one["prompt"] for one in batch.metadata] == list(batch.prompts)
        return Scores((batch.images_BCHW.mean(dim=(1, 2, 3)) > 0.5).float(), (None,) * len(batch.prompts))


def write(folder: Path, task: str, *levels: int, size: tuple[int, int] = (32, 32)) -> None:
    (folder / "samples").mkdir(parents=True)
    (folder / "metadata.jsonl").write_text(json.dumps(entry(task)) + "\n")
    for number, level in enumerate(levels):
        Image.new("RGB", size, (level,) * 3).save(folder / "samples" / f"{number:04d}.png")


def test_a_folder_in_the_published_layout(tmp_path: Path) -> None:
    for number, task in enumerate(TASKS):
        write(tmp_path / f"{number:05d}", task, 255, 0, 255, 255, size=(32, 40) if number == 2 else (32, 32))
    (tmp_path / "grid").mkdir()
    found = score_folder(tmp_path, Bright(), batch=5)
    assert found.tasks == dict.fromkeys(TASKS, 0.75)
    assert (found.overall, found.images, found.correct_prompts) == (0.75, 24, 1.0)


def test_a_folder_in_another_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no numbered folders"):
        score_folder(tmp_path, Bright())
    write(tmp_path / "00000", "colors")
    with pytest.raises(InputError, match="no pictures"):
        score_folder(tmp_path, Bright())
    (tmp_path / "00000" / "metadata.jsonl").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        score_folder(tmp_path, Bright())
