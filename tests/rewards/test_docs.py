"""docs/rewards.md names every reward with its options, and its examples run."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from pixrl.config import parse_yaml
from pixrl.rewards import REWARDS, is_differentiable
from pixrl.rewards.encoders import ClipSimilarity, DinoEncoder, SiglipEncoder
from pixrl.rewards.set import RewardSet, RewardSetting, Stage
from pixrl.rewards.settings import check_rewards
from pixrl.rewards.zoo import hpsv3, image_reward, vqascore
from pixrl.rewards.zoo.birefnet import BiRefNetForeground
from pixrl.rewards.zoo.blip_vqa import BlipVQAReward
from pixrl.rewards.zoo.hpsv2 import HPSv2Reward
from pixrl.rewards.zoo.ocr import GotReader, PaddleReader
from pixrl.types import RewardBatch

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
HERE = Path(__file__).parent
ELSEWHERE = {"judge", "remote", "python", "votes"}
"""Their models are not pixrl's to name."""
LOADERS = (
    ClipSimilarity,
    DinoEncoder,
    SiglipEncoder,
    BiRefNetForeground,
    BlipVQAReward,
    HPSv2Reward,
    PaddleReader,
    GotReader,
)
LICENCES = {hub_id: licence for loader in LOADERS for hub_id, licence in loader.licences.items()} | {
    "google-bert/bert-base-uncased": image_reward.LICENCE,
    "google/flan-t5-xxl": vqascore.LICENCE,
    "Qwen/Qwen2-VL-7B-Instruct": hpsv3.WORDS_LICENCE,
}
HUB_ID = re.compile(r"`([A-Za-z][\w-]+/[\w.-]+)`")
MEMORY = re.compile(r"([\d.]+) ([MG]): ([\d.]+) / ([\d.]+)")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def table(*columns: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the table whose first columns are so called."""
    rows = PAGE.split("\n| " + " | ".join(columns) + " |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {first.strip("| `"): [cell.strip("| ") for cell in others] for first, *others in cells}


WHAT = table("name", "what it computes", "range", "options (models also take `device`, `dtype`)")
NEEDS = table("name", "published checkpoint", "licence", "parameters: GiB in float32 / half")
COMPARED = table("name", "compared with", "largest difference", "test")


def test_every_reward_and_option_is_in_the_table() -> None:
    assert WHAT.keys() == REWARDS.keys()
    for name, place in REWARDS.items():
        module, _, class_name = place.partition(":")
        options = set(inspect.signature(vars(import_module(module))[class_name]).parameters)
        named = set(re.findall(r"`(\w+)`", WHAT[name][2]))
        assert named == options - {"device", "dtype"}, name


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_says_all_of_itself(name: str) -> None:
    """Formula, range, model id, licence, memory, and what it was compared with."""
    formula, span, _ = WHAT[name]
    checkpoint, licence, memory = NEEDS[name]
    other, difference, test = COMPARED[name]
    assert all((formula, span, checkpoint, licence, memory, other, difference, test))
    assert re.search(r"\d", difference)
    files = re.findall(r"`(test_\w+\.py)`", test)
    assert files and all((HERE / file).is_file() for file in files)
    if name in ELSEWHERE:
        return
    assert re.search(r"\d", span)
    assert HUB_ID.search(checkpoint)
    assert re.search(r"MIT|Apache-2\.0|BSD-3-Clause", licence)
    assert MEMORY.search(memory)


def test_memory_is_parameters_times_bytes() -> None:
    figures = MEMORY.findall(PAGE)
    assert len(figures) > 20
    for count, unit, *sizes in figures:
        parameters = float(count) * {"M": 1e6, "G": 1e9}[unit]
        for width, size in zip((4, 2), sizes, strict=True):
            assert parameters * width / 2**30 == pytest.approx(float(size), rel=0.01, abs=0.006), count


def test_licences_are_those_that_the_code_knows() -> None:
    for name, (checkpoint, licence, _) in NEEDS.items():
        for hub_id in HUB_ID.findall(checkpoint):
            assert hub_id not in LICENCES or LICENCES[hub_id] in licence, f"{name}: {hub_id}"


def test_the_rewards_with_a_gradient_are_named() -> None:
    (listed,) = re.findall(r"They are ([\w,\s]+?)\. Their", PAGE)
    assert set(re.findall(r"\w+", listed)) - {"and"} == {name for name in REWARDS if is_differentiable(name)}


def test_the_yaml_examples_are_valid() -> None:
    for text in blocks("yaml"):
        data = parse_yaml(text, "docs/rewards.md")
        settings = [RewardSetting.model_validate(one) for one in data["rewards"]]
        check_rewards(settings, [Stage.model_validate(one) for one in data.get("stages", ())])


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if block.startswith("# my_rewards.py"))
    Path("my_rewards.py").write_text(example)
    (setting,) = yaml.safe_load(blocks("yaml")[0])["rewards"]
    made = RewardSet([RewardSetting.model_validate(setting)], time_limit=60, max_failed_share=0)
    images = torch.zeros(2, 3, 4, 4)
    images[1, 2] = 1
    assert made.score(RewardBatch(images, ["a", "b"]))["blue"].values_B.tolist() == [0.0, 1.0]
