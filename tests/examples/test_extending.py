"""The files of docs/extending.md do what the page says, as they stand there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pixrl
from pixrl import models, rewards
from pixrl.conformance import check_renderer, check_reward
from pixrl.types import RewardBatch

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, flags=re.DOTALL))
RECIPES = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]
FUSE: dict[str, Any] = {"budget": 4, "batch": 2, "exemplars": 1, "keep": 1}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files, from which commands are typed."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_five_files() -> None:
    assert sorted(FILES) == ["my_loss.py", "my_model.py", "my_parts.py", "my_reward.py", "my_sampler.py"]


def test_the_sampler(own: Path) -> None:
    done = pixrl.fuse(["owl", "snail"], sampler="my_sampler.py:Around", options={"width": 0.1}, **FUSE)
    assert len(done.scores) == 4
    written = yaml.safe_load((done.run / "recipe.yaml").read_text())
    assert written["options"] == {"width": 0.1}


def test_loss_exploration_advantages_and_reward_train_together(own: Path) -> None:
    recipe: dict[str, Any] = {
        "model": "toy:sd3",
        "steps": 1,
        "prompts": {"source": "toy:geneval", "per_step": 2},
        "sampling": {"steps": 2},
        "evaluation": {"prompts": 1, "per_prompt": 1},
    }
    for part in RECIPES:
        recipe |= part
    done = pixrl.align(recipe, out=own / "run")
    (row,) = done.metrics
    assert 0 < row["reward/colour/mean"] <= 0.5 and row["weight"] > 0
    assert done.report.is_file()


def test_the_reward(own: Path) -> None:
    images_BCHW = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = RewardBatch(images_BCHW, ["a photo of one owl"] * 4)
    check_reward(rewards.load("my_reward.py:Colourful", most=0.5), batch)


def test_the_model(own: Path) -> None:
    weights = own / "path" / "to" / "weights"
    weights.mkdir(parents=True)
    (weights / "model_index.json").write_text(json.dumps({"_class_name": "DiscPipeline"}))
    ref = "my_model.py:Discs@path/to/weights"
    check_renderer(models.load(ref, device="cpu"))
    done = pixrl.fuse(["owl", "cat"], model=ref, clip="toy:clip", segmenter="toy:segmenter", **FUSE)
    assert len(done.scores) == 4
