"""SARS and TDW: ranges, symmetry, the pole, the case split, the curriculum, and the shuffled-steps trap."""

import itertools
import math

import pytest
import torch

from pixrl.equations import clipped_surrogate, prompt_weight, shape_advantage, synergy
from pixrl.errors import InputError, ShapeError

from .helpers import close, draw, values

KINDS = ["tanh", "min", "max", "harmonic", "none"]
every_kind = pytest.mark.parametrize("kind", KINDS)
A, B = draw(400) * 2, draw(400, seed=1) * 2

# -- synergy -------------------------------------------------------------------------------------------------


@every_kind
def test_synergy_is_symmetric_and_sample_by_sample(kind: str) -> None:
    close(synergy(A, B, kind), synergy(B, A, kind).tolist())
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    close(synergy(A[order], B[order], kind), synergy(A, B, kind)[order].tolist())
    assert synergy(A.reshape(20, 20), B.reshape(20, 20), kind).shape == (20, 20)


def test_synergy_ranges() -> None:
    assert synergy(A, B, "tanh").abs().max() <= 1
    for kind in ("min", "max", "harmonic"):
        both_good = synergy(A.abs(), B.abs(), kind)
        assert (both_good >= torch.minimum(A.abs(), B.abs()) - 1e-12).all()
        assert (both_good <= torch.maximum(A.abs(), B.abs()) + 1e-12).all()
    assert (synergy(A, B, "min") <= synergy(A, B, "max")).all()
    assert not synergy(A, B, "none").any()


def test_tanh_is_positive_in_agreement_and_negative_in_conflict() -> None:
    assert torch.equal(synergy(A, B, "tanh").sign(), (A * B).sign())


# Customized-GRPO Eq. 10 and Table 3
@pytest.mark.parametrize(
    ("kind", "a", "b", "expected"),
    [
        ("tanh", 0.5, 2.0, math.tanh(1.0)),
        ("tanh", -1.0, 0.25, -math.tanh(0.25)),
        ("min", -1.0, 3.0, -1.0),
        ("max", -1.0, 3.0, 3.0),
        ("harmonic", 1.0, 3.0, 1.5),
        ("harmonic", -1.0, -3.0, -1.5),
        ("harmonic", 3.0, -1.0, -3.0),
        ("harmonic", 1.0, -3.0, 3.0),
        ("harmonic", 0.0, 2.0, 0.0),
        ("harmonic", 0.0, 0.0, 0.0),
        ("harmonic", 1e-9, 3e-9, 1.5e-9),
        ("none", 1.0, 1.0, 0.0),
    ],
)
def test_synergy_by_hand(kind: str, a: float, b: float, expected: float) -> None:
    assert synergy(values(a), values(b), kind).item() == pytest.approx(expected, rel=1e-9, abs=1e-20)
    tiny = synergy(values(a) * 1e-20, values(b) * 1e-20, "harmonic").item()
    assert tiny == pytest.approx(
        synergy(values(a), values(b), "harmonic").item() * 1e-20, rel=1e-9, abs=1e-40
    )


def test_the_harmonic_mean_has_no_pole() -> None:
    a = values(1.0, 1.0, 1.0, 1.0, 1e-30, 5.0)
    b = -a + values(0.0, 1e-12, -1e-12, 1e-3, 0.0, 0.0)
    mean = synergy(a, b, "harmonic")
    assert mean.isfinite().all()
    # at a = -b the denominator counts for a tenth of |a| + |b|: 2 a^2 / (0.2 a) = 10 a
    close(mean, [-10.0, -10.0, 10.0, -10.0, 0.0, -50.0], tol=0.02)
    bound = 10 * synergy(A.abs(), B.abs(), "harmonic")
    assert (synergy(A, B, "harmonic").abs() <= bound + 1e-12).all()
    guarded = (A + B).abs() < 0.1 * (A.abs() + B.abs())
    assert guarded.any()
    literal = 2 * A * B / (A + B)
    close(synergy(A, B, "harmonic")[~guarded], literal[~guarded].tolist())
    assert (synergy(A, B, "harmonic")[guarded].abs() < literal[guarded].abs()).all()


