"""E2PO: what is perturbed, the two losses, the projection, and when variants steer."""

import math

import pytest
import torch

from pixrl.equations import (
    anchor_loss,
    content_mask,
    diversity_loss,
    perturb,
    perturbation_objective,
    project_delta,
    variant_weight,
)
from pixrl.errors import InputError, ShapeError

from .helpers import close, draw, values

# -- content_mask and perturb --------------------------------------------------------------------------------


def test_content_is_what_is_not_start_end_or_padding() -> None:
    ids = torch.tensor([[49406, 320, 1125, 49407, 49407], [49406, 49407, 49407, 49407, 49407]])
    wanted = [[False, True, True, False, False], [False] * 5]
    for special in ((49406, 49407), {49407, 49406}, iter([49406, 49407])):
        mask = content_mask(ids, special)
        assert mask.dtype == torch.bool
        assert mask.tolist() == wanted
    assert content_mask(ids.int(), [49406, 49407]).tolist() == wanted
    assert content_mask(ids, []).all()
    with pytest.raises(ShapeError, match=r"\[B, L\]"):
        content_mask(ids[0], [49406])


def test_content_moves_by_delta_and_the_rest_stays() -> None:
    embeddings, delta = draw(5, 3), draw(5, 3, seed=1)
    delta[0] = math.inf  # not even looked at
    mask = torch.tensor([False, True, True, False, True])
    moved = perturb(embeddings, delta, mask)
    close(moved[mask], (embeddings + delta)[mask].tolist())
    assert torch.equal(moved[~mask], embeddings[~mask])


def test_all_variants_at_once() -> None:
    embeddings, delta = draw(5, 3), draw(4, 5, 3, seed=1)
    mask = torch.tensor([False, True, True, False, True])
    together = perturb(embeddings, delta, mask)
    assert together.shape == (4, 5, 3)
    for k in range(4):
        assert torch.equal(together[k], perturb(embeddings, delta[k], mask))
    masks = torch.stack([mask, ~mask])
    assert torch.equal(
        perturb(draw(2, 5, 3), delta[:2], masks)[1], perturb(draw(2, 5, 3)[1], delta[1], ~mask)
    )


def test_only_content_has_a_gradient() -> None:
    delta = draw(5, 3).requires_grad_()
    mask = torch.tensor([False, True, True, False, True])
    perturb(draw(5, 3, seed=1), delta, mask).sum().backward()
    assert delta.grad is not None
    close(delta.grad, (mask[:, None] * torch.ones(5, 3)).tolist())


def test_perturb_arguments_are_checked() -> None:
    embeddings, mask = draw(5, 3), torch.ones(5, dtype=torch.bool)
    for wrong in (draw(5, 1), draw(1, 3), draw(3), draw(3, 5)):
        with pytest.raises(ShapeError, match="delta"):
            perturb(embeddings, wrong, mask)
    with pytest.raises(ShapeError, match="delta"):
        perturb(embeddings[0], embeddings, mask)
    with pytest.raises(ShapeError, match="delta"):
        perturb(embeddings[0], embeddings[0], mask[0])
    for wrong in (mask[:1], mask[:, None], mask[0]):
        with pytest.raises(ShapeError, match="mask"):
            perturb(embeddings, embeddings, wrong)
    with pytest.raises(InputError, match="bool"):
        perturb(embeddings, embeddings, mask.float())
    assert perturb(embeddings.half(), embeddings.half(), mask).dtype == torch.float32


# -- the two losses ------------------------------------------------------------------------------------------


