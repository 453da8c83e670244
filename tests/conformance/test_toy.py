"""The shipped toy checkpoints keep the promises too, and the GenEval-style reward agrees with true scenes."""

import numpy as np
import pytest
import torch

from pixrl import hub, models, rewards
from pixrl.conformance import check_policy, check_reward
from pixrl.models.base import FlowPolicy
from pixrl.toy.language import caption, held_out_prompts, parse
from pixrl.toy.scene import Task, random_scene, render_with_masks
from pixrl.types import RewardBatch

TASKS = [task for task in Task if task is not Task.SUBJECT]


def need(*names: str) -> None:
    missing = [name for name in names if not (hub.TOY_ROOT / name / "provenance.json").is_file()]
    if missing:
        pytest.skip(f"toy checkpoints not built: {', '.join(missing)}; type: pixrl toy build")


def true_scenes(task: Task, count: int) -> RewardBatch:
    generator = np.random.default_rng((7, TASKS.index(task)))
    scenes = [random_scene(generator, task) for _ in range(count)]
    arrays = np.stack([np.asarray(render_with_masks(scene, 64)[0]) for scene in scenes])
    prompts = [caption(scene) for scene in scenes]
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    return RewardBatch(images, prompts, [parse(prompt).metadata for prompt in prompts])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_generators(name: str) -> None:
    need(name)
    policy = models.load(f"toy:{name}", device="cpu")
    assert isinstance(policy, FlowPolicy)
    check_policy(policy, tolerance=0.02)
    assert policy.vocabulary is not None
    assert len(policy.encode(held_out_prompts(Task.POSITION, 3, seed=0))) == 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip_text", {"model": "toy:clip"}),
        ("geneval", {"clip": "toy:clip", "segmenter": "toy:segmenter"}),
        ("preference", {"model": "toy:preference"}),
    ],
)
def test_rewards(name: str, options: dict[str, str]) -> None:
    need("clip", "segmenter", "preference")
    check_reward(rewards.load(name, device="cpu", **options), true_scenes(Task.COLORS, 4), tolerance=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_geneval_agrees_with_true_scenes(task: Task) -> None:
    need("clip", "segmenter")
    reward = rewards.load("geneval", clip="toy:clip", segmenter="toy:segmenter", device="cpu")
    batch = true_scenes(task, 40)
    right = reward.score(batch).values_B
    assert right.mean() >= 0.85
    wrong_way_round = RewardBatch(batch.images_BCHW.roll(1, 0), batch.prompts, batch.metadata)
    assert reward.score(wrong_way_round).values_B.mean() <= 0.2


@pytest.mark.parametrize(("name", "model"), [("clip_text", "clip"), ("preference", "preference")])
def test_the_true_caption_is_preferred(name: str, model: str) -> None:
    need(model)
    reward = rewards.load(name, model=f"toy:{model}", device="cpu")
    batch = true_scenes(Task.TWO_OBJECT, 40)
    shuffled = RewardBatch(batch.images_BCHW, [*batch.prompts[1:], batch.prompts[0]])
    better = reward.score(batch).values_B > reward.score(shuffled).values_B
    assert better.float().mean() >= 0.95


def test_preference_likes_the_clean_picture() -> None:
    need("preference")
    reward = rewards.load("preference", model="toy:preference", device="cpu")
    batch = true_scenes(Task.COLORS, 40)
    noise = torch.randn(batch.images_BCHW.shape, generator=torch.Generator().manual_seed(0))
    noisy = RewardBatch((batch.images_BCHW + 0.2 * noise).clamp(0, 1), batch.prompts)
    assert (reward.score(batch).values_B > reward.score(noisy).values_B).float().mean() >= 0.95