@every_kind
def test_synergy_gradients_match_finite_differences(kind: str) -> None:
    inputs = (values(0.5, -1.0, 2.0).requires_grad_(), values(1.5, 0.3, -1.0).requires_grad_())
    if kind != "none":
        assert torch.autograd.gradcheck(lambda a, b: synergy(a, b, kind), inputs)


def test_synergy_arguments_are_checked() -> None:
    with pytest.raises(ShapeError, match="a_prompt"):
        synergy(draw(16), draw(16, 1), "tanh")
    with pytest.raises(InputError, match="'tanh', 'min', 'max', 'harmonic', 'none'"):
        synergy(A, B, "mean")
    for kind in KINDS:
        assert synergy(A.half(), B.half(), kind).dtype == torch.float32


# -- shape_advantage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a_id", "a_prompt", "sign"),
    [
        (1.0, 0.5, 1),
        (1.0, -0.5, 1),
        (-1.0, 0.5, 1),
        (-1.0, -0.5, -1),
        (0.0, -0.5, -1),
        (0.0, 0.0, -1),
        (-0.5, 0.0, -1),
        (0.0, 1.0, 1),
    ],
)
def test_the_case_split_by_hand(a_id: float, a_prompt: float, sign: int) -> None:
    # Customized-GRPO Eq. 11; tanh vanishes where an advantage is 0, the others tell the cases apart there
    kinds = {"tanh": math.tanh(a_id * a_prompt), "max": max(a_id, a_prompt), "min": min(a_id, a_prompt)}
    for kind, s in kinds.items():
        expected = 0.3 * a_id + 0.7 * a_prompt + sign * 0.25 * s
        close(shape_advantage(values(a_id), values(a_prompt), 0.3, 0.7, 0.25, kind), [expected])


def test_without_synergy_it_is_the_naive_sum() -> None:
    naive = (0.4 * A + 0.6 * B).tolist()
    close(shape_advantage(A, B, 0.4, 0.6, 0.0), naive)
    close(shape_advantage(A, B, 0.4, 0.6, kind="none"), naive)


def test_agreement_is_amplified_and_conflict_is_punished() -> None:
    naive, shaped = 0.5 * A + 0.5 * B, shape_advantage(A, B, 0.5, 0.5)
    both_good, both_bad = (A > 0) & (B > 0), (A < 0) & (B < 0)
    assert (shaped[both_good] > naive[both_good]).all()
    assert (shaped[~both_good] < naive[~both_good]).all()
    assert both_bad.any()


def test_alpha_is_a_half_and_the_kind_tanh_by_default() -> None:
    close(shape_advantage(A, B, 0.3, 0.7), shape_advantage(A, B, 0.3, 0.7, 0.5, "tanh").tolist())


def test_independent_rewards_leave_a_mean_that_recentring_removes() -> None:
    a, b = draw(200_000), draw(200_000, seed=1)
    assert shape_advantage(a, b, 0.5, 0.5).mean().item() == pytest.approx(-0.11, abs=0.01)
    groups = shape_advantage(A.reshape(10, 40), B.reshape(10, 40), 0.3, 0.7, recenter=True)
    close(groups.mean(dim=1), [0.0] * 10)
    plain = shape_advantage(A.reshape(10, 40), B.reshape(10, 40), 0.3, 0.7)
    close(groups, (plain - plain.mean(dim=1, keepdim=True)).tolist())


def test_recentring_leaves_failed_samples_alone() -> None:
    a, b = draw(2, 4), draw(2, 4, seed=1)
    a[0, 1] = b[0, 1] = 0.0  # what group_advantages gives a failed sample
    valid = torch.tensor([[True, False, True, True], [False] * 4])
    got = shape_advantage(a, b, 0.3, 0.7, recenter=True, valid=valid)
    scored = shape_advantage(a, b, 0.3, 0.7)[0, [0, 2, 3]]
    close(got[0, [0, 2, 3]], (scored - scored.mean()).tolist())
    assert got[0, 1] == 0
    close(got[1], shape_advantage(a[1], b[1], 0.3, 0.7).tolist())


