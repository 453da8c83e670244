"""A loss, an exploration and advantages from files outside the package: a run, its report, its resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import pixrl
from pixrl import api
from pixrl import config as recipes
from pixrl.algorithms import make_loss
from pixrl.errors import CheckpointError, ConfigError
from pixrl.jobs import align as align_job
from pixrl.runs.config import AlignConfig
from pixrl.runs.folder import RunFolder
from tests.align.parts import recipe

LOSS = '''
from pydantic import Field

from pixrl.algorithms.loss import Loss, LossSettings, Terms, noise_levels, noised, velocity_deviation
from pixrl.models.slots import Slot


class RewardWeighted(Loss):
    """Flow matching on samples, each weighted by exp(advantage / temperature)."""

    class Settings(LossSettings):
        temperature: float = Field(1.0, gt=0)
        timesteps: int = Field(2, ge=1)

        def check_sampling(self, sampling):
            if self.timesteps > sampling.steps:
                raise ValueError(f"loss.timesteps: at most {sampling.steps}")

        def trained_levels(self, sampling):
            return self.timesteps

    sampling_slot = Slot.CURRENT

    def parts(self, rollouts):
        return self.settings.timesteps

    def steps(self, rollouts, rows, part):
        return noise_levels(rollouts, rows, part)

    def terms(self, policy, rollouts, rows, advantage_B, part, with_kl):
        x_t, t_B, x0, noise = noised(policy, rollouts, rows, part)
        velocity = policy.velocity(x_t, t_B, rollouts.conditioning(rows))
        error_B = (velocity - (noise - x0)).square().flatten(1).mean(dim=1)
        weight_B = (advantage_B / self.settings.temperature).exp().to(error_B)
        return Terms(weight_B * error_B, {"weight": weight_B})

    def deviation(self, policy, rollouts, rows):
        return velocity_deviation(policy, rollouts, rows, Slot.CURRENT)


def helper():
    """No loss."""
'''
PARTS = """
from typing import ClassVar

from pixrl.algorithms.advantages import AdvantageEstimator, EstimatorSettings
from pixrl.algorithms.exploration import Exploration, ExplorationSettings, Variants


class Plain(Exploration):
    class Settings(ExplorationSettings):
        noises: int = 2
        varies_conditions: ClassVar[bool] = False

    variants = 1

    def prepare(self, policy, prompts):
        return Variants(policy.encode(prompts), metrics={"prompts_encoded": float(len(prompts))})


class Ranks(AdvantageEstimator):
    class Settings(EstimatorSettings):
        best: float = 1.0

    def __call__(self, rewards, weights, steps):
        total_PS = sum(weight * rewards[name] for name, weight in weights.items())
        rank_PS = total_PS.argsort(dim=1).argsort(dim=1).float()
        return (self.settings.best * (rank_PS - rank_PS.mean(dim=1, keepdim=True))).expand(steps, -1, -1)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands are typed in, with two files of one's own."""
    (tmp_path / "my_loss.py").write_text(LOSS)
    (tmp_path / "my_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**loss: Any) -> dict[str, Any]:
    return {
        "loss": {"kind": "my_loss.py:RewardWeighted", **loss},
        "exploration": {"kind": "my_parts.py:Plain", "noises": 3},
        "advantage": {"kind": "my_parts.py:Ranks", "best": 0.5},
        "steps": 1,
    }


def test_a_run_with_parts_of_ones_own(own: Path, sd3_folder: Path, prompt_file: Path) -> None:
    run = pixrl.align(recipe(sd3_folder, prompt_file, **settings(temperature=2)), out=own / "run").run
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written["loss"] == {
        "kind": f"{own / 'my_loss.py'}:RewardWeighted",
        "temperature": 2.0,
        "timesteps": 2,
    }
    assert written["exploration"] == {"kind": f"{own / 'my_parts.py'}:Plain", "noises": 3}
    assert written["advantage"] == {"kind": f"{own / 'my_parts.py'}:Ranks", "best": 0.5}
    (row,) = RunFolder.open(run).metrics()
    assert row["weight"] > 0 and row["prompts_encoded"] == 2
    page = (run / "report.html").read_text()
    assert "my_loss.py:RewardWeighted, temperature 2.0, timesteps 2" in page
    assert "my_parts.py:Ranks, best 0.5" in page and "my_parts.py:Plain, 3 noises" in page
    began = json.loads((run / "start.json").read_text())["code"]
    assert {Path(name.partition(":")[0]).name for name in began} == {"judge.py", "my_loss.py", "my_parts.py"}
    align_job.go_on(run, overrides=["steps=2"])
    assert len(RunFolder.open(run).metrics()) == 2


def test_doctor_and_selfcheck_know_them(own: Path, sd3_folder: Path, prompt_file: Path) -> None:
    given = recipe(sd3_folder, prompt_file, **settings())
    found = api.examine(given)
    assert found.can_run and found.work.images_per_step == 2 * 3
    report = api.selfcheck(recipes.load(AlignConfig, given))
    assert report.passed and report.measure.startswith("|v - v_old|")


def test_a_changed_file_is_refused_at_resume(own: Path, sd3_folder: Path, prompt_file: Path) -> None:
    run = pixrl.align(recipe(sd3_folder, prompt_file, **settings()), out=own / "run").run
    (own / "my_loss.py").write_text("raise RuntimeError('nothing of it runs before it is compared')")
    with pytest.raises(
        CheckpointError, match=r"has changed, .*\n  .*my_loss\.py:RewardWeighted: \w{12}, now \w{12}\n"
    ):
        align_job.go_on(run, overrides=["steps=2"])
    (own / "my_loss.py").unlink()
    with pytest.raises(CheckpointError, match="now gone"):
        align_job.go_on(run, overrides=["steps=2"])
    (own / "my_loss.py").write_text(LOSS.replace("No loss.", "Changed."))
    align_job.go_on(run, overrides=["steps=2"], accept_changes=True)
    start = json.loads((run / "start.json").read_text())
    assert any(note.startswith("changed: ") and "my_loss.py" in note for note in start["notes"])
    align_job.go_on(run, overrides=["steps=2"])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"temprature": 1},
            r"Unknown setting loss\.temprature\. Did you mean 'temperature'\? Allowed here: kind, temp",
        ),
        ({"temperature": 0}, "temperature: .*greater than 0"),
        ({"timesteps": 5}, r"loss\.timesteps: at most 4"),
        ({"kind": "my_loss.py:helper"}, "is no loss: it must be a class with a class Settings"),
        ({"kind": "my_parts.py:Plain"}, "is no loss"),
        ({"kind": "my_loss.py:RewardWeigthed"}, "Did you mean 'RewardWeighted'"),
        ({"kind": "no_such.py:Loss"}, "There is no file 'no_such.py'"),
        ({"kind": "clippd"}, "'clippd'.*'clipped', 'nft'"),
    ],
)
def test_mistakes_are_named(
    own: Path, sd3_folder: Path, prompt_file: Path, loss: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.load(AlignConfig, recipe(sd3_folder, prompt_file, **settings(**loss)))


def test_a_loss_of_an_installed_package(
    own: Path, sd3_folder: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = own / "weighted-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: weighted\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[pixrl.losses]\nweighted = my_loss:RewardWeighted\n")
    monkeypatch.syspath_prepend(str(own))
    config = recipes.load(
        AlignConfig, recipe(sd3_folder, prompt_file, **settings(kind="weighted", temperature=3))
    )
    assert make_loss(config.loss).settings.temperature == 3
    assert recipes.load(AlignConfig, config.model_dump(mode="json")) == config
