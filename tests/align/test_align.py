"""Collect and update on a tiny random SD3: what must hold for every combination of parts."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixrl import models
from pixrl.algorithms import make_loss
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage, group_std, reward_metrics
from pixrl.algorithms.exploration import NoiseOnly
from pixrl.algorithms.grpo import GRPOSettings, KLForm
from pixrl.algorithms.loss import LossSettings, Rollouts
from pixrl.algorithms.nft import NFTSettings, OldPolicy
from pixrl.algorithms.sampling import RolloutSettings, Samples
from pixrl.algorithms.trainer import Aligner, OptimizerSettings
from pixrl.errors import RunError
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import Slot
from tests.align.parts import (
    CLIPPED,
    NFT,
    ODE,
    SDE,
    aligner,
    groups,
    perturbed,
    same,
    scored,
    weights_of,
)
from tests.tolerance import GRADIENT, MODEL, PICTURE, agree, agree_after_adam, rounding

WEIGHTS = {"r": 1.0}
NAN = math.nan


def brightness(rollouts: Rollouts) -> torch.Tensor:
    return rollouts.images_BCHW.mean(dim=(1, 2, 3))


def one_step(found: Aligner, step: int = 0) -> dict[str, float]:
    rollouts = found.collect(groups(epoch=step), step)
    return found.update(rollouts, scored(brightness(rollouts)), WEIGHTS)


@pytest.mark.parametrize(
    ("exploring", "noise", "scale", "loss"),
    [
        *itertools.product([False], ["flow_sde", "dance", "cps"], ["group", "global"], [CLIPPED]),
        (True, "flow_sde", "group", CLIPPED),
        (True, "none", "group", NFT),
        (False, "none", "none", NFT),
        (False, "cps", "group", NFT),
    ],
)
def test_any_combination_of_parts_learns(
    policy: SD3Policy, exploring: bool, noise: str, scale: str, loss: LossSettings
) -> None:
    found = aligner(
        policy,
        loss,
        RolloutSettings(steps=4, noise=noise),
        exploration=perturbed() if exploring else NoiseOnly(),
        advantage=AdvantageSettings(scale=scale),
        noises=2,
    )
    before = weights_of(policy)
    metrics = one_step(found)
    after = weights_of(policy)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["grad_norm"] > 0
    assert not same(before, after)
    assert metrics["group_std"] > 0
    if loss is CLIPPED:
        assert metrics["ratio_mean"] == pytest.approx(1, abs=rounding(torch.float32, MODEL))
        assert metrics["ratio_max"] - metrics["ratio_min"] < 2 * rounding(torch.float32, MODEL)
    if exploring:
        assert {"anchor_cosine", "learned_prompts"} <= metrics.keys()


@pytest.mark.parametrize("exploring", [False, True])
@pytest.mark.parametrize(("loss", "sampling"), [(CLIPPED, SDE), (NFT, ODE)])
def test_the_micro_batch_does_not_matter(
    sd3_folder: object, exploring: bool, loss: LossSettings, sampling: RolloutSettings
) -> None:
    results, pictures = [], []
    for micro in ((1, 1), (4, 3), (99, 99)):
        policy = models.load(str(sd3_folder), device="cpu", dtype="float32")
        assert isinstance(policy, SD3Policy)
        policy.attach_lora(rank=4, alpha=8)
        start = weights_of(policy)
        exploration = perturbed() if exploring else NoiseOnly()
        found = aligner(policy, loss, sampling, exploration=exploration, micro=micro, updates=2, noises=3)
        rollouts = found.collect(groups(), 0)
        pictures.append(rollouts.images_BCHW)
        found.update(rollouts, scored(torch.arange(len(rollouts)).remainder(4)), WEIGHTS)
        results.append(weights_of(policy))
    assert all(agree(one, pictures[0], PICTURE) for one in pictures)
    assert all(agree_after_adam(one, results[0], start, GRADIENT) for one in results)


def test_samples_are_keyed_one_by_one(policy: SD3Policy) -> None:
    found = aligner(policy, micro=(2, 2))
    both = found.collect(groups(2), 0)
    second = aligner(policy, micro=(5, 5)).collect(groups(2)[1:], 0)
    assert agree(both.images_BCHW[3:], second.images_BCHW, PICTURE)
    assert both.samples.seeds[3:] == second.samples.seeds
    assert not agree(both.images_BCHW, found.collect(groups(2, epoch=1), 0).images_BCHW, PICTURE)


def test_a_group_can_share_its_start(policy: SD3Policy) -> None:
    apart, shared = (Samples.of(groups(2), 3, 1, 0, shared_start=how) for how in (False, True))
    assert len(set(apart.seeds)) == 6
    assert shared.seeds == (apart.seeds[0],) * 3 + (apart.seeds[3],) * 3
    assert shared.streams == apart.streams  # later noise stays each sample's own
    found = aligner(policy, CLIPPED, noises=3)
    found.method = replace(found.method, shared_start=True)
    rollouts = found.collect(groups(2), 0)
    first = rollouts.transitions[0].x_B.view(2, 3, *policy.latent_shape)
    assert torch.equal(first[:, 0], first[:, 1]) and torch.equal(first[:, 0], first[:, 2])
    assert not torch.equal(rollouts.x0_B[0], rollouts.x0_B[1])


def test_variants_share_their_first_noise_and_nothing_later(policy: SD3Policy) -> None:
    samples = aligner(policy, exploration=perturbed(3), noises=2).collect(groups(1), 0).samples
    assert samples.variant_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert samples.seeds[:2] == samples.seeds[2:4] == samples.seeds[4:]
    assert len(set(samples.streams)) == 6


def test_the_update_is_conditioned_on_the_anchor_alone(
    policy: SD3Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = aligner(policy, NFT, ODE, exploration=perturbed(3), noises=1)
    rollouts = found.collect(groups(2), 0)
    used = []
    original = type(policy).velocity

    def spy(self: SD3Policy, x: torch.Tensor, t: torch.Tensor, c: object) -> torch.Tensor:
        used.append(c.tokens_BLD)  # type: ignore[attr-defined]
        return original(self, x, t, c)  # type: ignore[arg-type]

    monkeypatch.setattr(type(policy), "velocity", spy)
    found.update(rollouts, scored(brightness(rollouts)), WEIGHTS)
    anchors = policy.encode([group.prompt for group in groups(2)]).tokens_BLD
    rows = torch.cat(used)
    assert len(rows) >= 2 * 3 * 3
    assert all(any(torch.equal(row, anchor) for anchor in anchors) for row in rows)


@pytest.mark.parametrize(("loss", "sampling"), [(CLIPPED, SDE), (NFT, ODE)])
def test_samples_come_from_the_right_slot(
    policy: SD3Policy, loss: LossSettings, sampling: RolloutSettings
) -> None:
    assert policy.lora is not None
    found = aligner(policy, loss, sampling)
    before = found.collect(groups(1), 0).images_BCHW
    with torch.no_grad():
        for name, parameter in policy.denoiser.named_parameters():
            if "lora_B.current" in name:
                parameter.normal_(0, 0.3)
    changed = not agree(before, found.collect(groups(1), 0).images_BCHW, PICTURE)
    assert changed == (loss is CLIPPED)


def test_failed_samples_are_dropped_and_change_nothing_else(policy: SD3Policy) -> None:
    found = aligner(policy)
    rollouts = found.collect(groups(2), 0)
    values = torch.tensor([0.1, 0.9, NAN, 0.3, 0.5, 0.4])
    metrics = found.update(rollouts, scored(values), WEIGHTS)
    assert metrics["failed_share"] == pytest.approx(1 / 6)
    assert metrics["reward/r/mean"] == pytest.approx(values.nanmean().item(), rel=rounding(torch.float32, 16))
    assert all(math.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize(("loss", "sampling"), [(CLIPPED, SDE), (NFT, ODE)])
@pytest.mark.parametrize(
    "values", [[0.5] * 6, [NAN] * 6, [NAN, NAN, NAN, 0.2, 0.4, 0.9], [NAN, NAN, 0.5, 0.5, 0.5, 0.5]]
)
def test_groups_without_a_signal_poison_nothing(
    policy: SD3Policy, loss: LossSettings, sampling: RolloutSettings, values: list[float]
) -> None:
    found = aligner(policy, loss, sampling)
    for step in range(2):
        metrics = found.update(found.collect(groups(2), step), scored(values), WEIGHTS)
        assert (
            metrics["zero_std_share"] == pytest.approx(1.0)
            or not math.isfinite(metrics["zero_std_share"])
            or (values[-1] == 0.9)
        )
    assert all(bool(x.isfinite().all()) for x in weights_of(policy).values())


@pytest.mark.parametrize(("loss", "sampling"), [(CLIPPED, SDE), (NFT, ODE)])
def test_groups_without_a_signal_can_be_left_out(
    policy: SD3Policy, loss: LossSettings, sampling: RolloutSettings
) -> None:
    """The same gradient's direction as with them, from the other group's terms alone."""
    flat_and_not = scored([0.5, 0.5, 0.5, 0.2, 0.9, math.nan])
    gradients, terms = [], []
    for skip in (False, True):
        found = aligner(policy, loss, sampling, advantage=AdvantageSettings(skip_flat=skip), lr=1e-12)
        found.slots.blend(Slot.OLD, Slot.CURRENT, 0.0)  # off it, NFT pulls every sample back
        rollouts = found.collect(groups(2), 0)
        rows = found._rows(rollouts, torch.tensor([[[0.0, 0, 0], [-1, 1, math.nan]]]), 0)
        terms.append(rows)
        found.update(rollouts, flat_and_not, WEIGHTS)
        gradients.append(torch.cat([p.grad.flatten() for p in found.parameters if p.grad is not None]))
    assert terms == [[0, 1, 2, 3, 4], [3, 4]]
    directions = [gradient / gradient.norm() for gradient in gradients]
    assert agree(*directions, GRADIENT)


def test_a_group_that_differs_at_some_steps_alone_is_not_flat(policy: SD3Policy) -> None:
    """With time weights of 1:0 a reward that is flat hides the other one at the steps that are its own."""
    found = aligner(policy, advantage=AdvantageSettings(skip_flat=True))
    rollouts = found.collect(groups(2), 0)
    late = torch.tensor([[[0.0, 0, 0], [0, 0, 0]], [[-1, 0, 1], [0, 0, math.nan]]])
    late[0, 1, 2] = math.nan
    assert found._rows(rollouts, late, 0) == [0, 1, 2]


def test_one_sample_groups(policy: SD3Policy) -> None:
    found = aligner(policy, noises=1)
    rollouts = found.collect(groups(2), 0)
    metrics = found.update(rollouts, scored([0.3, 0.9]), WEIGHTS)
    assert metrics["zero_std_share"] == 1
    assert all(bool(x.isfinite().all()) for x in weights_of(policy).values())


def test_no_group_at_all(policy: SD3Policy) -> None:
    """A process that has no share of a step takes part all the same."""
    for exploration in (NoiseOnly(), perturbed()):
        found = aligner(policy, exploration=exploration)
        rollouts = found.collect([], 0)
        assert len(rollouts) == 0
        assert len(rollouts.transitions) == 3


def test_a_loss_that_is_not_finite_skips_the_update_and_at_last_stops(
    policy: SD3Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = aligner(policy, NFT, ODE, max_skipped=1)
    rollouts = found.collect(groups(2), 0)
    scores = scored(brightness(rollouts))
    before = weights_of(policy)
    original = type(policy).velocity
    monkeypatch.setattr(type(policy), "velocity", lambda self, x, t, c: original(self, x, t, c) * NAN)
    metrics = found.update(rollouts, scores, WEIGHTS)
    assert metrics["skipped_updates"] == 1
    assert same(before, weights_of(policy))
    with pytest.raises(RunError, match=r"2 updates in a row .* above optimizer\.max_skipped \(1\)"):
        found.update(rollouts, scores, WEIGHTS)
    monkeypatch.setattr(type(policy), "velocity", original)
    found.skipped_in_a_row = 0
    assert found.update(rollouts, scores, WEIGHTS)["skipped_updates"] == 0


def test_the_learning_rate_rises_and_falls(policy: SD3Policy) -> None:
    found = aligner(policy, NFT, ODE, lr=8e-3, warmup=1, decay_steps=4)
    rates, moved = [], []
    for step in range(5):
        before = weights_of(policy)
        rollouts = found.collect(groups(1, epoch=step), step)
        rates.append(found.update(rollouts, scored([1.0, 0.0, 0.5]), {"r": 1.0})["lr"])
        moved.append(not same(before, weights_of(policy)))
    assert rates == pytest.approx([4e-3, 6e-3, 4e-3, 2e-3, 0.0])
    assert moved[:4] == [True] * 4


def test_a_rate_that_falls_over_all_of_a_run_takes_the_runs_steps() -> None:
    falling = OptimizerSettings(lr=8e-3, decay_steps="all")
    assert [falling.of_run(4).rate(step) for step in range(5)] == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3, 0.0])
    assert falling.of_run(8).rate(4) == pytest.approx(4e-3)
    fixed = OptimizerSettings(lr=8e-3, decay_steps=16)
    assert fixed.of_run(4) == fixed
    with pytest.raises(ValueError, match="needs a number of steps"):
        falling.rate(0)


def test_permuted_transitions_give_the_same_gradient(policy: SD3Policy) -> None:
    from dataclasses import replace

    found = aligner(policy, GRPOSettings(clip=0.01, kl=0.04))
    rollouts = found.collect(groups(2), 0)
    gradients = []
    for order in ((0, 1, 2), (2, 0, 1)):
        turned = replace(rollouts, transitions=tuple(rollouts.transitions[place] for place in order))
        found.optimizer.zero_grad()
        for part in range(3):
            terms = found.method.loss.terms(policy, turned, range(6), torch.arange(6.0) - 2.5, part, True)
            terms.loss_B.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in found.parameters if p.grad is not None]))
    assert agree(*gradients, GRADIENT)


def test_nft_trains_at_some_levels_alone_when_told(policy: SD3Policy) -> None:
    some = aligner(policy, NFTSettings(timesteps=2, levels=(1, 3)), ODE)
    drawn = some.collect(groups(), 0)
    loss, rows = some.method.loss, range(len(drawn))
    parts = [loss.steps(drawn, rows, part) for part in range(loss.parts(drawn))]
    assert all(sorted(steps) == [1, 2] for steps in zip(*parts, strict=True))
    assert len(set(parts[0])) == 2


def test_another_schedule_is_refused(policy: SD3Policy) -> None:
    found = aligner(policy)
    rollouts = found.collect(groups(1), 0)
    policy.pipeline.scheduler.register_to_config(shift=1.0)
    policy.pipeline.scheduler.set_shift(1.0)
    with pytest.raises(RunError, match="share one schedule"):
        found.update(rollouts, scored([0.1, 0.2, 0.3]), WEIGHTS)


def test_the_old_policy_follows_as_published() -> None:
    kinds = {
        kind: make_loss(NFTSettings(old_policy=kind))
        for kind in (OldPolicy.FOLLOW, OldPolicy.SLOW, OldPolicy.LATE)
    }
    assert [kinds[OldPolicy.FOLLOW].old_decay(step) for step in (0, 500)] == [0, 0]
    assert [kinds[OldPolicy.SLOW].old_decay(step) for step in (0, 100, 900)] == [0, 0.1, 0.5]
    assert [kinds[OldPolicy.LATE].old_decay(step) for step in (75, 95)] == pytest.approx([0, 0.15])
    constant = make_loss(NFTSettings(old_policy=OldPolicy.CONSTANT, old_decay=0.3))
    assert constant.old_decay(5) == 0.3
    assert make_loss(CLIPPED).old_decay(5) is None


def test_the_first_update_is_never_clipped(sd3_folder: Path) -> None:
    """Why loss.clip is refused with one update a step: any range gives the weights of none. With two it acts.

    The narrow range is still wider than rounding makes a ratio.
    """
    narrow = 10 * rounding(torch.float32, MODEL)
    ends: dict[tuple[float | None, int], dict[str, Tensor]] = {}
    for clip in (None, narrow, 0.5):
        for updates in (1, 2):
            policy = models.load(sd3_folder, device="cpu", dtype="float32")
            assert isinstance(policy, SD3Policy)
            policy.attach_lora(rank=4, alpha=8)
            start = weights_of(policy)
            found = aligner(policy, GRPOSettings(clip=clip), updates=updates)
            for step in range(2):
                rollouts = found.collect(groups(2), step)
                found.update(rollouts, scored([0.1, 0.9, 0.4, 0.2, 0.3, 0.8]), WEIGHTS)
            ends[clip, updates] = weights_of(policy)
    assert agree_after_adam(ends[None, 1], ends[narrow, 1], start, GRADIENT)
    assert agree_after_adam(ends[None, 1], ends[0.5, 1], start, GRADIENT)
    assert not agree_after_adam(ends[0.5, 2], ends[narrow, 2], start, GRADIENT)


def test_losses_need_fitting_rollouts() -> None:
    with pytest.raises(ValueError, match=r"sampling\.noise to flow_sde"):
        CLIPPED.check_sampling(ODE)
    with pytest.raises(ValueError, match="9, but 4 sampling steps"):
        NFTSettings().check_sampling(ODE)
    NFT.check_sampling(ODE)
    with pytest.raises(ValueError, match="kl_form has no effect"):
        GRPOSettings(kl_form=KLForm.EXACT)
    with pytest.raises(ValueError, match="old_decay has no effect"):
        NFTSettings(old_decay=0.3)
    with pytest.raises(ValueError, match="needs old_decay"):
        NFTSettings(old_policy="constant")


def test_the_two_forms_of_the_kl_differ_by_dt(policy: SD3Policy) -> None:
    with torch.no_grad():
        for name, parameter in policy.denoiser.named_parameters():
            if "lora_B.current" in name:
                parameter.normal_(0, 0.1)
    found = {}
    for form in KLForm:
        one = aligner(policy, GRPOSettings(clip=0.1, kl=1, kl_form=form))
        rollouts = one.collect(groups(1), 0)
        terms = one.method.loss.terms(policy, rollouts, [0, 1], torch.zeros(2), 1, False)
        found[form] = terms.figures["kl"]
    dt = rollouts.plan.dt(rollouts.transitions[1].number)
    assert agree(found[KLForm.FLOW_GRPO], found[KLForm.EXACT] * -dt, MODEL)
    assert bool((found[KLForm.EXACT] > 0).all())


def test_resumed_from_its_state_it_goes_on_the_same(sd3_folder: object) -> None:
    def fresh() -> Aligner:
        policy = models.load(str(sd3_folder), device="cpu", dtype="float32")
        assert isinstance(policy, SD3Policy)
        policy.attach_lora(rank=4, alpha=8)
        return aligner(policy, NFT, ODE, exploration=perturbed())

    whole = fresh()
    for step in range(3):
        one_step(whole, step)
    first = fresh()
    one_step(first, 0)
    second = fresh()
    second.restore(first.tensors(), first.state())
    for step in (1, 2):
        one_step(second, step)
    assert same(whole.tensors(), second.tensors())


def test_advantages_of_several_rewards() -> None:
    small = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]])
    settings = AdvantageSettings(eps=0, clamp=None)
    one = GroupAdvantage(settings)({"a": small}, {"a": 1.0}, 1)[0]
    both = GroupAdvantage(settings)(
        {"a": small, "b": 1000 * small, "held": small * NAN}, {"a": 0.7, "b": 0.3}, 1
    )[0]
    assert agree(one, both, 64)
    assert both[1].tolist() == [0, 0, 0]
    failed = small.clone()
    failed[0, 2] = NAN
    mixed = GroupAdvantage(settings)({"a": small, "b": failed}, {"a": 1.0, "b": 1.0}, 1)[0]
    assert mixed[0].isnan().tolist() == [False, False, True]
    assert agree(mixed[0, :2], torch.tensor([-2.0, 2.0]), 64)
    clamped = GroupAdvantage(AdvantageSettings(clamp=5))({"a": small}, {"a": 10.0}, 1)[0]
    assert clamped.abs().max() == 5
    with pytest.raises(RunError, match="No scores of the reward 'c'"):
        GroupAdvantage(settings)({"a": small}, {"c": 1.0}, 1)[0]


def test_reward_metrics() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.5, 0.5], [NAN, 0.2], [NAN, NAN]])
    metrics = reward_metrics({"a": rewards, "b": torch.ones(4, 2)}, {"a": 2.0})
    assert metrics["group_std"] == pytest.approx(1 / 3)
    assert metrics["zero_std_share"] == pytest.approx(2 / 3)
    assert metrics["failed_share"] == pytest.approx(3 / 8)
    assert metrics["reward/b/mean"] == 1
    assert group_std(rewards).isnan().tolist() == [False, False, False, True]
