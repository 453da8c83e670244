"""A reward of one file outside the package: doctor, conformance, serving and training take it as they take ours."""

import json
from pathlib import Path

import pytest
import torch

import pixrl
from pixrl import api, rewards
from pixrl.conformance import check_reward
from pixrl.doctor.diagnosis import Need
from pixrl.errors import CheckpointError, ConfigError
from pixrl.jobs import align as align_job
from pixrl.types import RewardBatch
from tests.align.parts import recipe
from tests.align.test_doctor import needs

BRIGHT = '''
"""How bright a picture is."""

from pathlib import Path

from pixrl.rewards.base import Reward
from pixrl.types import Scores


class Bright(Reward):
    name = "bright"
    examples = {"gain": 2}

    def __init__(self, gain: float) -> None:
        self.gain = gain

    @classmethod
    def lacks(cls, prompt, metadata, options):
        return "the prompt is dark" if "dark" in prompt else None

    def score(self, batch):
        values = self.gain * batch.images_BCHW.mean(dim=(1, 2, 3))
        return Scores.checked(values, [None] * len(values), self.provenance)


class Loaded(Bright):
    def __init__(self, model: str | Path, weights: "str | Path | None" = None) -> None:
        raise AssertionError("the doctor loads no model")

    @classmethod
    def examine(cls, options):
        pass


def function(images, prompts, metadata):
    return [1.0 for image in images]
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "my_rewards.py"
    place.write_text(BRIGHT)
    return place


def named(file: Path, name: str = "Bright", **options: object) -> dict[str, object]:
    return {"name": f"{file}:{name}", "options": options or {"gain": 2}}


def test_the_doctor_asks_its_class(file: Path, sd3_folder: Path, prompt_file: Path) -> None:
    given = recipe(sd3_folder, prompt_file, rewards=[named(file)])
    assert not api.examine(given).problems
    wrong = recipe(sd3_folder, prompt_file, rewards=[named(file, gian=2)])
    assert "Did you mean 'gain'?" in needs(api.examine(wrong))[Need.SETTING]
    lacking = given | {"prompts": {"source": str(file.with_name("dark.txt"))}}
    file.with_name("dark.txt").write_text("a dark owl\n")
    assert "the prompt is dark" in needs(api.examine(lacking))[Need.DATA]


def test_a_parameter_that_allows_a_path_names_a_model(
    file: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    loaded = named(file, "Loaded", model="toy:clip", weights=str(file.with_name("no.pt")))
    found = needs(api.examine(recipe(sd3_folder, prompt_file, rewards=[loaded])))
    assert "option weights: There is no file" in found[Need.WEIGHTS]
    assert "option model" not in found[Need.WEIGHTS]


def test_it_keeps_the_promises_of_a_reward(file: Path) -> None:
    reward = rewards.load(f"{file}:Bright", gain=2)
    batch = RewardBatch(torch.rand(3, 3, 8, 8), ["a", "b", "c"])
    check_reward(reward, batch)
    assert reward.provenance["model"].startswith(f"{file}:Bright (")


def test_a_run_goes_on_while_its_file_is_the_same(
    file: Path, sd3_folder: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = pixrl.align(
        recipe(sd3_folder, prompt_file, rewards=[named(Path(file.name))]), steps=1, out=tmp_path / "run"
    ).run
    monkeypatch.chdir("/")
    (kept,) = json.loads((run / "start.json").read_text())["recipe"]["rewards"]
    assert (kept["name"], kept["kind"]) == ("Bright", f"{file}:Bright")
    align_job.go_on(run, overrides=["steps=2"])
    file.write_text(f"{BRIGHT}\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match=r"Code that .* was begun with has changed"):
        align_job.go_on(run, overrides=["steps=3"])
    assert not (tmp_path / "ran").exists()
    align_job.go_on(run, overrides=["steps=3"], accept_changes=True)


def test_a_model_of_its_own_keeps_its_name_beside_the_code(file: Path) -> None:
    file.write_text(
        BRIGHT.replace("self.gain = gain", 'self.gain, self.provenance = gain, {"model": "mine"}')
    )
    found = rewards.load(f"{file}:Bright", gain=2).provenance
    assert found["model"] == "mine" and found["code"].startswith(f"{file}:Bright (")


def test_a_module_and_an_entry_point_name_it_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(file.parent)
    about = file.with_name("mine-1.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[pixrl.rewards]\nbright = my_rewards:Bright\n")
    for name in ("my_rewards:Bright", "bright"):
        assert rewards.load(name, gain=2).provenance["model"].startswith(f"{name} (")
    with pytest.raises(ConfigError, match="needs the option 'gain', for example gain: 2"):
        rewards.load("bright")


def test_what_is_no_reward_is_refused(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"function.* is no class that extends pixrl\.rewards\.base\.Reward"
    ):
        rewards.load(f"{file}:function")
    with pytest.raises(ConfigError, match="Did you mean 'Bright'"):
        rewards.load(f"{file}:Brigth")
