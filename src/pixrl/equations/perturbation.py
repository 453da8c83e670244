"""E2PO: learned perturbations of a prompt's input embeddings, and when they steer the sampler.

| paper                        | here                                         |
|------------------------------|----------------------------------------------|
| E, the static embeddings     | `embeddings_LD`, of a frozen text encoder (CLIP-L only by default) |
| delta_k                      | `delta`, drawn from N(0, sigma_init^2)       |
| the optimizing index set     | `mask` from `content_mask`                   |
| h_k, h_0                     | `h_KD`, `h0_D`: global embeddings of the variants and of the anchor |
| lambda(t), tau               | `variant_weight`, `perturbation_range`       |

The paper's text lost its formulas. What stays open is an option here, to be chosen by measurement:

1. which term the weight of 50 multiplies: `weighted` of `perturbation_objective`. Its Table 3 calls the 50 a
   diversity weight and its appendix C.2 a repulsive coefficient, so `diversity` is the default;
2. whether a token's delta is bounded in absolute norm or relative to the token's: `embeddings_LD` of
   `project_delta`;
3. the learning rate and sigma_init: the caller's.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pixrl.equations._tensors import (
    Real,
    require_above,
    require_axes,
    require_choice,
    require_unit_time,
    widen,
    working_dtype,
)
from pixrl.errors import InputError, ShapeError


def content_mask(input_ids: Tensor, special_ids: Iterable[int]) -> Tensor:
    """Return which tokens carry content: true on those that are not start, end or padding.

    Args:
        input_ids: token ids, integers, `[B, L]`.
        special_ids: ids of the start, end and padding tokens (CLIP pads with its end token).

    Returns:
        bool, `[B, L]`.

    Raises:
        ShapeError: `input_ids` is not `[B, L]`.

    Source: E2PO section 4.2, the optimizing index set.
    """
    require_axes("BL", input_ids=input_ids)
    special = torch.tensor(sorted(special_ids), dtype=input_ids.dtype, device=input_ids.device)
    return ~torch.isin(input_ids, special)


def perturb(embeddings_LD: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """Perturb input embeddings: e + delta on content positions, e elsewhere.

    Args:
        embeddings_LD: static embeddings, `[L, D]`, or with leading axes.
        delta: perturbations, `[L, D]`, or with leading axes, as in `[K, L, D]` for K variants at once.
        mask: bool, `[L]` or with leading axes; true on content.

    Returns:
        `[..., L, D]` with the leading axes of all three broadcast.

    Raises:
        ShapeError: L or D differ among the three.
        InputError: `mask` is not bool.

    Source: E2PO Eqs. 9 and 10.
    """
    if delta.ndim < 2 or embeddings_LD.shape[-2:] != delta.shape[-2:]:
        raise ShapeError(
            f"delta must end in the embeddings' [L, D], got {list(delta.shape)} "
            f"for {list(embeddings_LD.shape)}"
        )
    if mask.shape[-1:] != delta.shape[-2:-1]:
        raise ShapeError(f"mask must end in [L] = [{delta.shape[-2]}], got shape {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be bool, true on content, got {mask.dtype}")
    embeddings_LD, delta = widen(embeddings_LD, delta)
    return torch.where(mask.unsqueeze(-1), embeddings_LD + delta, embeddings_LD)


def diversity_loss(h_KD: Tensor) -> Tensor:
    """Return the mean cosine similarity over all pairs of different variants; smaller is more diverse.

    Args:
        h_KD: global embeddings of the variants, `[K, D]`, the anchor not among them.

    Returns:
        A scalar in [-1, 1]; 0 for a single variant, which has no pairs.

    Raises:
        ShapeError: `h_KD` is not `[K, D]` with K >= 1.

    Source: E2PO Eq. 11.
    """
    _require_variants(h_KD)
    (h_KD,) = widen(h_KD)
    variants = len(h_KD)
    first, second = torch.triu_indices(variants, variants, offset=1, device=h_KD.device)
    similarity = cosine_similarity(h_KD[first], h_KD[second], dim=1)
    return similarity.sum() / max(len(similarity), 1)


def anchor_loss(h_KD: Tensor, h0_D: Tensor, target: float = 0.80, margin: float = 0.01) -> Tensor:
    """Return how far the variants leave their band of similarity to the anchor.

    mean over k of max(0, |cos(h_k, h0) - target| - margin)

    Args:
        h_KD: global embeddings of the variants, `[K, D]`.
        h0_D: global embedding of the unperturbed prompt, `[D]`.
        target: wanted cosine similarity.
        margin: half width of the band without loss.

    Returns:
        A scalar, 0 when every similarity is in target +- margin.

    Raises:
        ShapeError: `h_KD` is not `[K, D]` with K >= 1, or `h0_D` is not `[D]`.

    Source: E2PO Eq. 12.
    """
    _require_variants(h_KD)
    if h0_D.shape != h_KD.shape[1:]:
        raise ShapeError(f"h0_D must be [D] = {list(h_KD.shape[1:])}, got shape {list(h0_D.shape)}")
    h_KD, h0_D = widen(h_KD, h0_D)
    similarity = cosine_similarity(h_KD, h0_D.unsqueeze(0), dim=1)
    return ((similarity - target).abs() - margin).clamp_min(0).mean()


def perturbation_objective(
    h_KD: Tensor,
    h0_D: Tensor,
    weight: float = 50.0,
    *,
    weighted: Literal["diversity", "anchor"] = "diversity",
    target: float = 0.80,
    margin: float = 0.01,
) -> Tensor:
    """Return the objective: anchor_loss + weight * diversity_loss, or the weight on the other (open).

    Args:
        h_KD, h0_D, target, margin: see `anchor_loss`.
        weight: 50 is published.
        weighted: the term that `weight` multiplies.

    Returns:
        A scalar, to minimize over delta.

    Raises:
        ShapeError: see `anchor_loss`.
        InputError: `weighted` is unknown.

    Source: E2PO section 4.2 and Table 3.
    """
    require_choice("weighted", weighted, ("diversity", "anchor"))
    anchor, diversity = anchor_loss(h_KD, h0_D, target, margin), diversity_loss(h_KD)
    if weighted == "diversity":
        return anchor + weight * diversity
    return weight * anchor + diversity


def project_delta(delta: Tensor, max_norm: float = 0.05, embeddings_LD: Tensor | None = None) -> Tensor:
    """Shrink each token's perturbation to norm `max_norm` at most, absolute or of the token's norm (open).

    Args:
        delta: perturbations, `[..., L, D]`.
        max_norm: the largest norm, above 0.
        embeddings_LD: give the embeddings `[L, D]` to bound a token by `max_norm` times its own norm instead.

    Returns:
        The shape of `delta`; tokens within the bound unchanged.

    Raises:
        ShapeError: `embeddings_LD` is not the last two axes of `delta`.
        InputError: `max_norm` is not positive.

    Source: E2PO Table 3, max norm clip.
    """
    require_above(0, max_norm=max_norm)
    (delta,) = widen(delta)
    limit = torch.tensor(max_norm, dtype=delta.dtype, device=delta.device)
    if embeddings_LD is not None:
        if embeddings_LD.shape != delta.shape[-2:]:
            raise ShapeError(
                f"embeddings_LD must be delta's [L, D] = {list(delta.shape[-2:])}, "
                f"got {list(embeddings_LD.shape)}"
            )
        limit = limit * embeddings_LD.to(delta.dtype).norm(dim=1, keepdim=True)
    norm = delta.norm(dim=-1, keepdim=True)
    return torch.where(norm > limit, delta * (limit / norm), delta)


def variant_weight(t: Real, perturbation_range: float = 0.4) -> Real:
    """Return the weight of a variant's condition at time t: lambda(t) = clamp((t - (1 - tau)) / tau, 0, 1).

    The condition is c_k(t) = lambda c_k + (1 - lambda) c_0. Sampling uses it; the update is conditioned on
    c_0 alone. The static schedule of the paper's ablation is lambda = 1.

    Args:
        t: time in [0, 1], 1 is noise; a number gives a float, a tensor a tensor.
        perturbation_range: tau, in (0, 1]: the share of the time, from pure noise on, in which variants
            steer.

    Returns:
        1 at t = 1, falling to 0 at t = 1 - tau.

    Raises:
        InputError: `t` is outside [0, 1] or `perturbation_range` outside (0, 1].

    Source: E2PO Eq. 13.
    """
    if not 0 < perturbation_range <= 1:
        raise InputError(f"perturbation_range must be in (0, 1], got {perturbation_range!r}")
    exact = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    require_unit_time(t=exact)
    time = exact.to(working_dtype(exact))
    weight = ((time - (1 - perturbation_range)) / perturbation_range).clamp(0, 1)
    if isinstance(t, Tensor):
        return weight
    return weight.item()


def _require_variants(h_KD: Tensor) -> None:
    """Raise ShapeError unless there is at least one variant."""
    require_axes("KD", h_KD=h_KD)
    if len(h_KD) == 0:
        raise ShapeError("h_KD holds no variant: K must be at least 1")
