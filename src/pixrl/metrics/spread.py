"""How different the pictures of a group are. No reward, no method: features in, distances out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS = 16
Features = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] to unit vectors [B, E]."""


def pixel_features(images_BCHW: Tensor) -> Tensor:
    """Unit vectors [B, 768] of the pictures at 16 x 16 pixels, grey taken as zero."""
    small = F.adaptive_avg_pool2d(images_BCHW.float(), PIXELS) - 0.5
    return F.normalize(small.flatten(1), dim=1)


def mean_pairwise_distance(features_PSE: Tensor) -> Tensor:
    """1 - cosine, averaged over all pairs of a group [P]; nan for groups of one.

    Args:
        features_PSE: unit vectors of P groups of S pictures.
    """
    count = features_PSE.shape[1]
    total_P = features_PSE.sum(dim=1).square().sum(dim=-1)  # sum over all pairs, each picture with itself too
    cosine_P = (total_P - features_PSE.square().sum(dim=(1, 2))) / (count * (count - 1) or torch.nan)
    return 1 - cosine_P


def group_diversity(images_BCHW: Tensor, per_group: int, features: Features = pixel_features) -> Tensor:
    """Mean pairwise distance of each group's pictures [P]; groups follow each other, `per_group` pictures each.

    Pictures that are not finite count as grey.
    """
    if not len(images_BCHW):
        return torch.zeros(0)
    features_BE = features(images_BCHW.nan_to_num(0.5).clamp(0, 1))
    return mean_pairwise_distance(features_BE.view(-1, per_group, features_BE.shape[1]))
