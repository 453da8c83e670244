"""The diversity of DivGenBench: of identities, styles, layouts and tones, each over pictures that should differ.

E2PO's benchmark (arXiv 2512.24146, supplement C). Its code and prompts are not published, so figures are comparable
among runs that use the same prompts and encoders, and only roughly with the paper's.

| figure | better | what |
|--------|--------|------|
| IDS    | lower  | mean cosine of all pairs of faces (`ids`) |
| ASC    | higher | how many of a training set's pictures are reached, against real pictures (`asc`) |
| SDI    | higher | how unlike the layouts of a prompt's pictures are (`sdi`) |
| PVS    | higher | spread of saturation, brightness and contrast (`pvs`) |

These four take pictures and what measures them, and give a `Figure`, which says what did. The formulas alone, on
embeddings and boxes, are `identity_similarity`, `style_coverage`, `spatial_diversity` and `photographic_variance`.

What the paper leaves open, and what is taken here: a picture without a face is left out of IDS and counted; two empty
layouts are alike (1) and an empty one is unlike any other (0); deviations are those of the population.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from torch import Tensor

from pixrl.errors import InputError, ShapeError
from pixrl.metrics.diversity import mean_pairwise_distance
from pixrl.rewards.preprocess import require_images
from pixrl.rewards.zoo.finders import Finder

GREY = (0.299, 0.587, 0.114)
"""The weights of Rec. 601, by which PIL converts to grey."""


class Encoder(Protocol):
    """An encoder of pictures: `rewards.faces.FaceEncoder`, `rewards.style.StyleEncoder` and others."""

    @property
    def provenance(self) -> Mapping[str, str]:
        """The id with checksum (`model`), `revision`, `licence` and preprocessing."""

    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Return features [B, E]; a row is not finite where a picture has nothing to embed."""


@dataclass(frozen=True)
class Figure:
    """A figure with the number of its pictures and the models that measured it."""

    name: str
    value: float
    counts: Mapping[str, int]
    provenance: Mapping[str, str]
    """The `model` (id with checksum), `revision`, `licence`, preprocessing, and thresholds where there are any."""


@dataclass(frozen=True)
class Features:
    """The features of pictures, and the provenance of their encoder."""

    rows_NE: Tensor
    provenance: Mapping[str, str]


def encode(encoder: Encoder, images: Iterable[Tensor]) -> Features:
    """Encode pictures [B, 3, H, W], batch by batch; batches may differ in size.

    Raises:
        InputError: there is no picture.
        ShapeError: features of two batches differ in length.
    """
    tables = [encoder.image_features(batch) for batch in images]
    if not tables:
        raise InputError("There is no picture to encode.")
    found = {table.shape[1] for table in tables if table.isfinite().any()}
    if len(found) > 1:
        raise ShapeError(f"The encoder gave features of {sorted(found)} numbers; they must be of one length.")
    width = found.pop() if found else 1
    rows = [
        table if table.isfinite().any() else table.new_full((len(table), width), torch.nan)
        for table in tables
    ]
    return Features(torch.cat(rows), encoder.provenance)


def ids(images: Iterable[Tensor], faces: Encoder) -> Figure:
    """Measure IDS of pictures, batch by batch, by a face encoder; counts `pictures`, and `faces` found in them.

    Raises:
        InputError: there is no picture.
    """
    found = encode(faces, images)
    identity = identity_similarity(found.rows_NE)
    counts = {"pictures": identity.pictures, "faces": identity.faces}
    return Figure("IDS", identity.similarity, counts, found.provenance)


def asc(synthetic: Features, test: Features, train: Features) -> Figure:
    """Measure ASC of features by one style encoder (`encode`); a training set is encoded once for many figures.

    Raises:
        InputError: they are of different encoders.
        ShapeError: see `style_coverage`.
    """
    for other in (test, train):
        if dict(other.provenance) != dict(synthetic.provenance):
            raise InputError(
                f"ASC compares features of one encoder, got {synthetic.provenance['model']} and "
                f"{other.provenance['model']}. Encode all three sets alike."
            )
    tables = {"pictures": synthetic.rows_NE, "test": test.rows_NE, "train": train.rows_NE}
    value = style_coverage(*tables.values())
    return Figure("ASC", value, {name: len(rows) for name, rows in tables.items()}, synthetic.provenance)


