"""Advantages: order, invariance, degenerate groups, failed samples, numbers by hand."""

import math
import statistics

import pytest
import torch

from pixrl.equations import group_advantages, leave_one_out
from pixrl.errors import InputError, ShapeError

from .helpers import close, draw

NAN = math.nan
SCALES = ["group", "global", "none"]
every_scale = pytest.mark.parametrize("scale", SCALES)


@every_scale
def test_groups_are_centred_and_ranks_are_kept(scale: str) -> None:
    rewards = draw(4, 6) * 3 + draw(4, 1, seed=1)
    advantages = group_advantages(rewards, scale)
    assert advantages.shape == rewards.shape
    close(advantages.sum(dim=1), [0.0] * 4)
    assert torch.equal(advantages.argsort(dim=1), rewards.argsort(dim=1))


@every_scale
def test_a_constant_added_to_a_group_changes_nothing_but_the_global_spread(scale: str) -> None:
    rewards = draw(3, 5)
    everywhere = group_advantages(rewards + 7, scale)
    close(everywhere, group_advantages(rewards, scale).tolist())
    one_group = rewards + torch.tensor([[0.0], [5.0], [0.0]])
    same = torch.allclose(group_advantages(one_group, scale), group_advantages(rewards, scale))
    assert same is (scale != "global")


@every_scale
def test_the_order_of_samples_and_prompts_does_not_matter(scale: str) -> None:
    rewards = draw(3, 5)
    columns, rows = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 1])
    shuffled = group_advantages(rewards[rows][:, columns], scale)
    close(shuffled, group_advantages(rewards, scale)[rows][:, columns].tolist())


def test_the_spread_divides() -> None:
    rewards = draw(4, 6) * torch.tensor([[0.5], [1.0], [2.0], [4.0]], dtype=torch.float64)
    by_group = group_advantages(rewards, "group", eps=0.0)
    close(by_group.pow(2).mean(dim=1), [1.0] * 4)  # population deviation one
    centred = group_advantages(rewards, "none")
    close(centred, (rewards - rewards.mean(dim=1, keepdim=True)).tolist())
    by_batch = group_advantages(rewards, "global", eps=0.0)
    close(by_batch, (centred / statistics.pstdev(rewards.flatten().tolist())).tolist())


def test_by_hand() -> None:
    # Customized-GRPO Eq. 8. Rewards 1, 2, 3, 6: mean 3, deviations -2, -1, 0, 3, population variance 14 / 4
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [4.0, 4.0, 4.0, 4.0]], dtype=torch.float64)
    std = math.sqrt(3.5)
    row = [value / (std + 1e-4) for value in (-2, -1, 0, 3)]
    close(group_advantages(rewards), [row, [0.0] * 4])
    # the batch: mean 28 / 8 = 3.5, squares 6.25 + 2.25 + 0.25 + 6.25 + 4 * 0.25 = 16, variance 2
    row = [value / (math.sqrt(2) + 1e-4) for value in (-2, -1, 0, 3)]
    close(group_advantages(rewards, "global"), [row, [0.0] * 4])
    close(group_advantages(rewards, "none"), [[-2.0, -1.0, 0.0, 3.0], [0.0] * 4])
    close(group_advantages(rewards, "group", eps=0.5)[0], [value / (std + 0.5) for value in (-2, -1, 0, 3)])
    close(group_advantages(rewards, "global", eps=0.5)[0, 3], 3 / (math.sqrt(2) + 0.5))


def test_clip_bounds_both_sides() -> None:
    rewards = torch.tensor([[0.0] * 99 + [1.0], [0.0] + [1.0] * 99])
    advantages = group_advantages(rewards, clip=5.0)
    assert group_advantages(rewards).abs().max() > 9
    assert advantages.max() == 5
    assert advantages.min() == -5
    assert group_advantages(rewards, clip=0.5).abs().max() == 0.5


@every_scale
@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("value", [0.0, 0.1, 26.3, -1e6, 1e-30])
def test_equal_rewards_give_exact_zeros(scale: str, eps: float, value: float) -> None:
    for groups, samples in ((1, 3), (2, 7), (3, 1)):
        rewards = torch.full((groups, samples), value, dtype=torch.float32)
        assert torch.equal(group_advantages(rewards, scale, eps), torch.zeros(groups, samples))
        assert torch.equal(leave_one_out(rewards), torch.zeros(groups, samples))