def test_weights_may_differ_by_sample() -> None:
    a, b = draw(2, 3), draw(2, 3, seed=1)
    w = values(0.1, 0.4, 0.9)
    got = shape_advantage(a, b, 1 - w, w, 0.0)
    close(got, (a * (1 - w) + b * w).tolist())
    close(
        shape_advantage(a, b, w[:2, None], 1 - w[:2, None], 0.0),
        (a * w[:2, None] + b * (1 - w[:2, None])).tolist(),
    )


def test_half_precision_is_shaped_in_float32() -> None:
    half = shape_advantage(A.half(), B.half(), 0.3, 0.7)
    assert half.dtype == torch.float32
    close(half, shape_advantage(A.half().float(), B.half().float(), 0.3, 0.7).tolist(), tol=1e-6)


def test_shape_advantage_arguments_are_checked() -> None:
    a = draw(16)
    with pytest.raises(ShapeError, match="a_prompt"):
        shape_advantage(a, draw(16, 1), 0.3, 0.7)
    with pytest.raises(ShapeError, match=r"w_id has shape \[16, 1\]"):
        shape_advantage(a, a, draw(16, 1), 0.7)
    with pytest.raises(ShapeError, match=r"w_prompt has shape \[3\]"):
        shape_advantage(a, a, 0.3, draw(3))
    with pytest.raises(InputError, match="alpha"):
        shape_advantage(a, a, 0.3, 0.7, -0.5)
    with pytest.raises(InputError, match="kind"):
        shape_advantage(a, a, 0.3, 0.7, kind="sum")
    with pytest.raises(InputError, match="recenter"):
        shape_advantage(a, a, 0.3, 0.7, valid=torch.ones(16, dtype=torch.bool))
    with pytest.raises(ShapeError, match="valid"):
        shape_advantage(a, a, 0.3, 0.7, recenter=True, valid=torch.ones(1, dtype=torch.bool))


def test_shaping_gradients_match_finite_differences() -> None:
    inputs = (values(0.5, -1.0, -2.0).requires_grad_(), values(1.5, 0.3, -1.0).requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: shape_advantage(a, b, 0.3, 0.7, recenter=True), inputs)


# -- prompt_weight -------------------------------------------------------------------------------------------


def test_the_three_phases() -> None:
    weights = [prompt_weight(step) for step in range(25)]
    assert all(isinstance(weight, float) for weight in weights)
    assert weights[:6] == [0.7] * 6
    assert weights[22:] == [0.3] * 3
    assert all(0.3 < late < early < 0.7 for early, late in itertools.pairwise(weights[6:22]))
    assert prompt_weight(14) == pytest.approx(0.5)


@pytest.mark.parametrize("step", range(6, 22))
def test_the_transition_by_hand(step: int) -> None:
    # Customized-GRPO Eq. 12: 0.3 + 0.4 (1 - sigmoid(0.8 (t - 14)))
    assert prompt_weight(step) == pytest.approx(0.3 + 0.4 / (1 + math.exp(0.8 * (step - 14))), abs=1e-12)


@pytest.mark.parametrize("edge", [6, 22])
@pytest.mark.parametrize("num_steps", [25, 50, 100])
def test_both_ends_of_the_transition_are_continuous(edge: int, num_steps: int) -> None:
    at = edge * num_steps / 25
    assert abs(prompt_weight(at - 1e-6, num_steps) - prompt_weight(at + 1e-6, num_steps)) < 1e-3
    # and the curve between the ends has no jump either
    fine = prompt_weight(torch.linspace(0, num_steps, 2001, dtype=torch.float64), num_steps)
    assert fine.diff().abs().max() < 5e-3
    assert (fine.diff() <= 0).all()


