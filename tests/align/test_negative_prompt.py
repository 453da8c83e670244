"""`negative_prompt` in whole runs: drawn, trained, evaluated and recorded with it, and refused before work begins."""

import json
from pathlib import Path

import pytest
import yaml

import pixrl
from pixrl import api
from pixrl.doctor.diagnosis import Need
from pixrl.errors import InputError, PixrlError
from pixrl.report.align import facts
from pixrl.report.model_card import _call
from pixrl.runs.config import load_recipe
from pixrl.runs.folder import RunFolder
from pixrl.runs.measure import open_run
from tests.align.parts import final, recipe, same
from tests.align.test_draw import OWL, pixels

GUIDED = {"guidance": 4.0, "steps": 1, "optimizer": {"lr": 0.05, "ema": None}}


@pytest.fixture(scope="module")
def runs(sd3_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same recipe with a negative prompt and without."""
    place = tmp_path_factory.mktemp("runs")
    made = {
        name: recipe(sd3_folder, prompt_file, **GUIDED, **more)
        for name, more in (("with", {"negative_prompt": "a dark photo"}), ("without", {}))
    }
    return {name: pixrl.align(it, out=place / name).run for name, it in made.items()}


def test_a_run_draws_trains_and_evaluates_with_it(runs: dict[str, Path]) -> None:
    assert yaml.safe_load((runs["with"] / "recipe.yaml").read_text())["negative_prompt"] == "a dark photo"
    assert open_run(runs["with"]).policy.unwanted == "a dark photo"
    assert not same(final(runs["with"]), final(runs["without"])), "other pictures, another update"
    before = [(run / "samples/step-000000/0000.png").read_bytes() for run in runs.values()]
    assert before[0] != before[1]
    said = dict(facts(open_run(runs["with"]).config, {}))["model"]
    assert said.endswith(", guidance 4, away from 'a dark photo'")


def test_it_is_drawn_as_the_run_says_or_as_is_asked(runs: dict[str, Path], tmp_path: Path) -> None:
    own, asked, given, other = (
        pixels(pixrl.draw(run, OWL, n=1, out=tmp_path / str(number), **more))
        for number, (run, more) in enumerate(
            (
                (runs["with"], {}),
                (runs["with"], {"negative_prompt": "a dark photo", "guidance": 4.0}),
                (runs["with"], {"negative_prompt": "a red owl"}),
                (runs["with"], {"guidance": 2.0}),
            )
        )
    )
    assert (own == asked).all() and (own != given).any() and (own != other).any()
    rows = [json.loads((tmp_path / f"{n}/manifest.jsonl").read_text()) for n in range(4)]
    assert [row["negative_prompt"] for row in rows] == ["a dark photo"] * 2 + ["a red owl", "a dark photo"]
    assert [row["guidance"] for row in rows] == [4.0, 4.0, 4.0, 2.0]
    with pytest.raises(InputError, match="guidance is a number from 0 to 1000, got -1"):
        pixrl.draw(runs["with"], OWL, guidance=-1, out=tmp_path / "none")


def test_it_is_refused_before_work_begins(sd3_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    made = recipe(sd3_folder, prompt_file, negative_prompt="a dark photo")
    with pytest.raises(PixrlError, match=r"negative_prompt has no effect on .* at guidance 0"):
        pixrl.align(made, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    problems = api.examine(made).problems
    assert [one.need for one in problems] == [Need.SETTING] and "guidance=4" in problems[0].message


def test_a_fusion_is_led_away_from_it_and_its_children_are_drawn_again(tmp_path: Path) -> None:
    few = {"budget": 2, "batch": 2, "exemplars": 1, "sampler": "random", "guidance": 2.0}
    away = "a photo of a cat on the beach"
    led = pixrl.fuse(["owl", "snail"], negative_prompt=away, out=tmp_path / "led", **few).run
    own = pixels(api.Pictures([led / str(RunFolder.open(led).manifest()[0].file)]))
    again = pixels(pixrl.draw(led, child=0, n=1, out=tmp_path / "again"))
    other = pixels(
        pixrl.draw(led, child=0, n=1, negative_prompt="a photo of a snail", out=tmp_path / "other")
    )
    assert (again - own).abs().max() <= 1 / 255
    assert (other - own).abs().max() > 0.1
    with pytest.raises(PixrlError, match="negative_prompt has no effect on toy:turbo at guidance 0"):
        pixrl.fuse(["owl", "snail"], negative_prompt=away, out=tmp_path / "none", budget=2, batch=2)


def test_a_models_card_says_it_in_the_pipelines_words() -> None:
    plain = load_recipe(recipe(Path("a/b"), Path("list.txt"), guidance=3.0, resolution="832x1216"))
    given = plain.model_copy(update={"negative_prompt": 'a "dark" photo'})
    assert _call(plain, "StableDiffusion3Pipeline")["negative_prompt"] is None
    assert _call(given, "ZImagePipeline")["negative_prompt"] == '"a \\"dark\\" photo"'
    assert _call(given, "ZImagePipeline")["guidance_scale"] == 3.0
    qwen = _call(plain, "QwenImagePipeline")  # which draws without guidance where none is given
    assert (qwen["true_cfg_scale"], qwen["negative_prompt"]) == (3.0, '" "')
    assert "guidance_scale" not in qwen and (qwen["width"], qwen["height"]) == (832, 1216)
