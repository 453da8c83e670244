"""Direct reward back-propagation: its gradient is that of the whole chain, and the reward rises."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pixrl
from pixrl import config
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.draft import DRaFTLoss, DraftSettings
from pixrl.algorithms.exploration import Exploration, NoiseOnly
from pixrl.algorithms.loss import Advantages, Rollouts
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.algorithms.trainer import Aligner, Method, MicroBatches, OptimizerSettings
from pixrl.errors import ConfigError, InputError
from pixrl.jobs import align as align_job
from pixrl.models.sd3 import SD3Policy
from pixrl.rewards.base import DifferentiableReward
from pixrl.runs.config import AlignConfig
from pixrl.types import RewardBatch, Scores
from tests import tiny
from tests.align.parts import final, groups, perturbed, recipe, same, scored, weights_of
from tests.tolerance import GRADIENT, PICTURE, agree, agree_after_adam, rounding

STEPS = 4


class Red(DifferentiableReward):
    """How red a picture is; none of a picture whose prompt is in `without`."""

    name = "red"

    def __init__(self, without: Sequence[str] = ()) -> None:
        self.without = without

    def score(self, batch: RewardBatch) -> Scores:
        values_B = self.differentiable_scores(batch.images_BCHW, batch.prompts)
        reasons = tuple("none" if value != value else None for value in values_B.tolist())
        return Scores(values_B, reasons, provenance={"model": "red"})

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        red_B = images_BCHW[:, 0].mean(dim=(1, 2)) - images_BCHW[:, 1:].mean(dim=(1, 2, 3))
        known_B = torch.tensor([prompt not in self.without for prompt in prompts])
        return red_B.masked_fill(~known_B, torch.nan)


class Bright(Red):
    name = "bright"

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        return images_BCHW.square().mean(dim=(1, 2, 3))


def aligner(
    policy: SD3Policy,
    settings: DraftSettings,
    rewards: Mapping[str, DifferentiableReward],
    *,
    exploration: Exploration | None = None,
    micro: int = 4,
    noises: int = 3,
    **optimizer: Any,
) -> Aligner:
    assert policy.lora is not None
    method = Method(
        exploration or NoiseOnly(),
        RolloutSettings(steps=STEPS),
        GroupAdvantage(AdvantageSettings()),
        DRaFTLoss(settings, rewards),
        OptimizerSettings(**{"lr": 1e-3, **optimizer}),
        noises,
    )
    return Aligner(policy, policy.lora, method, MicroBatches(micro, micro), seed=0)


def lively(policy: SD3Policy) -> None:
    """LoRA that is no longer the identity, so that all its parameters have a gradient."""
    assert policy.lora is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.lora.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradient_of(policy: SD3Policy, loss: Tensor) -> Tensor:
    assert policy.lora is not None
    parts = torch.autograd.grad(loss, policy.lora.parameters(), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def by_hand(policy: SD3Policy, rollouts: Rollouts, rows: list[int], last: int, rewards: Any) -> Tensor:
    """-score [B] through one plain graph: every step, the decoder and the rewards."""
    samples, sigmas = rollouts.samples, rollouts.schedule.sigmas
    x = policy.initial_noise([samples.seeds[row] for row in rows])
    for number in range(STEPS):
        with torch.set_grad_enabled(number >= STEPS - last):
            velocity = policy.velocity(x, x.new_full((len(x),), sigmas[number]), rollouts.conditioning(rows))
            x = x + (sigmas[number + 1] - sigmas[number]) * velocity
    images, prompts = policy.decode(x), [samples.prompts[row] for row in rows]
    scores = [weight * reward.differentiable_scores(images, prompts) for reward, weight in rewards]
    return -torch.stack(scores).sum(dim=0)


def even_steps(policy: SD3Policy) -> None:
    """A schedule whose last step is as large as the others, unlike SD3's own."""
    policy.schedule = lambda steps: torch.linspace(1, 0, steps + 1)  # type: ignore[method-assign]


@pytest.mark.parametrize("last", [1, 2, STEPS])
def test_the_gradient_is_that_of_the_whole_chain(policy: SD3Policy, last: int) -> None:
    lively(policy)
    even_steps(policy)
    red, bright = Red(), Bright()
    found = aligner(policy, DraftSettings(last=last), {"red": red, "bright": bright})
    rollouts = replace(found.collect(groups(2), 0), weights={"red": 1.0, "bright": 0.5})
    rows = [0, 2, 4]
    terms = found.method.loss.terms(policy, rollouts, rows, torch.ones(3), 0, with_kl=True)
    expected_B = by_hand(policy, rollouts, rows, last, [(red, 1.0), (bright, 0.5)])
    assert agree(terms.loss_B, expected_B, PICTURE)
    ours, plain = gradient_of(policy, terms.loss_B.sum()), gradient_of(policy, expected_B.sum())
    assert plain.abs().max() > 1e-4
    assert agree(ours, plain, 3 * PICTURE)
    assert (terms.figures["kl"] > 0).all()