@pytest.mark.parametrize("num_steps", [10, 50])
def test_phases_scale_with_the_number_of_steps(num_steps: int) -> None:
    scale = num_steps / 25
    assert prompt_weight(6 * scale - 0.01, num_steps) == 0.7
    assert prompt_weight(6 * scale, num_steps) < 0.7
    assert prompt_weight(14 * scale, num_steps) == pytest.approx(0.5)
    assert prompt_weight(22 * scale - 0.01, num_steps) > 0.3
    assert prompt_weight(22 * scale, num_steps) == 0.3
    step = 16 * scale  # the steepness is per step and stays
    assert prompt_weight(step, num_steps) == pytest.approx(0.3 + 0.4 / (1 + math.exp(0.8 * 2 * scale)))


def test_other_bounds_and_edges() -> None:
    kwargs = {"w_max": 0.9, "w_min": 0.2, "start": 4, "end": 10, "steepness": 0.5, "center": 6.0}
    assert prompt_weight(3, **kwargs) == 0.9
    assert prompt_weight(10, **kwargs) == 0.2
    assert prompt_weight(4, **kwargs) == pytest.approx(0.2 + 0.7 / (1 + math.exp(-1.0)))
    assert prompt_weight(0, w_max=1.0, w_min=0.0) == 1
    assert prompt_weight(12, start=12, end=12) == 0.3
    assert prompt_weight(5, w_max=0.5, w_min=0.5) == 0.5


def test_inverted_swaps_the_bounds() -> None:
    for step in range(25):
        assert prompt_weight(step, inverted=True) == pytest.approx(1 - prompt_weight(step), abs=1e-12)
    assert prompt_weight(0, inverted=True, w_max=0.9, w_min=0.2) == 0.2
    assert prompt_weight(24, inverted=True, w_max=0.9, w_min=0.2) == 0.9


def test_tensors_of_steps_give_tensors() -> None:
    steps = torch.arange(25)
    weights = prompt_weight(steps)
    assert weights.dtype == torch.float32
    close(weights, [prompt_weight(step) for step in range(25)], tol=1e-6)
    assert prompt_weight(steps.reshape(5, 5).double()).shape == (5, 5)
    assert prompt_weight(steps.double()).dtype == torch.float64
    assert prompt_weight(torch.tensor(3)).shape == ()
    close(prompt_weight(steps.half()), weights.tolist(), tol=1e-6)


def test_prompt_weight_arguments_are_checked() -> None:
    for wrong in (-1, 25.5, math.nan):
        with pytest.raises(InputError, match=r"step must be in \[0, 25\]"):
            prompt_weight(wrong)
    with pytest.raises(InputError, match="step"):
        prompt_weight(torch.tensor([0, 26]))
    assert prompt_weight(25) == 0.3
    assert prompt_weight(0, 1) == 0.7
    with pytest.raises(InputError, match="num_steps"):
        prompt_weight(0, 0)
    for wrong in ({"w_max": 0.2}, {"w_max": 1.1}, {"w_min": -0.1}, {"start": 23}):
        with pytest.raises(InputError, match="w_min <= w_max"):
            prompt_weight(3, **wrong)


def test_shuffling_the_stored_steps_leaves_the_summed_gradient_unchanged() -> None:
    """The trap of the released code: a weight looked up by the position in a shuffled loop ignores time."""
    steps = torch.arange(25)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(3))
    a_id, a_prompt, scores = draw(4), draw(4, seed=1), draw(25, 4, seed=2)

    def gradient(visited: torch.Tensor, lookup: torch.Tensor) -> torch.Tensor:
        parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        for step, true_step in zip(visited.tolist(), lookup.tolist(), strict=True):
            weight = prompt_weight(true_step)
            advantage = shape_advantage(a_id, a_prompt, 1 - weight, weight)
            log_prob = parameter * scores[step]
            clipped_surrogate(log_prob, log_prob.detach(), advantage, 1e-4).sum().backward()
        assert parameter.grad is not None
        return parameter.grad

    in_order = gradient(steps, steps)
    close(gradient(steps[order], steps[order]), in_order.tolist())
    assert not torch.allclose(gradient(steps[order], steps), in_order)  # what the trap would do