@every_scale
def test_a_failed_sample_is_left_out_and_gets_zero(scale: str) -> None:
    rewards = torch.tensor([[1.0, NAN, 2.0, 6.0], [3.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    advantages = group_advantages(rewards, scale)
    assert advantages.isfinite().all()
    assert advantages[0, 1] == 0
    kept = rewards[:1, [0, 2, 3]]
    if scale == "global":
        spread = statistics.pstdev([1.0, 2.0, 6.0, 3.0, 0.0, 1.0, 0.5]) + 1e-4
        close(advantages[:1, [0, 2, 3]], ((kept - 3) / spread).tolist())
    else:
        close(advantages[:1, [0, 2, 3]], group_advantages(kept, scale).tolist())
        close(advantages[1:], group_advantages(rewards[1:], scale).tolist())


@every_scale
def test_groups_that_failed_altogether_or_but_for_one(scale: str) -> None:
    rewards = torch.tensor([[NAN, NAN, NAN], [NAN, 4.0, NAN], [4.0, NAN, 4.0]])
    for advantages in (group_advantages(rewards, scale), leave_one_out(rewards)):
        assert torch.equal(advantages, torch.zeros(3, 3))
    assert torch.equal(group_advantages(rewards[:1], scale), torch.zeros(1, 3))


def test_leave_one_out_is_the_distance_to_the_others() -> None:
    rewards = draw(3, 5)
    others = torch.stack([rewards[:, [j for j in range(5) if j != i]].mean(dim=1) for i in range(5)], dim=1)
    close(leave_one_out(rewards), (rewards - others).tolist())


def test_leave_one_out_by_hand() -> None:
    # 1 - 4, 2 - 3.5, 6 - 1.5; with a failure among them the others are the two scored ones
    close(leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])), [[-3.0, -1.5, 4.5]], tol=1e-6)
    close(leave_one_out(torch.tensor([[1.0, NAN, 6.0]])), [[-5.0, 0.0, 5.0]], tol=1e-6)


def test_large_rewards_keep_their_small_differences() -> None:
    rewards = torch.tensor([[1000.0, 1000.25, 1000.5]])
    close(group_advantages(rewards, "none"), [[-0.25, 0.0, 0.25]], tol=0)


@pytest.mark.parametrize("function", [group_advantages, leave_one_out])
def test_dtypes(function) -> None:
    rewards = draw(2, 4)
    assert function(rewards).dtype == torch.float64
    assert function(rewards.bfloat16()).dtype == torch.float32
    assert function(torch.tensor([[0, 1, 1]])).dtype == torch.float32


@every_scale
def test_half_precision_is_computed_in_float32(scale: str) -> None:
    rewards = draw(6, 24).bfloat16()
    close(group_advantages(rewards, scale), group_advantages(rewards.float(), scale).tolist(), tol=1e-6)
    close(leave_one_out(rewards), leave_one_out(rewards.float()).tolist(), tol=1e-6)


@pytest.mark.parametrize("scale", ["group", "global"])
def test_without_eps_the_scale_of_the_rewards_does_not_matter(scale: str) -> None:
    rewards = draw(3, 5)
    tiny = group_advantages(rewards * 1e-20, scale, eps=0.0)
    close(tiny, group_advantages(rewards, scale, eps=0.0).tolist())


@pytest.mark.parametrize("function", [group_advantages, leave_one_out])
def test_bad_rewards_are_refused(function) -> None:
    for wrong in (draw(4), draw(2, 3, 1)):
        with pytest.raises(ShapeError, match=r"\[P, G\]"):
            function(wrong)
    for infinite in (math.inf, -math.inf):
        with pytest.raises(InputError, match="infinite"):
            function(torch.tensor([[0.0, infinite], [1.0, 2.0]]))


def test_options_are_checked() -> None:
    rewards = draw(2, 3)
    with pytest.raises(InputError, match="'group', 'global', 'none'"):
        group_advantages(rewards, "batch")
    with pytest.raises(InputError, match="eps"):
        group_advantages(rewards, eps=-1e-4)
    for wrong in (0.0, -5.0):
        with pytest.raises(InputError, match="clip"):
            group_advantages(rewards, clip=wrong)