def test_more_steps_are_another_gradient(policy: SD3Policy) -> None:
    lively(policy)
    found = [aligner(policy, DraftSettings(last=last), {"red": Red()}) for last in (2, 3)]
    gradients = []
    for one in found:
        rollouts = replace(one.collect(groups(2), 0), weights={"red": 1.0})
        loss_B = one.method.loss.terms(policy, rollouts, [0, 1], torch.ones(2), 0, with_kl=False).loss_B
        gradients.append(gradient_of(policy, loss_B.sum()))
    assert not agree(*gradients, 3 * PICTURE)


def test_a_last_step_of_next_to_nothing_is_refused(policy: SD3Policy) -> None:
    with pytest.raises(
        InputError, match=r"last 1 of 4 steps begin at the noise level 0\.0089.*raise it to 2 or more"
    ):
        aligner(policy, DraftSettings(last=1), {"red": Red()}).collect(groups(1), 0)


def test_the_kl_weight_counts(policy: SD3Policy) -> None:
    lively(policy)
    plain, held = (aligner(policy, DraftSettings(last=2, kl=kl), {"red": Red()}) for kl in (0.0, 3.0))
    rollouts = replace(plain.collect(groups(2), 0), weights={"red": 1.0})
    one = plain.method.loss.terms(policy, rollouts, [0, 1], torch.ones(2), 0, with_kl=True)
    other = held.method.loss.terms(policy, rollouts, [0, 1], torch.ones(2), 0, with_kl=False)
    assert agree(other.loss_B, one.loss_B + 3.0 * one.figures["kl"], PICTURE)


def test_a_picture_without_a_score_teaches_nothing(policy: SD3Policy) -> None:
    lively(policy)
    known, partly = (
        aligner(policy, DraftSettings(), {"red": red}) for red in (Red(), Red(without=("a red owl",)))
    )
    rollouts = replace(known.collect(groups(2), 0), weights={"red": 1.0})
    rows = [0, 3]  # of two prompts, the first without a score
    alone = known.method.loss.terms(policy, rollouts, [3], torch.ones(1), 0, with_kl=False)
    both = partly.method.loss.terms(policy, rollouts, rows, torch.ones(2), 0, with_kl=False)
    assert both.loss_B[0].item() == 0
    ours, expected = gradient_of(policy, both.loss_B.sum()), gradient_of(policy, alone.loss_B.sum())
    assert agree(ours, expected, 3 * PICTURE)


def test_failed_scores_leave_and_weights_go_on() -> None:
    loss = DRaFTLoss(DraftSettings(), {"red": Red(), "bright": Bright()})
    scores = {"red": torch.tensor([[1.0, torch.nan]]), "bright": torch.tensor([[torch.nan, 3.0]])}
    judged: Advantages = loss.advantages(scores, {"red": 2.0}, GroupAdvantage(AdvantageSettings()), 3)
    assert judged.advantage_TPS.shape == (3, 1, 2)
    assert judged.advantage_TPS[0, 0].isnan().tolist() == [False, True]
    assert judged.weights == {"red": 2.0}
    with pytest.raises(ConfigError, match="'geneval' has none; of this run's rewards, red, bright have one"):
        loss.advantages({"geneval": scores["red"]}, {"geneval": 1.0}, GroupAdvantage(AdvantageSettings()), 3)


@pytest.mark.parametrize("exploring", [False, True])
def test_the_first_update_is_on_policy(policy: SD3Policy, exploring: bool) -> None:
    exploration = perturbed(2) if exploring else NoiseOnly()
    found = aligner(policy, DraftSettings(last=2), {"red": Red()}, exploration=exploration)
    rollouts = found.collect(groups(2), 0)
    rows = list(range(len(rollouts)))
    assert found.method.loss.deviation(policy, rollouts, rows) < rounding(torch.float32, PICTURE)
    lively(policy)
    assert found.method.loss.deviation(policy, rollouts, rows) > 4 * rounding(torch.float32, PICTURE)


