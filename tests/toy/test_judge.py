"""The judge of flux's gate is right on held-out subjects that it never saw, drawn truly or wrongly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pixrl.toy import CHECKPOINTS
from pixrl.toy.judge import SceneJudge
from pixrl.toy.pictures import drawn
from pixrl.toy.random_scenes import held_out_subjects
from pixrl.toy.scene import Scene
from pixrl.toy.verify import reconstruct
from pixrl.toy.verify_generators import asking, other_accessory, other_background


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(CHECKPOINTS / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def judge() -> SceneJudge:
    return SceneJudge.load(CHECKPOINTS / "judge")


@pytest.fixture(scope="module")
def wanted() -> list[Scene]:
    rng = np.random.default_rng(8)
    return [asking(subject, rng) for subject in held_out_subjects() for _ in range(8)]


def share(verdicts: Tensor) -> float:
    return float(verdicts.float().mean())


def test_true_drawings_are_accepted_crisp_and_decoded(
    judge: SceneJudge, vae: AutoencoderKL, wanted: list[Scene]
) -> None:
    images = drawn(wanted)
    assert share(judge.follows(images, wanted)) >= 0.95
    assert share(judge.follows(reconstruct(vae, images[::4]), wanted[::4])) >= 0.95


def test_an_exchanged_accessory_or_background_is_rejected_for_that_reason(
    judge: SceneJudge, wanted: list[Scene]
) -> None:
    rng = np.random.default_rng(9)
    background, accessory = judge.right(drawn([other_accessory(s, rng) for s in wanted]), wanted)
    assert share(background) >= 0.95 and share(accessory) <= 0.05
    background, accessory = judge.right(drawn([other_background(s, rng) for s in wanted]), wanted)
    assert share(background) <= 0.05 and share(accessory) >= 0.95


def test_an_own_accessory_neither_counts_nor_hurts(judge: SceneJudge, wanted: list[Scene]) -> None:
    owners = [scene for scene in wanted if scene.objects[0].own]
    bare = [replace(s, objects=(replace(s.objects[0], accessory=None),)) for s in owners]
    assert share(judge.follows(drawn(bare), owners)) <= 0.05
    assert share(judge.follows(drawn(owners), bare)) >= 0.95, "nothing is asked but the background"


def test_verdicts_do_not_depend_on_the_company(judge: SceneJudge, wanted: list[Scene]) -> None:
    images = drawn(wanted[:40])
    together = judge.reads(images)
    apart = [judge.reads(image[None]) for image in images]
    for part in (0, 1):
        assert torch.equal(together[part], torch.cat([one[part] for one in apart]))
