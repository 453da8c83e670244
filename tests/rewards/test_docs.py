"""docs/rewards.md names every reward with its options, and its examples run."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from pixrl.rewards import REWARDS
from pixrl.rewards.multi import RewardSet, RewardSetting, Stage
from pixrl.rewards.settings import check_rewards
from pixrl.types import RewardBatch

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_reward_and_option_is_in_the_table() -> None:
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)` \|.*$", PAGE, re.MULTILINE)}
    assert rows.keys() == REWARDS.keys()
    for name, place in REWARDS.items():
        module, _, class_name = place.partition(":")
        options = set(inspect.signature(vars(import_module(module))[class_name]).parameters)
        named = set(re.findall(r"`(\w+)`", rows[name].split("|")[4]))
        assert named == options - {"device", "dtype"}, name


def test_the_yaml_examples_are_valid() -> None:
    for text in blocks("yaml"):
        data = yaml.safe_load(text)
        settings = [RewardSetting.model_validate(one) for one in data["rewards"]]
        check_rewards(settings, [Stage.model_validate(one) for one in data.get("stages", ())])


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(blocks("python")[0])
    (setting,) = yaml.safe_load(blocks("yaml")[0])["rewards"]
    made = RewardSet([RewardSetting.model_validate(setting)], time_limit=60, max_failed_share=0)
    images = torch.zeros(2, 3, 4, 4)
    images[1, 2] = 1
    assert made.score(RewardBatch(images, ["a", "b"]))["blue"].values_B.tolist() == [0.0, 1.0]
