"""Recipes with `stages`: which rewards a run learns from changes at the step that the recipe names."""

import json
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
from torch import Tensor

import pixrl
from pixrl.jobs import align as align_job
from pixrl.runs import checkpoint
from pixrl.runs.folder import RunFolder
from tests.align.parts import JUDGE, recipe, same


def reward(name: str, function: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "kind": "python", "options": {"function": f"{JUDGE}:{function}"}, **settings}


def at(run: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return checkpoint.load(checkpoint.step_folder(run, step))[0]


def spread(run: Path, step: int, name: str, group: int = 3) -> float:
    """Mean standard deviation of a reward within the groups of a step, from the manifest."""
    scores = [row.scores[name] for row in RunFolder.open(run).manifest() if row.step == step]
    return fmean(pstdev(scores[first : first + group]) for first in range(0, len(scores), group))


def test_the_weights_change_at_the_step_that_the_recipe_names(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    """Brightness in step 0, redness in step 1: a run on brightness alone is the same up to step 1, and no further."""
    rewards = [reward("bright", "brightness"), reward("red", "redness")]
    stages = [{"until": 1, "weights": {"bright": 1.0}}, {"weights": {"red": 2.0}}]
    alone = [rewards[0], rewards[1] | {"held_out": True}]
    staged, bright = (
        pixrl.align(
            recipe(sd3_folder, prompt_file, steps=2, **settings), seed=0, out=tmp_path / str(number)
        ).run
        for number, settings in enumerate(({"rewards": rewards, "stages": stages}, {"rewards": alone}))
    )
    assert same(at(staged, 1), at(bright, 1))
    assert not same(at(staged, 2), at(bright, 2), atol=1e-4)
    logged = [row["group_std"] for row in RunFolder.open(staged).metrics()]
    assert logged == pytest.approx([spread(staged, 0, "bright"), 2 * spread(staged, 1, "red")], rel=1e-4)


def test_the_next_stage_can_bring_its_own_prompts(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    """As recipes/paper/diffusion-nft-stages.yaml says: a reward that the first prompts have no metadata for waits."""
    tagged = tmp_path / "tagged.jsonl"
    tagged.write_text("".join(json.dumps({"prompt": f"a {x}", "tag": x}) + "\n" for x in ("fox", "hen")))
    settings = recipe(
        sd3_folder,
        prompt_file,
        rewards=[reward("bright", "brightness"), reward("tag", "tagged")],
        stages=[{"until": 1, "weights": {"bright": 1.0}}, {"weights": {"bright": 1.0, "tag": 1.0}}],
        scoring={"max_failed_share": 1.0},
        steps=1,
    )
    run = pixrl.align(settings, out=tmp_path / "run").run
    align_job.go_on(run, overrides=["steps=2", f"prompts.source={tagged}"])
    first, second = RunFolder.open(run).metrics()
    assert (first["failed_share"], second["failed_share"]) == (0, 0)
    assert second["grad_norm"] > 0
    seen = [{row.prompt for row in RunFolder.open(run).manifest() if row.step == step} for step in (0, 1)]
    assert seen[0] <= set(prompt_file.read_text().splitlines()) and seen[1] == {"a fox", "a hen"}