def test_the_micro_batch_changes_nothing(sd3_folder: Path) -> None:
    from pixrl import models

    weights = []
    for micro in (1, 6):
        policy = models.load(sd3_folder, device="cpu", dtype="float32")
        assert isinstance(policy, SD3Policy)
        policy.attach_lora(rank=4, alpha=8)
        start = weights_of(policy)
        found = aligner(policy, DraftSettings(last=2), {"red": Red()}, micro=micro, updates=2)
        rollouts = found.collect(groups(2), 0)
        scores = {"red": Red().score(RewardBatch(rollouts.images_BCHW, rollouts.samples.prompts))}
        found.update(rollouts, scores, {"red": 1.0})
        weights.append(weights_of(policy))
    assert agree_after_adam(*weights, start, GRADIENT)


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.parametrize(("last", "exploring"), [(1, False), (2, False), (2, True)])
def test_the_reward_rises(policy: SD3Policy, last: int, exploring: bool) -> None:
    red = Red()
    if last == 1:
        even_steps(policy)
    exploration = perturbed(2) if exploring else NoiseOnly()
    settings = {"exploration": exploration, "noises": 2 if exploring else 4, "micro": 16, "lr": 2e-2}
    found = aligner(policy, DraftSettings(last=last), {"red": red}, **settings)  # type: ignore[arg-type]
    before = red_of(found)
    for step in range(6):
        rollouts = found.collect(groups(2, epoch=step), step)
        scores = red.score(RewardBatch(rollouts.images_BCHW, rollouts.samples.prompts))
        figures = found.update(rollouts, scored(scores.values_B, "red"), {"red": 1.0})
        assert figures["skipped_updates"] == 0
    after = red_of(found)  # of the same noise
    assert (after - before).mean() > before.std(), (
        f"{before.mean():.4f} to {after.mean():.4f} ± {before.std():.4f}"
    )


def red_of(found: Aligner) -> Tensor:
    """The reward of pictures that are never trained on."""
    rollouts = found.collect(groups(2, epoch=99), 99)
    return Red().score(RewardBatch(rollouts.images_BCHW, rollouts.samples.prompts)).values_B


# ---------------------------------------------------------------------------------------------- recipes and runs


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip(tmp_path_factory.mktemp("tiny") / "clip")


def draft(sd3_folder: Path, prompt_file: Path, clip_folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "loss": {"kind": "draft", "last": 2, "kl": 0.01},
        "sampling": {"steps": STEPS},
        "rewards": [{"name": "clip_text", "options": {"model": str(clip_folder)}}],
        "steps": 2,
        "exploration": {"kind": "noise", "noises": 1},  # there is nothing to compare a picture with
        "evaluation": {"prompts": 1},
    }
    return recipe(sd3_folder, prompt_file, **settings | changes)


def test_a_run_goes_on_where_it_was_broken_off(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, clip_folder: Path
) -> None:
    settings = draft(sd3_folder, prompt_file, clip_folder)
    whole = pixrl.align(settings, out=tmp_path / "whole")
    row = whole.metrics[-1]
    assert {"kl", "loss", "grad_norm", "reward/clip_text/mean"} <= {*row}
    assert any(name.startswith("on_policy_deviation/float32/batch_") for name in whole.metrics[0])
    assert "own gradient through the last 2 sampling step(s)" in whole.report.read_text()
    short = pixrl.align(settings, steps=1, out=tmp_path / "cut").run
    align_job.go_on(short, overrides=["steps=2"])
    assert same(final(whole.run), final(short))


@pytest.mark.parametrize("name", ["toy/draft", "paper/draft"])
def test_shipped_recipes(name: str) -> None:
    found = config.load(AlignConfig, name, kind="align")
    assert found.loss.kind == "draft"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rewards": [{"name": "mine", "kind": "geneval", "options": {}}]},
            r"gradient of every trained reward, and 'mine' \(geneval\) has none.*train on one of .*clip_text",
        ),
        ({"rewards": [{"name": "python", "options": {"function": "m:f"}}]}, r"'python' \(python\) has none"),
        ({"rewards": [{"name": "remote", "options": {"url": "x", "reward": "y"}}]}, r"'remote'.* has none"),
        ({"loss": {"kind": "draft", "last": 11}}, "loss.last is 11, but there are only 10 sampling steps"),
        ({"loss": {"kind": "draft", "last": 0}}, r"loss\.draft\.last"),
        ({"sampling": {"noise": "cps"}}, "not random: remove sampling.noise"),
        ({"sampling": {"solver": "dpm"}}, "set sampling.solver to euler"),
        ({"advantage": {"scale": "none"}}, "advantage has no effect with loss: draft"),
    ],
)
def test_recipes_that_are_refused(settings: dict[str, Any], message: str) -> None:
    base = {"loss": {"kind": "draft"}, "rewards": [{"name": "clip_text", "options": {"model": "toy:clip"}}]}
    with pytest.raises(ConfigError, match=message):
        config.load(AlignConfig, {**base, **settings})


def test_a_held_out_reward_needs_no_gradient() -> None:
    rewards = [
        {"name": "clip_text", "options": {"model": "toy:clip"}},
        {"name": "geneval", "held_out": True, "options": {"segmenter": "toy:segmenter", "clip": "toy:clip"}},
    ]
    found = config.load(AlignConfig, {"loss": {"kind": "draft"}, "rewards": rewards})
    assert isinstance(found.loss, DraftSettings)
