"""The diversity of the pictures of one prompt, by two measures that need no reward.

* **Distance**: the mean of 1 - cosine over all pairs of a prompt's pictures, by the features of an encoder.
* **Layouts**: how many different arrangements a prompt's pictures show, by the detections of a segmenter.

The layout of a picture is the class and the place of each of its objects; a place is the centre of the object's box, as
shares of the picture's width and height. The distance of two layouts is infinite where a class has not as many objects
in one as in the other. Else the objects of each class are matched one to one, with the least sum of squared
displacements, and the distance is the largest displacement. Layouts are clustered by complete linkage at `SAME_WITHIN`:
within a cluster no two pictures are further apart. Pictures without any object share one layout.

Both are figures of spread, not of quality: a generator that misses the prompt in ever new ways has many layouts. Read
them beside the rewards.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor

from pixrl.errors import InputError, ShapeError
from pixrl.rewards.geneval import Detector
from pixrl.rewards.segmentation import Instance

PIXELS = 16
"""The side in pixels of the small pictures that `pixel_features` compares."""
Features = Callable[[Tensor], Tensor]
"""A function of pictures [B, 3, H, W] that returns unit vectors [B, E]."""
SAME_WITHIN = 0.2
"""The largest displacement, as a share of the picture's side, of layouts that count as one."""
_APART = 10.0
"""The number that stands for an infinite distance; no displacement within a picture exceeds sqrt(2)."""


def pixel_features(images_BCHW: Tensor) -> Tensor:
    """Return unit vectors [B, 768] of the pictures at 16 x 16 pixels, grey taken as zero."""
    small = F.adaptive_avg_pool2d(images_BCHW.float(), PIXELS) - 0.5
    return F.normalize(small.flatten(1), dim=1)


def mean_pairwise_distance(features_PSE: Tensor) -> Tensor:
    """Return 1 - cosine averaged over all pairs of each group, [P]; nan for groups of one.

    Args:
        features_PSE: unit vectors of P groups of S pictures.
    """
    count = features_PSE.shape[1]
    total_P = features_PSE.sum(dim=1).square().sum(dim=-1)  # sum over all pairs, each picture with itself too
    cosine_P = (total_P - features_PSE.square().sum(dim=(1, 2))) / (count * (count - 1) or torch.nan)
    return 1 - cosine_P


def group_diversity(images_BCHW: Tensor, per_group: int, features: Features = pixel_features) -> Tensor:
    """Return the mean pairwise distance of each group's pictures, [P]; groups of `per_group` follow each other.

    Pictures that are not finite count as grey.
    """
    if not len(images_BCHW):
        return torch.zeros(0)
    features_BE = features(images_BCHW.nan_to_num(0.5).clamp(0, 1))
    return mean_pairwise_distance(features_BE.view(-1, per_group, features_BE.shape[1]))


@dataclass(frozen=True)
class Arrangement:
    """The objects of one picture: classes [N], and their centres [N, 2] as (x, y) in [0, 1]."""

    kinds: tuple[str, ...]
    centres_N2: Tensor

    @staticmethod
    def of(instances: Sequence[Instance], rows: int, columns: int) -> "Arrangement":
        """Return the arrangement of the objects found in a picture of rows x columns pixels."""
        places = [
            ((x0 + x1) / 2 / columns, (y0 + y1) / 2 / rows) for x0, y0, x1, y1 in (i.box for i in instances)
        ]
        return Arrangement(tuple(i.kind for i in instances), torch.tensor(places).view(-1, 2))


def prompt_distances(features_BE: Tensor, prompt_B: Tensor) -> Tensor:
    """Return the mean pairwise distance of each prompt's pictures, [P] in the order of the prompts' numbers.

    Args:
        features_BE: unit vectors; pictures with a number that is not finite are left out.
        prompt_B: the prompt's number of each picture; prompts may have different numbers of pictures.

    Returns:
        1 - cosine averaged over all pairs, in [0, 2]; nan for a prompt with fewer than two pictures.

    Raises:
        ShapeError: there is not one prompt a picture.
    """
    if features_BE.ndim != 2 or prompt_B.shape != features_BE.shape[:1]:
        raise ShapeError(
            f"Distances need features [B, E] and prompts [B]; got {list(features_BE.shape)} and {list(prompt_B.shape)}."
        )
    known_B = features_BE.isfinite().all(dim=1)
    groups = [features_BE[known_B & (prompt_B == number)] for number in prompt_B.unique(sorted=True)]
    return (
        torch.stack([mean_pairwise_distance(group[None])[0] for group in groups])
        if groups
        else torch.zeros(0)
    )


