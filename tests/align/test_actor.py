"""Rewards that score in actors of a real Ray cluster, while the run draws on."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pixrl
from pixrl import api, rewards
from pixrl.config import dump, load, parse_yaml
from pixrl.errors import CheckpointError, ConfigError, RunError
from pixrl.models.sd3 import SD3Policy
from pixrl.rewards.actor import RewardOnRay
from pixrl.rewards.settings import ClusterShare, RewardSetting
from pixrl.runs.config import AlignConfig
from pixrl.runs.folder import RunFolder
from pixrl.types import RewardBatch
from tests.align.parts import aligner, final, groups, recipe, same

pytest.importorskip("ray")
JUDGE = """
import os, signal
from pathlib import Path
import numpy as np

HERE = Path(__file__).parent

def brightness(images, prompts, metadata):
    if (HERE / "die").exists():
        (HERE / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    with (HERE / "calls.txt").open("a") as file:
        file.write(f"{len(images)} {prompts[0]}\\n")
    means = [float(np.asarray(image).mean()) / 255 for image in images]
    return [None if "fail" in prompt else mean for mean, prompt in zip(means, prompts)]
"""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    # Ray's workers are of low priority, and would wait for other tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=2**27,
        )
        yield ray
        ray.shutdown()


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path / "judge.py"


def reward(judge: Path, **more: Any) -> dict[str, Any]:
    return {"name": "python", "options": {"function": f"{judge}:brightness"}, **more}


def batch_of(*prompts: str) -> RewardBatch:
    images = torch.rand(len(prompts), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return RewardBatch(images, prompts, [{}] * len(prompts))


def calls(judge: Path) -> list[int]:
    """The number of pictures of each call of the function."""
    return [int(line.split()[0]) for line in judge.with_name("calls.txt").read_text().splitlines()]


def test_pictures_are_handed_over_before_the_next_are_drawn(policy: SD3Policy) -> None:
    made, seen = policy.decode, list[tuple[list[str], int]]()
    found, drawn = aligner(policy, micro=(4, 4)), list[int]()
    policy.decode = lambda latents: drawn.append(len(latents)) or made(latents)  # type: ignore[method-assign]
    rollouts = found.collect(groups(2), 0, lambda batch: seen.append((list(batch.prompts), sum(drawn))))
    assert [at for _, at in seen] == [4, 6]  # of six pictures in all
    assert [prompt for prompts, _ in seen for prompt in prompts] == rollouts.samples.prompts
    assert rollouts.images_BCHW.equal(found.collect(groups(2), 0).images_BCHW)


def test_the_run_is_the_same_and_its_parts_are_scored_by_micro_batch(
    ray: Any, judge: Path, tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    def run(name: str, **on: Any) -> pixrl.AlignResult:
        settings = recipe(sd3_folder, prompt_file, rewards=[reward(judge, **on)], steps=2)
        settings["machine"]["rollout_batch"] = 4
        judge.with_name("calls.txt").write_text("")
        return pixrl.align(settings, out=tmp_path / name)

    here = run("here")
    assert 6 in calls(judge)
    there = run("there", on="ray")
    assert 6 not in calls(judge) and calls(judge).count(3) >= 4  # six pictures a step: three, then three
    assert same(final(here.run), final(there.run))
    rows = [[row.scores for row in RunFolder.open(done.run).manifest()] for done in (here, there)]
    assert rows[0] == rows[1]
    assert api.resume(there.run, ["steps=3"], live=False).evaluations[-1]["step"] == 3


def test_it_begins_when_it_is_told_and_answers_in_order(ray: Any, judge: Path) -> None:
    found = RewardOnRay(RewardSetting.model_validate(reward(judge, on={"cpus": 0.5})))
    whole = batch_of("a", "b fail", "c")
    parts = [
        RewardBatch(whole.images_BCHW[rows], whole.prompts[rows], [{}] * 3)
        for rows in (slice(2), slice(2, 3))
    ]
    for part in parts:
        found.expect(part)
    deadline = time.monotonic() + 60
    while not judge.with_name("calls.txt").is_file() or len(calls(judge)) < 2:
        assert time.monotonic() < deadline, "nothing was sent before the scores were asked for"
        time.sleep(0.01)
    found.expect(whole)
    scores = found.score(whole)
    assert calls(judge) == [2, 1]  # each picture once
    alone = rewards.load("python", **reward(judge)["options"]).score(whole)
    assert scores.reasons == alone.reasons and scores.reasons[1] is not None
    assert scores.values_B.nan_to_num(-1).equal(alone.values_B.nan_to_num(-1))
    assert found.provenance == alone.provenance
    assert found.score(batch_of("d")).reasons == (None,)  # which nobody had announced
    found.expect(batch_of("e"))
    assert found.score(batch_of("e fail")).reasons != (None,)  # the same picture, asked of something else


def test_a_lost_actor_is_made_again(ray: Any, judge: Path) -> None:
    found = RewardOnRay(RewardSetting.model_validate(reward(judge, on="ray")))
    judge.with_name("die").touch()
    assert found.score(batch_of("a", "b")).reasons == (None, None)
    assert not judge.with_name("die").exists()


def test_what_cannot_be_there(ray: Any, judge: Path) -> None:
    with pytest.raises(ConfigError, match="compares a group's pictures in the run's own process"):
        RewardOnRay(RewardSetting.model_validate({"name": "votes", "on": "ray"}))
    with pytest.raises(RunError, match="No node of the Ray cluster has 64 CPUs"):
        RewardOnRay(RewardSetting.model_validate(reward(judge, on={"cpus": 64})))
    with pytest.raises(CheckpointError, match="no-such-model"):
        RewardOnRay(
            RewardSetting(name="clip_text", options={"model": "./no-such-model"}, on=ClusterShare(cpus=0.5))
        )


def test_the_doctor_asks_for_the_cluster(sd3_folder: Path, prompt_file: Path, judge: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        settings = recipe(sd3_folder, prompt_file, rewards=[reward(judge, on={"ray": address})])
        found = api.examine(settings)
    assert any(f"Nobody answers at the Ray address {address}" in str(problem) for problem in found.problems)


def test_a_recipe_names_it_as_yaml_would_write_yes() -> None:
    """YAML takes a plain `on` for true; as the name of a setting it is a word, also once a recipe is written."""
    settings = "rewards: [{name: preference, on: ray, options: {model: toy:preference}}]"
    found = load(AlignConfig, {"model": "toy:sd3", **parse_yaml(settings, "recipe.yaml")})
    assert found.rewards[0].on == ClusterShare()
    again = load(AlignConfig, parse_yaml(dump(found), "recipe.yaml"))
    assert again.rewards == found.rewards
