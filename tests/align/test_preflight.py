"""What the doctor says, the run does: one preflight, before a model loads, a folder is made or anything is deleted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import pixrl
from pixrl import api
from pixrl.config import load
from pixrl.data.prompts import Prompt
from pixrl.doctor import rewards as doctor_rewards
from pixrl.doctor.diagnosis import Findings, Need
from pixrl.doctor.needs import require_out
from pixrl.doctor.rewards import require_metadata
from pixrl.errors import ConfigError, PixrlError, did_you_mean
from pixrl.fusion.config import FuseConfig
from pixrl.models import loading
from pixrl.models.slots import LoraSlots, slot_sizes
from pixrl.rewards import kind_of
from pixrl.rewards.python import find_function
from pixrl.rewards.settings import RewardSetting, import_path, is_importable
from pixrl.runs.config import load_recipe
from tests import tiny
from tests.align.parts import JUDGE, recipe

GENEVAL = {"name": "geneval", "options": {"segmenter": "toy:segmenter", "clip": "toy:clip"}}
IDENTITY = {"name": "dino_seg", "options": {"model": "toy:identity", "mask": "none"}}
OCR = {"name": "ocr", "options": {"model": "toy:clip"}}


def bright(
    images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
) -> list[float]:
    return [sum(image.convert("L").getdata()) / 1e6 for image in images]


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **more: object) -> None:
        raise AssertionError("the generator was loaded")

    monkeypatch.setattr(loading, "load_pipeline", refuse)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewards": [GENEVAL]}, "'geneval' can score no picture of 5 of 5 prompts"),
        ({"rewards": [IDENTITY]}, "no reference picture in the metadata"),
        ({"rewards": [OCR]}, "no text in double quotes"),
        ({"lora": {"targets": ["nosuch"]}}, "no layer of the transformer is called 'nosuch'"),
        ({"lora": {"targets": ["attn.to_q", "nosuch"]}}, "is called 'nosuch'"),
        ({"lora": {"targets": []}}, "lora.targets is empty"),
        ({"resolution": 4096}, "beyond the table of positions"),
        ({"resolution": 33}, "must be a multiple of"),
        ({"prompts": {"source": "nowhere.txt"}}, "nowhere.txt"),
        ({"evaluation": {"source": "nowhere.txt"}}, "nowhere.txt"),
        ({"output": {"features": "toy:nosuch"}}, "no toy checkpoint 'nosuch'"),
        ({"machine": {"device": "cpu", "dtype": "float16"}}, "needs a GPU"),
    ],
)
def test_doctor_and_run_refuse_alike(
    changes: dict[str, Any], said: str, sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    made = recipe(sd3_folder, prompt_file, **changes)
    found = api.examine(made)
    assert not found.can_run
    assert said in found.problems[0].message
    with pytest.raises(PixrlError) as refused:
        pixrl.align(made, out=tmp_path / "run")
    for problem in found.problems:
        assert problem.message in str(refused.value)
    with pytest.raises(PixrlError) as checked:
        api.selfcheck(api.load(made))
    assert str(checked.value) == str(refused.value)
    assert type(refused.value).__name__ == found.problems[0].error
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nothing_loads")
def test_fusions_too(tmp_path: Path) -> None:
    config = load(FuseConfig, {"concepts": ["owl", "dragon"], "segmenter": "toy:nosuch"})
    found = api.examine({"kind": "fuse", "concepts": ["owl", "dragon"], "segmenter": "toy:nosuch"})
    messages = [problem.message for problem in found.problems]
    assert "does not know the word 'dragon'" in messages[0]
    assert "no toy checkpoint 'nosuch'" in messages[1]
    with pytest.raises(PixrlError) as refused:
        api.run_fuse(config, tmp_path / "run")
    assert all(message in str(refused.value) for message in messages)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_refused_by_both(
    sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    made = recipe(sd3_folder, prompt_file)
    found = api.examine(made, out=tmp_path, force=True)
    assert [problem.need for problem in found.problems] == [Need.PLACE]
    with pytest.raises(PixrlError, match="is no run of pixrl"):
        pixrl.align(made, out=tmp_path, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["file/run", "file/a/b", "\0", "x" * 300])
def test_places_that_no_run_can_have(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    findings = Findings()
    require_out(tmp_path / name, False, findings)
    assert [problem.need for problem in findings.problems] == [Need.PLACE]
    assert "Choose another" in findings.problems[0].message
    require_out(tmp_path / "new" / "run", False, fine := Findings())
    assert not fine.problems
    assert not (tmp_path / "new").exists()


def test_code_that_a_recipe_names_is_read_and_not_executed(
    sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
        "def f(images, prompts, metadata):\n    return [0.0] * len(images)\n"
    )
    made = recipe(sd3_folder, prompt_file, rewards=[{"name": "python", "options": {"function": f"{file}:f"}}])
    for score in (False, True):
        found = api.examine(made, score=score)
        assert found.can_run
        assert any("which the command that trains executes" in note for note in found.notes)
    assert not (tmp_path / "executed").exists()
    api.selfcheck(api.load(made))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("def f(a, b, c): ...", "f", None),
        ("def f(*given): ...", "f", None),
        ("def f(a, b, c, d=1): ...", "f", None),
        ("if True:\n    def f(a, b, c): ...", "f", None),
        ("try:\n    from x import f\nexcept ImportError:\n    f = None", "f", None),
        ("from elsewhere import *", "f", None),
        ("class f: ...", "f", None),
        ("@wrapped\ndef f(a): ...", "f", None),
        ("def outer():\n    def f(a, b, c): ...", "f", "has no 'f'"),
        ("def half(a, b, c): ...", "hafl", "Did you mean 'half'"),
        ("def f(a, b): ...", "f", "must take three arguments"),
        ("def f(a, b, c, d): ...", "f", "must take three arguments"),
        ("def f(a, b, c, *, d): ...", "f", "must take three arguments"),
        ("def f(:", "f", "could not be read as Python"),
    ],
)
def test_a_function_is_found_in_the_syntax_tree(
    text: str, name: str, said: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "m.py"
    file.write_text(text)
    if said is None:
        assert str(file) in find_function(f"{file}:{name}")
    else:
        with pytest.raises(ConfigError, match=said):
            find_function(f"{file}:{name}")


def test_modules_are_found_without_importing_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "loud"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "inner.py").write_text("def f(a, b, c): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "inner.py" in find_function("loud.inner:f")
    with pytest.raises(ConfigError, match="has no 'g'"):
        find_function("loud.inner:g")
    with pytest.raises(ConfigError, match=r"there is no 'loud\.other'"):
        find_function("loud.other:f")


def test_a_function_as_a_reward(sd3_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    made = recipe(sd3_folder, prompt_file, steps=1, rewards=[bright])
    run = pixrl.align(made, out=tmp_path / "run").run
    kept = yaml.safe_load((run / "recipe.yaml").read_text())["rewards"][0]
    assert (kept["name"], kept["kind"]) == ("bright", "python")
    assert kept["options"] == {"function": f"{__name__}:bright"}
    recorded = json.loads((run / "start.json").read_text())["rewards"]["bright"]
    assert recorded["model"].startswith(f"{__name__}:bright (")
    assert "source" not in recorded
    api.resume(run, live=False)  # finds it again by that path


def test_the_source_of_a_function_that_nothing_finds_again(
    sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    reward = lambda images, prompts, metadata: [0.25 * len(prompts)] * len(images)  # noqa: E731
    made = recipe(sd3_folder, prompt_file, steps=1, rewards=[reward])
    run = pixrl.align(made, out=tmp_path / "run").run
    start = json.loads((run / "start.json").read_text())
    assert "0.25 * len(prompts)" in start["rewards"]["lambda"]["source"]
    assert any("pixrl resume cannot go on" in note for note in start["notes"])
    assert not is_importable(reward)
    assert is_importable(bright) and import_path(bright) == f"{__name__}:bright"


def test_what_raises_on_a_synthetic_batch_never_becomes_a_run(
    sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    for name, said in (("raises", "KeyError: 'tag'"), ("wrong_length", "1 scores for 4 pictures")):
        made = recipe(
            sd3_folder,
            prompt_file,
            steps=1,
            rewards=[{"name": "python", "options": {"function": f"{JUDGE}:{name}"}}],
        )
        with pytest.raises(PixrlError, match=said):
            pixrl.align(made, out=tmp_path / name)
        assert not (tmp_path / name).exists()


def test_prompts_that_are_cut_are_noted(sd3_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"a red owl\n{'a red owl and ' * 30}a cat\n")
    found = api.examine(recipe(sd3_folder, tmp_path / "list.txt"))
    assert found.can_run
    cut = [note for note in found.notes if "it never sees their end" in note]
    assert len(cut) == 1
    assert cut[0].startswith("1 of 2 prompts are longer than the ")
    assert "The first is 'a red owl and" in cut[0]


def test_metadata_that_some_prompts_lack_is_noted() -> None:
    entry = {"include": [{"class": "owl", "count": 1}]}
    prompts = [Prompt("a", entry), Prompt("b", entry), Prompt("c")]
    setting = [RewardSetting(name="geneval", options=GENEVAL["options"])]
    require_metadata(setting, {"prompts.source": prompts}, 0.5, some := Findings())
    assert not some.problems
    assert "1 of 3 prompts (prompts.source); 'c': no GenEval metadata" in some.notes[0]
    require_metadata(setting, {"prompts.source": prompts}, 0.2, most := Findings())
    assert [problem.need for problem in most.problems] == [Need.DATA]


@pytest.mark.parametrize(
    "entry",
    [
        {"include": 5},
        {"include": "owl"},
        {"include": [5]},
        {"include": [{"class": "owl"}]},
        {"include": [{"class": "owl", "count": 1, "position": "left of"}]},
        {"include": [{"class": "owl", "count": 1}], "exclude": 5},
    ],
)
def test_damaged_geneval_entries_lack_something(entry: dict[str, object]) -> None:
    assert kind_of("geneval").lacks("a photo", entry, {}) is not None


def test_a_judge_of_the_toy_world_is_none_of_a_published_model(
    sd3_folder: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = {"name": "clip_text", "options": {"model": "toy:clip"}}
    made = recipe(sd3_folder, prompt_file, rewards=[toy], output={"features": "toy:clip"})
    assert api.examine(made).can_run
    monkeypatch.setattr(doctor_rewards, "TOY_LARGEST", 1)  # as if the tiny model were a large one
    monkeypatch.setattr(doctor_rewards, "TOY_SIDE", 16)
    found = api.examine(made)
    assert [problem.message.split(" is ")[0] for problem in found.problems] == [
        "rewards.clip_text.options.model",
        "output.features",
    ]
    with pytest.raises(PixrlError, match="its scores would mean nothing"):
        pixrl.align(made, out=tmp_path / "run")
    assert api.examine(made | {"model": "toy:sd3"}).can_run


@pytest.mark.parametrize("name", ["flux-uno", "flux-kontext", "qwen-edit", "flux2-klein"])
def test_a_subject_with_a_published_model_is_judged_by_published_networks(name: str) -> None:
    made = load_recipe(f"subject/{name}")
    assert "toy:" not in made.model_dump_json()
    assert made.machine.base == "nf4"


def test_the_toys_judges_of_a_subject_name_the_recipe_to_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_rewards, "TOY_LARGEST", 1)  # as if the tiny model were a large one
    monkeypatch.setattr(doctor_rewards, "TOY_SIDE", 16)
    model = tiny.flux(tmp_path / "flux")
    found = api.examine("toy/subject", [f"model={model}", "resolution=32"])
    said = [problem.message for problem in found.problems if "would mean nothing" in problem.message]
    assert said and all("pixrl personalize subject/flux-uno --subject FOLDER" in one for one in said)


def test_the_slots_sizes_are_known_before_they_are_there() -> None:
    backbone = torch.nn.Sequential()
    backbone.to_q = torch.nn.Linear(6, 10)
    backbone.conv = torch.nn.Conv2d(3, 4, 2)
    sizes = slot_sizes(backbone, ["to_q", "conv"], rank=2)
    slots = LoraSlots(backbone, rank=2, alpha=2, targets=("to_q", "conv"), seed=0)
    assert sorted(sizes) == sorted(parameter.numel() for parameter in slots.parameters())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("dragon", None),
        ("dog", None),
        ("cow", None),
        ("lion", None),
        ("horse", "house"),
        ("snaill", "snail"),
        ("bugdet", "budget"),
        ("evaluate", "evaluation"),
        ("alfa", "alpha"),
        ("x", None),
        ("", None),
    ],
)
def test_only_misspellings_are_corrected(given: str, meant: str | None) -> None:
    names = [
        "drawing",
        "frog",
        "crown",
        "onion",
        "house",
        "snail",
        "budget",
        "evaluation",
        "alpha",
        "a",
        "xx",
    ]
    assert did_you_mean(given, names) == ("" if meant is None else f" Did you mean {meant!r}?")
