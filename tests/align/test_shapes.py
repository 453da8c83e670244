"""Whole runs whose pictures are not square: drawn, scored, trained on, evaluated, recorded and resumed as such."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import pixrl
from pixrl import api
from pixrl.errors import ConfigError
from pixrl.report.align import facts
from pixrl.runs.config import load_recipe
from pixrl.runs.folder import RunFolder
from tests.align.parts import E2PO, GRPO, final, recipe, same
from tests.align.test_dpo import write_pairs

SIZE = (48, 32)
"""Width and height."""


def sizes(folder: Path) -> set[tuple[int, int]]:
    found = set()
    for file in folder.rglob("*.png"):
        with Image.open(file) as picture:
            found.add(picture.size)
    return found


METHODS: dict[str, dict[str, Any]] = {
    "e2po": E2PO,
    "grpo": GRPO,
    "dpo": {
        "loss": {"kind": "dpo", "beta": 500, "timesteps": 2},
        "exploration": {"kind": "noise", "noises": 2},
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run(sd3_folder: Path, prompt_file: Path, tmp_path: Path, method: str) -> None:
    changes = METHODS[method] | {"resolution": "48x32", "steps": 2}
    if method == "dpo":  # whose pairs are 40 x 32
        changes = changes | {
            "prompts": {"source": str(write_pairs(tmp_path)), "per_step": 2},
            "evaluation": {"source": str(prompt_file), "prompts": 2},
        }
    made = recipe(sd3_folder, prompt_file, **changes)
    run = pixrl.align(made, out=tmp_path / "whole").run
    assert sizes(run / "rollouts") == sizes(run / "samples") == {SIZE}
    assert yaml.safe_load((run / "recipe.yaml").read_text())["resolution"] == "48x32"
    assert all(row.failed is None for row in RunFolder.open(run).manifest())
    first = pixrl.align(made | {"steps": 1}, out=tmp_path / "first").run
    api.resume(first, overrides=["steps=2"])
    assert same(final(run), final(first)), "a resumed run is the unbroken one"


def test_squares_are_written_as_one_number_and_older_recipes_are_the_same(
    sd3_folder: Path, prompt_file: Path
) -> None:
    old, new = (load_recipe(recipe(sd3_folder, prompt_file, resolution=it)) for it in (32, "32x32"))
    assert old == new and new.resolution == 32
    assert "32 × 32 pixels" in dict(facts(new, {}))["model"]
    assert "48 × 32 pixels" in dict(facts(new.model_copy(update={"resolution": "48x32"}), {}))["model"]


def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    for resolution, said in (("48x36", "nearest is 48x32"), ("32x4096", "table of positions")):
        with pytest.raises(pixrl.PixrlError, match=said):
            pixrl.align(
                recipe(sd3_folder, prompt_file, resolution=resolution), out=tmp_path / str(resolution)
            )
    with pytest.raises(ConfigError, match=r"resolution: \[48, 32\] is no size of pictures"):
        load_recipe(recipe(sd3_folder, prompt_file, resolution=[48, 32]))