def sdi(prompts: Sequence[tuple[str, Tensor]], finder: Finder) -> Figure:
    """Measure SDI with a model that finds objects.

    Args:
        prompts: of each prompt, the object that it asks for and its pictures [M, 3, H, W].
        finder: `rewards.grounding.GroundingDino`, or a detector that knows the objects.
    """
    layouts = [finder.boxes(images_BCHW, [kind] * len(images_BCHW)) for kind, images_BCHW in prompts]
    counts = {"prompts": len(layouts), "pictures": sum(len(one) for one in layouts)}
    return Figure("SDI", spatial_diversity(layouts), counts, finder.provenance)


def pvs(images: Iterable[Tensor]) -> Figure:
    """Measure PVS of pictures [B, 3, H, W] in [0, 1], batch by batch.

    Raises:
        InputError: there is no picture.
    """
    tones = [picture_tones(batch) for batch in images]
    counts = {"pictures": sum(len(one) for one in tones)}
    return Figure(
        "PVS", _spread(tones), counts, {"model": "the pixels alone", "preprocessing": "HSV; Rec. 601 grey"}
    )


@dataclass(frozen=True)
class Identity:
    """The figure IDS, and the number of its faces and pictures."""

    similarity: float
    """The mean cosine in [-1, 1], lower is more diverse; nan with fewer than two faces."""
    faces: int
    pictures: int


def identity_similarity(faces_NE: Tensor) -> Identity:
    """Compute IDS = 2 / (N (N - 1)) sum over pairs of cos(v_i, v_j).

    Args:
        faces_NE: an embedding a picture (ArcFace's 512 numbers in the paper), of any length; a row that is not finite
            stands for a picture without a face.

    Raises:
        ShapeError: it is no table.
    """
    if faces_NE.ndim != 2:
        raise ShapeError(f"Faces are embeddings [N, E], got {list(faces_NE.shape)}.")
    found = faces_NE[faces_NE.isfinite().all(dim=1)].double()
    unit = torch.nn.functional.normalize(found, dim=1)
    similarity = 1 - mean_pairwise_distance(unit[None])[0].item() if len(unit) > 1 else math.nan
    return Identity(similarity, len(found), len(faces_NE))


def style_coverage(synthetic_NE: Tensor, test_NE: Tensor, train_NE: Tensor) -> float:
    """Compute ASC = IRS(synthetic) / IRS(test), near 1 where generated pictures reach as much as real ones.

    Args:
        synthetic_NE: style features of generated pictures (CSD in the paper, `rewards.style`).
        test_NE: of real pictures outside the training set; the paper takes as many as generated ones.
        train_NE: of the training set (WikiArt).

    Raises:
        ShapeError: the tables do not fit each other, or one is empty.
    """
    of_test = retrieval(test_NE, train_NE)
    return retrieval(synthetic_NE, train_NE) / of_test


def retrieval(queries_NE: Tensor, train_NE: Tensor) -> float:
    """Estimate IRS at infinitely many queries: the share of a training set that is a query's nearest neighbour (L2)."""
    shapes = [list(x.shape) for x in (queries_NE, train_NE)]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ShapeError(
            f"Retrieval needs features [N, E] and [M, E], none empty, got {shapes[0]} and {shapes[1]}."
        )
    nearest = torch.cat([torch.cdist(part, train_NE).argmin(dim=1) for part in queries_NE.split(1024)])
    return reachable(len(nearest.unique()), len(queries_NE), len(train_NE)) / len(train_NE)


