"""The judge of flux's gate, which is right on held-out subjects that it never saw, drawn truly or wrongly; and `flux`.

In one file, so that one process fits the judge once.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tests.toy.gates import require_as_recorded
from torch import Tensor

from pixrl.toy import CHECKPOINTS, pictures
from pixrl.toy.judge import QUICK, SceneJudge, reconstruct
from pixrl.toy.pictures import drawn
from pixrl.toy.random_scenes import ToySubject, held_out_subjects, resembles_held_out
from pixrl.toy.scene import Scene, SceneDrawing, draw
from pixrl.toy.verify_generators import asking, fitted_judge, other_accessory, other_background

TINY = replace(QUICK, drawings=60, decoded=10, steps=6, batch=16)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(CHECKPOINTS / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def judge() -> SceneJudge:
    return fitted_judge(CHECKPOINTS, QUICK)


@pytest.fixture(scope="module")
def wanted() -> list[Scene]:
    rng = np.random.default_rng(8)
    return [asking(subject, rng) for subject in held_out_subjects() for _ in range(8)]


def share(verdicts: Tensor) -> float:
    return float(verdicts.float().mean())


@pytest.mark.slow
@pytest.mark.learning
def test_flux_is_as_good_as_its_provenance_says() -> None:
    require_as_recorded("flux")


@pytest.mark.slow
@pytest.mark.learning
def test_true_drawings_are_accepted_crisp_and_decoded(
    judge: SceneJudge, vae: AutoencoderKL, wanted: list[Scene]
) -> None:
    images = drawn(wanted)
    assert share(judge.follows(images, wanted)) >= 0.95
    assert share(judge.follows(reconstruct(vae, images[::4]), wanted[::4])) >= 0.95


@pytest.mark.slow
@pytest.mark.learning
def test_an_exchanged_accessory_or_background_is_rejected_for_that_reason(
    judge: SceneJudge, wanted: list[Scene]
) -> None:
    rng = np.random.default_rng(9)
    background, accessory = judge.right(drawn([other_accessory(s, rng) for s in wanted]), wanted)
    assert share(background) >= 0.95 and share(accessory) <= 0.05
    background, accessory = judge.right(drawn([other_background(s, rng) for s in wanted]), wanted)
    assert share(background) <= 0.05 and share(accessory) >= 0.95


@pytest.mark.slow
@pytest.mark.learning
def test_an_own_accessory_neither_counts_nor_hurts(judge: SceneJudge, wanted: list[Scene]) -> None:
    owners = [scene for scene in wanted if scene.objects[0].own]
    bare = [replace(s, objects=(replace(s.objects[0], accessory=None),)) for s in owners]
    assert share(judge.follows(drawn(bare), owners)) <= 0.05
    assert share(judge.follows(drawn(owners), bare)) >= 0.95, "nothing is asked but the background"


def test_one_seed_gives_one_judge_and_leaves_other_randomness_alone(
    vae: AutoencoderKL, wanted: list[Scene]
) -> None:
    images = drawn(wanted[:12])
    torch.manual_seed(1)
    first = SceneJudge.fit(vae, 3, TINY).network(images)
    after = torch.rand(1)
    torch.manual_seed(2)
    again, other = (SceneJudge.fit(vae, seed, TINY).network(images) for seed in (3, 4))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_verdicts_do_not_depend_on_the_company(vae: AutoencoderKL, wanted: list[Scene]) -> None:
    judge = SceneJudge.fit(vae, 3, TINY)
    images = drawn(wanted[:40])
    together = judge.reads(images)
    apart = [judge.reads(image[None]) for image in images]
    for part in (0, 1):
        assert torch.equal(together[part], torch.cat([one[part] for one in apart]))


def test_lessons_never_show_a_subject_like_the_held_out(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Scene] = []

    def watched(scene: Scene) -> SceneDrawing:
        shown.append(scene)
        return draw(scene)

    monkeypatch.setattr(pictures, "draw", watched)
    SceneJudge.fit(vae, 5, replace(TINY, drawings=200, steps=1))
    things = [scene.objects[0] for scene in shown]
    assert len(things) == 200
    assert not any(
        resembles_held_out(ToySubject(thing.kind, thing.palette)) for thing in things if thing.palette
    )
