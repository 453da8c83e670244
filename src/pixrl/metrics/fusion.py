"""The figures of a fusion run: of all its pictures, and of the ones selected; by similarities, and by the truth."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

from pixrl.equations import fusion_reward, is_candidate
from pixrl.metrics.true_fusion import Fusion


@dataclass(frozen=True)
class FusionFigures:
    """The figures that a study of fusion compares; nan where there is nothing to take a figure from."""

    reward: float
    """The mean reward of all scored pictures (Eq. 5)."""
    similarity: float
    """The mean over pictures of the mean similarity to the concepts: the paper's Avg. Sim."""
    balance: float
    """The mean over pictures of max S - min S: the paper's Balance, lower is better."""
    candidate_rate: float
    """The share of all pictures, failed ones included, that pass both thresholds."""
    late_reward: float
    """The mean reward of the last quarter of the pictures, at which a learning sampler ends."""
    best_reward: float
    best_total: float
    """The largest sum of similarities among the candidates."""
    selected_reward: float
    """The reward of the picture that is selected first; where none qualifies, the best reward."""
    selected_similarity: float
    selected_balance: float
    failed: float
    """The share of pictures that could not be scored."""
    true_fusions: float = math.nan
    """The share of all pictures that are true fusions; like all below, nan where nothing tells."""
    selected_true: float = math.nan
    """1 where the picture that is selected first is a true fusion, 0 where it is not; where none qualifies, that of the
    best reward."""
    false_passes: float = math.nan
    """The share of the candidates that are no true fusions."""
    agreement: float = math.nan
    """The rank correlation (Spearman) of the scored pictures' rewards with their balance, 0 where they are none."""

    def to_json(self) -> dict[str, float | None]:
        """Return the figures by name, with None for nan."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def figures(
    similarities_BN: Tensor,
    alpha: float,
    presence: float,
    balance: float,
    chosen: Sequence[int] = (),
    truths: Sequence[Fusion] = (),
) -> FusionFigures:
    """Return the figures of a run.

    Args:
        similarities_BN: of each picture to each concept; a row with nan could not be scored.
        alpha: of the reward (Eq. 5).
        presence, balance: the thresholds of a candidate.
        chosen: the selected pictures, best first.
        truths: what each picture is; none: nothing tells.
    """
    images = len(similarities_BN)
    rewards_B = fusion_reward(similarities_BN, alpha)
    scored_B = ~rewards_B.isnan()
    spread_B = similarities_BN.amax(dim=1) - similarities_BN.amin(dim=1)
    candidate_B = is_candidate(similarities_BN, presence, balance)
    late_B = scored_B & (torch.arange(images) >= images - max(1, images // 4))
    totals_B = similarities_BN.sum(dim=1)
    ranked_B = rewards_B.nan_to_num(-math.inf)
    best = int(ranked_B.argmax()) if bool(ranked_B.isfinite().any()) else None
    first = chosen[0] if chosen else best
    told = {} if not truths else _by_truth(truths, rewards_B, candidate_B, first)
    return FusionFigures(
        reward=_mean(rewards_B[scored_B]),
        similarity=_mean(similarities_BN[scored_B].mean(dim=1)),
        balance=_mean(spread_B[scored_B]),
        candidate_rate=float(candidate_B.float().mean()),
        late_reward=_mean(rewards_B[late_B]),
        best_reward=_max(rewards_B[scored_B]),
        best_total=_max(totals_B[candidate_B]),
        selected_reward=_at(rewards_B, first),
        selected_similarity=_at(similarities_BN.mean(dim=1), first),
        selected_balance=_at(spread_B, first),
        failed=float((~scored_B).float().mean()),
        **told,
    )


def _by_truth(
    truths: Sequence[Fusion], rewards_B: Tensor, candidate_B: Tensor, first: int | None
) -> dict[str, float]:
    """Return the figures that need the truth, by their names."""
    true_B = torch.tensor([float(truth.is_true) for truth in truths])
    balance_B = torch.tensor([truth.balance for truth in truths])
    scored_B = ~rewards_B.isnan()
    known, learned_from = balance_B[scored_B].numpy(), rewards_B[scored_B].numpy()
    differ = all(len(set(values.tolist())) > 1 for values in (known, learned_from))
    return {
        "true_fusions": float(true_B.mean()),
        "selected_true": _at(true_B, first),
        "false_passes": _mean(1 - true_B[candidate_B]),
        "agreement": float(spearmanr(learned_from, known).statistic) if differ else math.nan,
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _max(values: Tensor) -> float:
    return float(values.max()) if len(values) else math.nan


def _at(values: Tensor, place: int | None) -> float:
    return math.nan if place is None else float(values[place])