def at_angles(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane; the cosine of two is that of the difference of their angles."""
    return torch.stack([values(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in degrees])


def test_diversity_by_hand() -> None:
    # E2PO Eq. 11, pairs (0, 60), (0, 180), (60, 180): cosines 1/2, -1, -1/2
    close(diversity_loss(at_angles(0, 60, 180)), (0.5 - 1 - 0.5) / 3)
    close(diversity_loss(at_angles(0, 90)), 0.0)
    close(diversity_loss(at_angles(0, 60)), 0.5)
    close(diversity_loss(at_angles(45, 45, 45, 45)), 1.0)


def test_diversity_knows_neither_order_nor_length() -> None:
    h = draw(5, 7)
    base = diversity_loss(h)
    assert base.shape == ()
    close(diversity_loss(h[[3, 0, 4, 1, 2]]), base.item())
    close(diversity_loss(h * values(0.1, 1.0, 3.0, 50.0, 1e3)[:, None]), base.item())
    assert -1 <= base <= 1


def test_one_variant_has_no_pairs() -> None:
    h = draw(1, 7).requires_grad_()
    loss = diversity_loss(h)
    close(loss.detach(), 0.0)
    loss.backward()
    assert h.grad is not None
    assert not h.grad.any()


def test_descent_on_diversity_drives_variants_apart() -> None:
    h = draw(4, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(diversity_loss(h), h)
    assert diversity_loss(h - 0.01 * gradient) < diversity_loss(h)


def test_anchor_by_hand() -> None:
    # E2PO Eq. 12: cos 60 = 0.5 misses 0.8 by 0.3, less the margin 0.29; cos 0 = 1 misses by 0.2, less it 0.19
    h0 = at_angles(0)[0]
    close(anchor_loss(at_angles(60), h0), 0.29)
    close(anchor_loss(at_angles(60, -60, 0), h0), (0.29 + 0.29 + 0.19) / 3)
    close(anchor_loss(at_angles(180), h0), 1.79)
    close(anchor_loss(at_angles(60), h0, target=0.3, margin=0.1), 0.1)


def test_inside_the_band_nothing_pulls() -> None:
    h0 = at_angles(0)[0]
    inside = at_angles(math.degrees(math.acos(0.805)), math.degrees(math.acos(0.795))).requires_grad_()
    loss = anchor_loss(inside, h0)
    close(loss.detach(), 0.0)
    loss.backward()
    assert inside.grad is not None
    assert not inside.grad.any()
    assert anchor_loss(at_angles(math.degrees(math.acos(0.815))), h0) > 0
    assert anchor_loss(at_angles(math.degrees(math.acos(0.785))), h0) > 0


def test_anchor_knows_neither_order_nor_length() -> None:
    h, h0 = draw(5, 7), draw(7, seed=1)
    base = anchor_loss(h, h0)
    assert base.shape == ()
    close(anchor_loss(h[[3, 0, 4, 1, 2]] * 5, h0 * 0.1), base.item())


def test_losses_match_finite_differences() -> None:
    inputs = (draw(3, 4).requires_grad_(), draw(4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda h, h0: (diversity_loss(h), anchor_loss(h, h0)), inputs)


def test_losses_check_shapes_and_widen() -> None:
    for wrong in (draw(4), draw(2, 3, 4), draw(0, 4)):
        with pytest.raises(ShapeError, match="h_KD"):
            diversity_loss(wrong)
        with pytest.raises(ShapeError, match="h_KD"):
            anchor_loss(wrong, draw(4))
    for wrong in (draw(1, 4), draw(3), draw(1)):
        with pytest.raises(ShapeError, match="h0_D"):
            anchor_loss(draw(3, 4), wrong)
    assert diversity_loss(draw(3, 4).half()).dtype == torch.float32
    assert anchor_loss(draw(3, 4).half(), draw(4).half()).dtype == torch.float32


def test_the_objective_weighs_diversity_unless_told_otherwise() -> None:
    h, h0 = draw(3, 4), draw(4, seed=1)
    anchor, diversity = anchor_loss(h, h0).item(), diversity_loss(h).item()
    close(perturbation_objective(h, h0), anchor + 50 * diversity)
    close(perturbation_objective(h, h0, 3.0), anchor + 3 * diversity)
    close(perturbation_objective(h, h0, 3.0, weighted="anchor"), 3 * anchor + diversity)
    other = anchor_loss(h, h0, 0.3, 0.2).item()
    close(perturbation_objective(h, h0, target=0.3, margin=0.2), other + 50 * diversity)
    close(perturbation_objective(h, h0, 1.0), perturbation_objective(h, h0, 1.0, weighted="anchor").item())
    close(
        perturbation_objective(h, h0, 0.0), perturbation_objective(h, h0, 0.0, target=0.8, margin=0.01).item()
    )
    with pytest.raises(InputError, match="'diversity', 'anchor'"):
        perturbation_objective(h, h0, weighted="both")


# -- project_delta -------------------------------------------------------------------------------------------


def test_long_deltas_shrink_to_the_bound_and_short_ones_stay() -> None:
    delta = draw(2, 6, 4) * values(1e-3, 1e-2, 1.0, 10.0, 100.0, 0.0)[:, None]
    short = delta.norm(dim=-1) <= 0.05
    assert short.any()
    assert not short.all()
    projected = project_delta(delta)
    assert torch.equal(projected[short], delta[short])
    close(projected.norm(dim=-1)[~short], [0.05] * int((~short).sum()))
    close(torch.cosine_similarity(projected, delta, dim=-1)[~short], [1.0] * int((~short).sum()))
    close(project_delta(projected), projected.tolist())


def test_the_relative_bound_follows_each_token() -> None:
    embeddings, delta = draw(6, 4), draw(2, 6, 4, seed=1) * 10
    projected = project_delta(delta, 0.2, embeddings)
    close(projected.norm(dim=-1), (0.2 * embeddings.norm(dim=-1)).expand(2, 6).tolist())
    assert torch.equal(project_delta(delta * 1e-4, 0.2, embeddings), delta * 1e-4)


def test_a_token_without_an_embedding_is_not_perturbed_relative_to_it() -> None:
    delta = torch.stack((values(3.0, 4.0), values(0.0, 0.0)))
    close(project_delta(delta, 0.5, torch.zeros(2, 2)), [[0.0, 0.0], [0.0, 0.0]])


def test_project_by_hand() -> None:
    # (3, 4) has norm 5: to norm 1 it is (0.6, 0.8); half of an embedding of norm 2 is the same bound
    close(project_delta(values(3, 4)[None], 1.0), [[0.6, 0.8]])
    close(project_delta(values(3, 4)[None], 0.5, values(0, 2)[None]), [[0.6, 0.8]])


def test_project_arguments_are_checked() -> None:
    with pytest.raises(InputError, match="max_norm"):
        project_delta(draw(2, 3), 0.0)
    for wrong in (draw(1, 3), draw(2, 1), draw(4, 2, 3)):
        with pytest.raises(ShapeError, match="embeddings_LD"):
            project_delta(draw(4, 2, 3), 0.1, wrong)
    assert project_delta(draw(2, 3).half()).dtype == torch.float32
    assert project_delta(draw(2, 3).half(), 0.1, draw(2, 3)).dtype == torch.float32


# -- variant_weight ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "tau", "expected"),
    # E2PO Eq. 13 with tau = 0.4: variants steer from t = 1 down to 0.6
    [
        (1.0, 0.4, 1.0),
        (0.9, 0.4, 0.75),
        (0.8, 0.4, 0.5),
        (0.6, 0.4, 0.0),
        (0.3, 0.4, 0.0),
        (0.25, 1.0, 0.25),
        (0.9, 0.2, 0.5),
    ],
)
def test_variant_weight_by_hand(t: float, tau: float, expected: float) -> None:
    weight = variant_weight(t, tau)
    assert isinstance(weight, float)
    assert weight == pytest.approx(expected, abs=1e-12)


def test_variants_steer_in_the_first_four_tenths_by_default_and_never_by_more_than_one() -> None:
    assert variant_weight(0.8) == pytest.approx(0.5)
    assert all(variant_weight(1.0, tenth / 10) <= 1 for tenth in range(1, 11))
    assert variant_weight(1.0, 0.3) == 1


def test_variant_weight_rises_with_noise_and_takes_tensors() -> None:
    t = torch.linspace(0, 1, 101)
    weights = variant_weight(t)
    assert weights.dtype == torch.float32
    assert (weights.diff() >= 0).all()
    close(weights, [variant_weight(number) for number in t.tolist()], tol=1e-6)
    assert variant_weight(t.half()).dtype == torch.float32
    assert variant_weight(t.reshape(1, 101).double()).dtype == torch.float64


def test_variant_weight_arguments_are_checked() -> None:
    for wrong in (-0.01, 1.01, 600.0):
        with pytest.raises(InputError, match="t must be"):
            variant_weight(wrong)
    for wrong in (0.0, -0.4, 1.1, math.nan):
        with pytest.raises(InputError, match="perturbation_range"):
            variant_weight(0.5, wrong)
