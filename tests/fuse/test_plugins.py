"""A sampler from a file outside the package: a run, its resume, and a changed file."""

import json

import pytest
import yaml

from pixrl.errors import CheckpointError, ConfigError
from pixrl.fusion.config import FuseConfig
from pixrl.jobs.fuse import go_on, start
from tests.fuse.world import fake_world

SAMPLER = '''
import torch

from pixrl.algorithms.fusion.base import Proposal, Sampler
from pixrl.config import Settings as Base


class Share(Sampler):
    """The same share of the first concept in every column."""

    class Settings(Base):
        share: float = 0.5

    def ask(self, count, step):
        share_BD = torch.full((count, self.task.columns), self.settings.share)
        return Proposal(torch.stack((share_BD, 1 - share_BD), dim=1))


helper = 1
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_sampler.py").write_text(SAMPLER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**given):
    base = {"concepts": ("owl", "snail"), "budget": 8, "batch": 4, "exemplars": 1}
    return FuseConfig(**{**base, "sampler": "my_sampler.py:Share", **given})


def test_a_fusion_with_a_sampler_of_ones_own(own):
    run = start(config(options={"share": 0.25}), own / "run", world=fake_world())
    path = run.folder.path
    written = yaml.safe_load((path / "recipe.yaml").read_text())
    assert written["sampler"] == f"{own / 'my_sampler.py'}:Share" and written["options"] == {"share": 0.25}
    assert all(row.extra["coefficients"]["share"]["owl"] == 0.25 for row in run.rows)
    assert [*json.loads((path / "world.json").read_text())["code"]] == [written["sampler"]]
    assert go_on(path, world=fake_world()).rows == run.rows
    (own / "my_sampler.py").write_text("raise RuntimeError('nothing of it runs before it is compared')")
    with pytest.raises(
        CheckpointError, match=r"Code of yours has changed.*\n  .*Share: \w{12}, now \w{12}\n"
    ):
        go_on(path, world=fake_world())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"shar": 1}}, r"no option 'shar'\. Did you mean 'share'"),
        ({"sampler": "my_sampler.py:helper"}, "is no sampler: it must be a class"),
        ({"sampler": "my_sampler.py:Shar"}, "Did you mean 'Share'"),
        ({"sampler": "rmlr"}, "'rmler', 'ppo', 'grpo'"),
    ],
)
def test_mistakes_are_named(own, given, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        config(**given)
