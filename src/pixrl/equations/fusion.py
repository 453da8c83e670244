"""RMLer: mixing concept embeddings column by column, the visual reward, and the choice of the best image.

| paper                    | here                                   |
|--------------------------|----------------------------------------|
| e_1, e_2 (h x w)         | `embeddings_NLD`                       |
| a, 1 - a (w)             | `coefficients_ND`                      |
| S_1, S_2                 | `similarities_BN`                      |
| alpha                    | `alpha`                                |
| tau_presence             | `presence`                             |
| tau_balance              | `balance`                              |

Generalization to N > 2 concepts: |S_1 - S_2| becomes max S - min S, and the coefficients of a column lie on
the simplex. For N = 2 both are the paper's. A similarity of nan (scoring failed) is never a candidate.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pixrl.equations._tensors import require_axes, widen
from pixrl.errors import InputError, ShapeError

PRESENCE = 0.63
"""The published tau_presence."""
BALANCE = 0.05
"""The published tau_balance."""


class Shortfall(NamedTuple):
    """The distances by which each image misses the two tests of `is_candidate`; both `[B]`, at least 0."""

    presence: Tensor
    """What the least present concept lacks: max(tau_presence - min S, 0)."""
    balance: Tensor
    """The excess of imbalance: max(max S - min S - tau_balance, 0)."""


def fuse(embeddings_NLD: Tensor, coefficients_ND: Tensor) -> Tensor:
    """Mix the concepts' embeddings column by column: sum_n e_n diag(a_n).

    Args:
        embeddings_NLD: token features of N concepts, `[N, L, D]`; mix pooled ones as `[N, 1, D]`.
        coefficients_ND: weights, `[N, D]`; on the simplex in every column for a fusion between the concepts.
            The paper's unbounded Gaussian policy leaves it, so this is not checked. For N = 2, `[D]` stands
            for a and 1 - a.

    Returns:
        The fused embedding, `[L, D]`.

    Raises:
        ShapeError: the shapes differ from the ones above.

    Source: RMLer Eq. 2.
    """
    require_axes("NLD", embeddings_NLD=embeddings_NLD)
    concepts, _, columns = embeddings_NLD.shape
    if concepts == 2 and coefficients_ND.ndim == 1:
        coefficients_ND = torch.stack((coefficients_ND, 1 - coefficients_ND))
    if coefficients_ND.shape != (concepts, columns):
        raise ShapeError(
            f"coefficients_ND must be [N, D] = [{concepts}, {columns}], "
            f"got shape {list(coefficients_ND.shape)}"
        )
    embeddings_NLD, coefficients_ND = widen(embeddings_NLD, coefficients_ND)
    return (embeddings_NLD * coefficients_ND.unsqueeze(1)).sum(dim=0)


def fusion_reward(similarities_BN: Tensor, alpha: float = 5.0) -> Tensor:
    """Return the reward of presence and balance: sum S - alpha (max S - min S).

    For two concepts this is (S1 + S2) - alpha |S1 - S2|.

    Args:
        similarities_BN: cosine similarity of each image to each concept's exemplar, `[B, N]`, N >= 2.
        alpha: weight of the balance, at least 0.

    Returns:
        `[B]`, higher is better; nan where a similarity is nan.

    Raises:
        ShapeError: `similarities_BN` is not `[B, N]` with N >= 2.
        InputError: `alpha` is negative.

    Source: RMLer Eq. 5.
    """
    if not alpha >= 0:
        raise InputError(f"alpha must be at least 0, got {alpha!r}")
    similarities_BN = _checked(similarities_BN)
    return similarities_BN.sum(dim=1) - alpha * _spread(similarities_BN)


def is_candidate(similarities_BN: Tensor, presence: float = PRESENCE, balance: float = BALANCE) -> Tensor:
    """Return where all concepts are present and in balance: all S > presence and max S - min S < balance, strictly.

    Args:
        similarities_BN: `[B, N]`, N >= 2.
        presence: least similarity, exclusive.
        balance: largest difference, exclusive.

    Returns:
        bool, `[B]`.

    Raises:
        ShapeError: `similarities_BN` is not `[B, N]` with N >= 2.

    Source: RMLer Eq. 6.
    """
    similarities_BN = _checked(similarities_BN)
    return (similarities_BN > presence).all(dim=1) & (_spread(similarities_BN) < balance)


def select(
    similarities_BN: Tensor, k: int = 1, presence: float = PRESENCE, balance: float = BALANCE
) -> Tensor:
    """Return the k best candidates by total similarity, best first.

    The thresholds are never relaxed: fewer than k candidates give fewer indices, none gives none. `shortfall`
    then says how far the images missed.

    Args:
        similarities_BN: `[B, N]`, N >= 2.
        k: how many at most, at least 1.
        presence, balance: see `is_candidate`.

    Returns:
        Indices into the batch, int64, of length 0 to k; equal sums in the order of the batch.

    Raises:
        ShapeError: `similarities_BN` is not `[B, N]` with N >= 2.
        InputError: `k` is less than 1.

    Source: RMLer Eq. 7.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    candidates = is_candidate(similarities_BN, presence, balance).nonzero().squeeze(1)
    total = _checked(similarities_BN)[candidates].sum(dim=1)
    return candidates[total.argsort(descending=True, stable=True)[:k]]


def shortfall(similarities_BN: Tensor, presence: float = PRESENCE, balance: float = BALANCE) -> Shortfall:
    """Return how far each image misses presence and balance, for the message when `select` returns none.

    An image on a threshold has a shortfall of 0 there and still does not qualify, as both tests are strict.

    Args:
        similarities_BN: `[B, N]`, N >= 2.
        presence, balance: see `is_candidate`.

    Raises:
        ShapeError: `similarities_BN` is not `[B, N]` with N >= 2.

    Source: RMLer Eq. 6.
    """
    similarities_BN = _checked(similarities_BN)
    missing = (presence - similarities_BN.amin(dim=1)).clamp_min(0)
    return Shortfall(missing, (_spread(similarities_BN) - balance).clamp_min(0))


def _checked(similarities_BN: Tensor) -> Tensor:
    """Check that there are two concepts or more, and return the similarities in the working dtype."""
    require_axes("BN", similarities_BN=similarities_BN)
    if similarities_BN.shape[1] < 2:
        raise ShapeError(
            f"similarities_BN must be [B, N] with N >= 2, got shape {list(similarities_BN.shape)}"
        )
    (similarities_BN,) = widen(similarities_BN)
    return similarities_BN


def _spread(similarities_BN: Tensor) -> Tensor:
    """Return max S - min S of each image, `[B]`."""
    return similarities_BN.amax(dim=1) - similarities_BN.amin(dim=1)
