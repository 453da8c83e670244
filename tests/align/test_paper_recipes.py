"""Every number of a paper recipe has a source, or is said to be ours, and cannot change unnoticed.

`paper_recipes.yaml` beside this file is the table.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml

from pixrl import config
from pixrl.rewards import checked_options
from pixrl.runs.config import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes/paper"
TABLE: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("paper_recipes.yaml").read_text())
ELSEWHERE = ("kind", "prompts.source", "rewards", "stages", "machine", "evaluation", "output")
"""Where a recipe computes, what it reads and writes, what judges it: of no method."""


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name -> value; rewards go by their names."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "name" in value[0]:
        value = {one["name"]: one for one in value}
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from leaves(inner, f"{name}.{key}" if name else key)


def settings(name: str) -> dict[str, object]:
    """All of a recipe's settings, defaults too."""
    return dict(leaves(load_recipe(f"paper/{name}").model_dump(mode="json")))


@pytest.mark.parametrize(
    ("name", "source"), [(name, source) for name, row in TABLE.items() for source in row]
)
def test_the_published_numbers(name: str, source: str) -> None:
    found, wanted = settings(name), dict(leaves(TABLE[name][source]))
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", list(TABLE))
def test_every_number_has_one_source(name: str) -> None:
    said = {key for key, _ in leaves(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))}
    sourced = Counter(key for row in TABLE[name].values() for key, _ in leaves(row))
    assert {key for key in said if not key.startswith(ELSEWHERE)} <= sourced.keys()
    assert sourced.total() == len(sourced), "two sources for one number"


@pytest.mark.parametrize("name", [*TABLE, "draft"])
def test_they_load_and_survive_being_written_down(name: str, tmp_path: Path) -> None:
    found = load_recipe(f"paper/{name}")
    file = tmp_path / "recipe.yaml"
    file.write_text(config.dump(found))
    assert config.load(type(found), file) == found
    for reward in found.rewards:
        checked_options(reward.reward, reward.options)


def test_no_recipe_is_left_out() -> None:
    assert {file.stem for file in RECIPES.glob("*.yaml")} == {*TABLE, "draft"}


def test_draft_is_flow_grpo_but_for_its_loss_as_its_head_says() -> None:
    """Its paper trains SD1.4, so none of its numbers is in the table."""
    draft, grpo = settings("draft"), settings("flow-grpo")
    methods = ("loss.", "advantage.", *ELSEWHERE)
    differ = {key for key in draft if draft[key] != grpo.get(key) and not key.startswith(methods)}
    assert differ == {"exploration.noises", "optimizer.updates", "sampling.noise", "sampling.eta"}
    assert (draft["loss.kind"], draft["loss.last"], draft["exploration.noises"]) == ("draft", 2, 1)


def test_the_published_stages_of_diffusion_nft() -> None:
    """800, 300, 200, 200 and 100 iterations; three model-based rewards throughout, one rule-based beside them."""
    stages = load_recipe("paper/diffusion-nft-stages").stages
    assert [stage.until for stage in stages] == [*accumulate((800, 300, 200, 200)), None]
    throughout = {"pickscore": 1.0, "clip_text": 1.0, "hpsv2": 1.0}
    rules = ({}, {"geneval": 1.0}, {}, {"geneval": 1.0}, {"ocr": 1.0})
    assert [stage.weights for stage in stages] == [throughout | rule for rule in rules]
