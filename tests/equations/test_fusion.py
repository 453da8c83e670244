"""RMLer: fusion stays between the concepts, the reward wants balance, selection never relaxes."""

import math

import pytest
import torch

from pixrl.equations import Shortfall, fuse, fusion_reward, is_candidate, select, shortfall
from pixrl.errors import InputError, ShapeError

from .helpers import close, draw, values


def table(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# -- fuse ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concepts", [1, 2, 3, 5])
def test_a_fusion_on_the_simplex_stays_between_the_concepts(concepts: int) -> None:
    embeddings, coefficients = draw(concepts, 6, 4), draw(concepts, 4, seed=1).softmax(dim=0)
    fused = fuse(embeddings, coefficients)
    assert fused.shape == (6, 4)
    assert (fused <= embeddings.amax(dim=0) + 1e-12).all()
    assert (fused >= embeddings.amin(dim=0) - 1e-12).all()


def test_corners_of_the_simplex_are_the_concepts() -> None:
    embeddings = draw(3, 6, 4)
    for n in range(3):
        corner = torch.zeros(3, 4, dtype=torch.float64)
        corner[n] = 1
        close(fuse(embeddings, corner), embeddings[n].tolist())
    same = embeddings[:1].expand(3, 6, 4)
    close(fuse(same, draw(3, 4, seed=1).softmax(dim=0)), embeddings[0].tolist())
    close(fuse(embeddings, torch.full((3, 4), 1 / 3, dtype=torch.float64)), embeddings.mean(dim=0).tolist())


def test_the_order_of_concepts_does_not_matter_and_columns_are_their_own() -> None:
    embeddings, coefficients = draw(3, 6, 4), draw(3, 4, seed=1)
    fused = fuse(embeddings, coefficients)
    close(fuse(embeddings[[2, 0, 1]], coefficients[[2, 0, 1]]), fused.tolist())
    columns = [3, 1, 0, 2]
    close(fuse(embeddings[..., columns], coefficients[:, columns]), fused[:, columns].tolist())
    close(fused, torch.einsum("nld,nd->ld", embeddings, coefficients).tolist())


def test_two_concepts_take_a_and_its_rest() -> None:
    embeddings, a = draw(2, 6, 4), draw(4, seed=1).sigmoid()
    # RMLer Eq. 2: e1 diag(a) + e2 diag(1 - a)
    wanted = embeddings[0] @ torch.diag(a) + embeddings[1] @ torch.diag(1 - a)
    close(fuse(embeddings, a), wanted.tolist())
    close(fuse(embeddings, torch.stack((a, 1 - a))), wanted.tolist())


def test_fuse_by_hand() -> None:
    # columns: 0.25 * 4 + 0.75 * 0 = 1 and 1 * 2 + 0 * 8 = 2
    close(fuse(table((4, 2), (0, 8))[:, None], table((0.25, 1), (0.75, 0))), [[1.0, 2.0]])


def test_fuse_gradients_and_dtype() -> None:
    inputs = (draw(2, 3, 4).requires_grad_(), draw(2, 4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(fuse, inputs)
    assert fuse(draw(2, 3, 4).half(), draw(4).half()).dtype == torch.float32


def test_fuse_arguments_are_checked() -> None:
    embeddings = draw(2, 6, 4)
    for wrong in (draw(2, 1), draw(3, 4), draw(1, 4), draw(1), draw(2, 6, 4)):
        with pytest.raises(ShapeError, match=r"\[N, D\] = \[2, 4\]"):
            fuse(embeddings, wrong)
    with pytest.raises(ShapeError, match=r"\[3, 4\]"):
        fuse(draw(3, 6, 4), draw(4))
    with pytest.raises(ShapeError, match=r"\[N, L, D\]"):
        fuse(draw(2, 4), draw(2, 4))


# -- fusion_reward -------------------------------------------------------------------------------------------


def test_reward_by_hand() -> None:
    # RMLer Eq. 5 with alpha 5: 0.7 + 0.6 - 5 * 0.1; three concepts: 1.8 - 5 * 0.2
    close(fusion_reward(table((0.7, 0.6), (0.6, 0.7), (0.65, 0.65))), [0.8, 0.8, 1.3])
    close(fusion_reward(table((0.7, 0.6, 0.5))), [0.8])
    close(fusion_reward(table((0.7, 0.6)), alpha=1.0), [1.2])
    close(fusion_reward(table((0.7, 0.6)), alpha=0.0), [1.3])


@pytest.mark.parametrize("concepts", [2, 3, 4])
def test_reward_knows_no_order_and_wants_balance(concepts: int) -> None:
    similarities = draw(7, concepts).sigmoid()
    reward = fusion_reward(similarities)
    assert reward.shape == (7,)
    close(fusion_reward(similarities.flip(1)), reward.tolist())
    close(fusion_reward(similarities.flip(0)), reward.flip(0).tolist())
    balanced = similarities.mean(dim=1, keepdim=True).expand(7, concepts)
    assert (fusion_reward(balanced) > reward).all()
    close(fusion_reward(similarities + 0.1), (reward + 0.1 * concepts).tolist())


def test_a_failed_similarity_fails_the_reward_alone() -> None:
    reward = fusion_reward(table((0.7, math.nan), (0.65, 0.65)))
    assert reward[0].isnan()
    assert reward[1].item() == pytest.approx(1.3)


def test_reward_gradients() -> None:
    assert torch.autograd.gradcheck(fusion_reward, (draw(4, 3).requires_grad_(),))


# -- is_candidate, select, shortfall -------------------------------------------------------------------------

IMAGES = table(
    (0.70, 0.69),  # 0: fine, 1.39
    (0.75, 0.72),  # 1: fine, 1.47
    (0.90, 0.80),  # 2: out of balance, the highest sum of all
    (0.62, 0.64),  # 3: too weak
    (0.64, 0.68),  # 4: fine, 1.32
    (0.72, 0.75),  # 5: fine, 1.47 as well
    (0.75, 0.68),  # 6: out of balance
)


def test_candidates_by_hand() -> None:
    # RMLer Eq. 6 with 0.63 and 0.05
    assert is_candidate(IMAGES).tolist() == [True, True, False, False, True, True, False]
    assert is_candidate(IMAGES, presence=0.70).tolist() == [False, True, False, False, False, True, False]
    assert is_candidate(IMAGES, balance=0.02).tolist() == [True] + [False] * 6
    assert is_candidate(IMAGES, 0.0, 1.0).all()


def test_three_concepts_must_all_be_present_and_in_balance() -> None:
    images = table((0.70, 0.70, 0.70), (0.70, 0.70, 0.60), (0.66, 0.70, 0.74), (0.66, 0.68, 0.70))
    assert is_candidate(images).tolist() == [True, False, False, True]


def test_both_tests_are_strict() -> None:
    images = table((0.5, 0.5), (0.625, 0.75), (0.625, 0.625))
    assert is_candidate(images, presence=0.5, balance=0.125).tolist() == [False, False, True]
    single = torch.tensor([[0.63, 0.65]])
    assert not is_candidate(single).any()


def test_failed_similarities_never_qualify() -> None:
    images = table((math.nan, 0.7), (0.7, math.nan), (math.nan, math.nan), (0.7, 0.7))
    assert is_candidate(images).tolist() == [False, False, False, True]
    assert select(images, k=4).tolist() == [3]


def test_select_ranks_candidates_by_their_sum() -> None:
    assert select(IMAGES).tolist() == [1]
    assert select(IMAGES, k=3).tolist() == [1, 5, 0]  # equal sums in the order of the batch
    assert select(IMAGES, k=100).tolist() == [1, 5, 0, 4]
    assert select(IMAGES, 2, 0.0, 1.0).tolist() == [2, 1]
    assert select(IMAGES, k=1, presence=0.63, balance=0.02).tolist() == [0]
    assert select(IMAGES).dtype == torch.int64


def test_select_ranks_by_the_sum_and_not_by_the_reward() -> None:
    # the reward prefers the balanced one; Eq. 7 takes the larger sum
    images = table((0.70, 0.70), (0.70, 0.74))
    assert fusion_reward(images).argmax() == 0
    assert select(images).tolist() == [1]


def test_many_equal_sums_keep_their_order() -> None:
    assert select(torch.full((300, 2), 0.7), k=300).tolist() == list(range(300))


def test_the_set_selected_does_not_depend_on_the_order() -> None:
    similarities = 0.6 + 0.2 * draw(60, 3).sigmoid()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    base = select(similarities, 3, 0.6, 0.1)
    assert len(base) == 3
    assert order[select(similarities[order], 3, 0.6, 0.1)].tolist() == base.tolist()


def test_none_qualifies_none_is_selected_and_shortfall_says_by_how_much() -> None:
    images = table((0.60, 0.61), (0.90, 0.80), (0.50, 0.70))
    chosen = select(images, k=2)
    assert chosen.shape == (0,)
    assert chosen.dtype == torch.int64
    miss = shortfall(images)
    assert isinstance(miss, Shortfall)
    close(miss.presence, [0.03, 0.0, 0.13])
    close(miss.balance, [0.0, 0.05, 0.15])
    close(shortfall(images, 0.8, 0.15).presence, [0.2, 0.0, 0.3])
    close(shortfall(images, 0.8, 0.15).balance, [0.0, 0.0, 0.05])


def test_candidates_have_no_shortfall() -> None:
    similarities = 0.6 + 0.2 * draw(60, 3).sigmoid()
    miss, passed = shortfall(similarities, 0.65, 0.08), is_candidate(similarities, 0.65, 0.08)
    assert passed.any()
    assert torch.equal((miss.presence == 0) & (miss.balance == 0), passed)


@pytest.mark.parametrize("function", [fusion_reward, is_candidate, select, shortfall])
def test_similarities_are_checked(function) -> None:
    for wrong in (draw(4), draw(4, 1), draw(4, 2, 1)):
        with pytest.raises(ShapeError, match=r"\[B, N\]"):
            function(wrong)
    assert fusion_reward(draw(4, 2).half()).dtype == torch.float32
    assert len(select(draw(0, 2))) == 0


def test_numbers_are_checked() -> None:
    with pytest.raises(InputError, match="alpha"):
        fusion_reward(IMAGES, alpha=-1.0)
    for wrong in (0, -1):
        with pytest.raises(InputError, match="k must be"):
            select(IMAGES, k=wrong)
    with pytest.raises(InputError, match="alpha"):
        fusion_reward(values(1, 1)[None], alpha=math.nan)