def reachable(distinct: int, queries: int, train: int) -> int:
    """Return how many pictures s of a training set can be reached where n queries hit k: the likeliest s in k..M.

    P(k | n, s) = C(s, k) k! S(n, k) / s^n, with Stirling's numbers of the second kind, which do not depend on s: so s
    maximizes lgamma(s + 1) - lgamma(s - k + 1) - n log s. (Image retrieval score, as in BeyondFID.)

    Raises:
        InputError: not 1 <= k <= min(n, M).
    """
    if not 1 <= distinct <= min(queries, train):
        raise InputError(
            f"{queries} queries into {train} pictures hit from 1 to {min(queries, train)} of them, got {distinct}."
        )
    s = np.arange(distinct, train + 1, dtype=np.float64)
    likelihood = gammaln(s + 1) - gammaln(s - distinct + 1) - queries * np.log(s)
    return distinct + int(likelihood.argmax())


def spatial_diversity(layouts: Sequence[Sequence[Tensor]]) -> float:
    """Compute SDI: the mean over prompts of 1 - mean similarity of all pairs of a prompt's layouts, in [0, 1].

    Args:
        layouts: prompt by prompt, the boxes [N, 4] (x0, y0, x1, y1, in any one unit) of the asked object in each of
            its pictures; see `rewards.grounding`.

    Returns:
        nan without a prompt of at least two pictures; prompts of one picture are left out.
    """
    spreads = [
        1 - sum(layout_similarity(*pair) for pair in pairs) / len(pairs)
        for pictures in layouts
        if (pairs := list(combinations(pictures, 2)))
    ]
    return sum(spreads) / len(spreads) if spreads else math.nan


def layout_similarity(one_N4: Tensor, other_N4: Tensor) -> float:
    """Return the sum of IoU over the best matching of two layouts' boxes, divided by the larger number of boxes.

    It is in [0, 1]; two layouts without boxes have 1, one of them without boxes 0.

    Raises:
        ShapeError: boxes are not [N, 4].
    """
    for boxes in (one_N4, other_N4):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ShapeError(f"Boxes are [N, 4] (x0, y0, x1, y1), got {list(boxes.shape)}.")
    most = max(len(one_N4), len(other_N4))
    if not most:
        return 1.0
    overlap = intersection_over_union(one_N4, other_N4).numpy()
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return float(overlap[rows, columns].sum()) / most


def intersection_over_union(one_N4: Tensor, other_N4: Tensor) -> Tensor:
    """Return the IoU of all pairs of boxes, [N, M]; 0 for two boxes without area."""
    one, other = one_N4.double()[:, None], other_N4.double()[None]
    sides = torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])
    shared = sides.clamp_min(0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(dim=-1) for boxes in (one, other)]
    whole = areas[0] + areas[1] - shared
    return torch.where(whole > 0, shared / whole, torch.zeros_like(whole))


def photographic_variance(images: Iterable[Tensor]) -> float:
    """Compute PVS = std(s) + std(v) + std(c) over pictures; 0 where all are alike.

    Args:
        images: pictures [B, 3, H, W] in [0, 1], batch by batch; batches may differ in size.

    Raises:
        InputError: there is no picture.
    """
    return _spread([picture_tones(batch) for batch in images])


def _spread(tones: Sequence[Tensor]) -> float:
    if not tones:
        raise InputError("PVS needs at least one picture.")
    return torch.cat(list(tones)).std(dim=0, correction=0).sum().item()


def picture_tones(images_BCHW: Tensor) -> Tensor:
    """Return each picture's mean saturation s and value v (HSV), and contrast c, the deviation of its grey: [B, 3]."""
    require_images(images_BCHW)
    pixels = images_BCHW.double().clamp(0, 1)
    value, least = pixels.amax(dim=1), pixels.amin(dim=1)
    saturation = torch.where(value > 0, (value - least) / value, torch.zeros_like(value))
    grey = (pixels * pixels.new_tensor(GREY).view(1, 3, 1, 1)).sum(dim=1)
    contrast = grey.flatten(1).std(dim=1, correction=0)
    return torch.stack([saturation.mean(dim=(1, 2)), value.mean(dim=(1, 2)), contrast], dim=1)