def layout_distance(one: Arrangement, other: Arrangement) -> float:
    """Return how far the objects of one picture must move to stand as in the other, in sides of the picture.

    It is the largest displacement under the matching within classes whose squared displacements sum to the least, and
    inf where the classes have different numbers of objects. It is symmetric, and 0 exactly where layouts are equal.
    """
    if Counter(one.kinds) != Counter(other.kinds):
        return math.inf
    furthest = 0.0
    for kind in set(one.kinds):
        distances = torch.cdist(_of_kind(one, kind), _of_kind(other, kind)).numpy()
        rows, columns = linear_sum_assignment(distances**2)
        furthest = max(furthest, float(distances[rows, columns].max()))
    return furthest


def distinct_layouts(layouts: Sequence[Arrangement], within: float = SAME_WITHIN) -> int:
    """Return how many clusters some pictures' layouts form; 0 of none.

    The linkage is complete: two layouts of one cluster are at most `within` apart.

    Raises:
        InputError: `within` is not a share of the picture's side in (0, 1].
    """
    if not 0 < within <= 1:
        raise InputError(f"within is a share of the picture's side in (0, 1], got {within}.")
    if len(layouts) < 2:
        return len(layouts)
    table = np.zeros((len(layouts), len(layouts)))
    for i, j in combinations(range(len(layouts)), 2):
        table[i, j] = table[j, i] = min(layout_distance(layouts[i], layouts[j]), _APART)
    tree = linkage(squareform(table), method="complete")
    return int(fcluster(tree, within, criterion="distance").max())


def prompt_layouts(layouts: Sequence[Arrangement], prompt_B: Tensor, within: float = SAME_WITHIN) -> Tensor:
    """Return the number of distinct layouts of each prompt, float [P] in the order of the prompts' numbers.

    Raises:
        ShapeError: there is not one prompt a picture.
    """
    if prompt_B.shape != (len(layouts),):
        raise ShapeError(f"{len(layouts)} layouts need as many prompts [B], got {list(prompt_B.shape)}.")
    counts = [distinct_layouts(group, within) for group in _grouped(layouts, prompt_B)]
    return torch.tensor(counts, dtype=torch.float32)


@dataclass(frozen=True)
class Diversity:
    """The diversity of each prompt's pictures, and the means over prompts."""

    distance_P: Tensor
    """The mean pairwise feature distance; nan for a prompt with one picture."""
    layouts_P: Tensor | None
    """The number of distinct layouts; None where no detector was given."""

    @property
    def distance(self) -> float:
        """The mean distance over the prompts that have one."""
        return self.distance_P.nanmean().item()

    @property
    def layouts(self) -> float:
        """The mean number of layouts over prompts; nan where no detector was given."""
        return math.nan if self.layouts_P is None else self.layouts_P.mean().item()


@dataclass(frozen=True)
class DiversityMeter:
    """A meter of diversity, with an encoder of pictures and, for layouts, a detector."""

    features: Features
    detector: Detector | None = None

    def measure(self, images_BCHW: Tensor, prompt_B: Tensor) -> Diversity:
        """Return the diversity of pictures [B, 3, H, W] in [0, 1]; `prompt_B` numbers their prompts."""
        distance_P = prompt_distances(self.features(images_BCHW).float().cpu(), prompt_B)
        if self.detector is None:
            return Diversity(distance_P, None)
        layouts = layouts_of(self.detector, images_BCHW)
        return Diversity(distance_P, prompt_layouts(layouts, prompt_B))


def layouts_of(detector: Detector, images_BCHW: Tensor) -> list[Arrangement]:
    """Return the layout of each picture [B, 3, H, W]."""
    rows, columns = images_BCHW.shape[-2:]
    return [Arrangement.of(instances, rows, columns) for instances in detector.instances(images_BCHW)]


def _of_kind(layout: Arrangement, kind: str) -> Tensor:
    return layout.centres_N2[[place for place, own in enumerate(layout.kinds) if own == kind]].double()


def _grouped(layouts: Sequence[Arrangement], prompt_B: Tensor) -> Iterator[list[Arrangement]]:
    for number in prompt_B.unique(sorted=True):
        yield [layouts[row] for row in (prompt_B == number).nonzero().flatten().tolist()]
