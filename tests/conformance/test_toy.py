"""The shipped toy checkpoints keep the promises too, and the GenEval-style reward agrees with true scenes."""

import numpy as np
import pytest
import torch

from pixrl import hub_check, models, rewards
from pixrl.conformance import check_policy, check_reward
from pixrl.models.base import FlowPolicy
from pixrl.toy.language import caption, held_out_prompts, parse
from pixrl.toy.pictures import drawn
from pixrl.toy.random_scenes import held_out_subjects, random_scene, subject_scene
from pixrl.toy.scene import GENEVAL, Task
from pixrl.toy.verify_generators import relative
from pixrl.types import RewardBatch


def need(*names: str) -> None:
    missing = [name for name in names if not (hub_check.TOY_ROOT / name / "provenance.json").is_file()]
    if missing:
        pytest.skip(f"toy checkpoints not built: {', '.join(missing)}; type: pixrl toy build")


def true_scenes(task: Task, count: int) -> RewardBatch:
    generator = np.random.default_rng((7, GENEVAL.index(task)))
    scenes = [random_scene(generator, task) for _ in range(count)]
    prompts = [caption(scene) for scene in scenes]
    return RewardBatch(drawn(scenes), prompts, [parse(prompt).metadata for prompt in prompts])


@pytest.mark.parametrize("name", ["sd3", "turbo", "flux"])
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


def subject_views(seed: int) -> torch.Tensor:
    """A view of each of the held-out subjects."""
    rng = np.random.default_rng(seed)
    return drawn(subject_scene(subject, rng, added_accessory=0) for subject in held_out_subjects())


@pytest.mark.parametrize(("region", "missed"), [("foreground", 2), ("class", 3)])
def test_dino_seg_knows_a_subject_in_another_scene(region: str, missed: int) -> None:
    """Against another subject of its kind; where the region is a class, the segmenter must also get the kind right."""
    need("identity", "segmenter")
    options = {"model": "toy:identity", "segmenter": "toy:segmenter", "region": region}
    reward = rewards.load("dino_seg", device="cpu", **options)
    images, references = subject_views(0), subject_views(1)
    metadata = [
        {"reference": reference, "class": subject.kind}
        for reference, subject in zip(references, held_out_subjects(), strict=True)
    ]
    same = reward.score(RewardBatch(images, ["x"] * len(images), metadata))
    rng = np.random.default_rng(2)
    relatives = drawn(subject_scene(relative(subject.kind, rng), rng) for subject in held_out_subjects())
    wrong_references = [
        entry | {"reference": other} for entry, other in zip(metadata, relatives, strict=True)
    ]
    other = reward.score(RewardBatch(images, ["x"] * len(images), wrong_references))
    assert same.values_B.nanmean() > other.values_B.nanmean() + 0.3
    assert same.values_B.isnan().sum() <= missed
    few = RewardBatch(images[:4], ["x"] * 4, metadata[:4])
    check_reward(reward, few, tolerance=1e-3)


def test_dino_seg_fails_where_there_is_no_subject() -> None:
    need("identity", "segmenter")
    reward = rewards.load("dino_seg", model="toy:identity", segmenter="toy:segmenter", device="cpu")
    view, blank = subject_views(0)[:1], torch.ones(1, 3, 128, 128)
    batch = RewardBatch(torch.cat([blank, view]), ["x"] * 2, [{"reference": view}, {"reference": blank}])
    scores = reward.score(batch)
    assert scores.values_B.isnan().all()
    assert scores.reasons == ("no subject found in the picture", "no subject found in the reference")


@pytest.mark.parametrize("task", GENEVAL)
def test_geneval_agrees_with_true_scenes(task: Task) -> None:
    need("clip", "segmenter")
    reward = rewards.load("geneval", clip="toy:clip", segmenter="toy:segmenter", device="cpu")
    batch = true_scenes(task, 100)
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
