"""The presence and balance thresholds of a generator and an encoder, from its own pictures.

0.63 and 0.05 are published for CLIP ViT-H/14 on photographs. Another encoder has another scale. Here the thresholds
come from pictures of single concepts:

* presence: a picture shows a concept when it is more similar to the concept's exemplars than 95 % of the pictures of
  other concepts are (`quantile` of the different-kind similarities).
* balance: 0.05 is 21.8 % of the imbalance that the paper measures on unmixed prompts (0.2380 and 0.2205, Table 2),
  where one parent is simply missing. The same share is taken of the same imbalance here: the median similarity to the
  own concept minus the median similarity to another one.

The probes' seeds are none of the exemplars', so that no picture is compared with itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pixrl.errors import InputError, RunError
from pixrl.fusion.world import FusionWorld
from pixrl.types import sample_seed

PROBE_SEED = 43
BALANCE_SHARE = 0.05 / ((0.2380 + 0.2205) / 2)


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and the similarities behind them."""

    threshold: float
    balance: float
    quantile: float
    same_median: float
    same_low: float
    """5 % of the pictures are less similar to their own concept than this."""
    different_median: float
    different_high: float
    """5 % of the pictures are more similar to another concept than this."""
    recognized: float
    """Share of the pictures whose own concept is above the threshold."""
    concepts: int
    exemplars: int
    probes: int

    def to_card(self) -> dict[str, Any]:
        """The entry `presence` of a checkpoint's pixrl.json."""
        return {name: round(x, 4) if isinstance(x, float) else x for name, x in asdict(self).items()}


def calibrate_presence(
    world: FusionWorld,
    concepts: Sequence[str],
    *,
    exemplars: int = 4,
    probes: int = 8,
    quantile: float = 0.95,
) -> Calibration:
    """Thresholds from `probes` pictures of each concept against `exemplars` pictures of every concept.

    Raises:
        InputError: fewer than two concepts, or a quantile outside (0, 1).
        RunError: nothing could be scored.
    """
    if len(set(concepts)) < 2:
        raise InputError(f"calibrate_presence needs two or more different concepts, got {list(concepts)!r}.")
    if not 0 < quantile < 1:
        raise InputError(f"quantile must be between 0 and 1, got {quantile}.")
    features = [world.exemplars(concept, exemplars).features_ME for concept in concepts]
    rows = [_probe(world, concept, probes, features) for concept in concepts]
    similarities_NPN = torch.stack(rows)
    own = torch.eye(len(concepts), dtype=torch.bool)[:, None].expand_as(similarities_NPN)
    same, different = _finite(similarities_NPN[own]), _finite(similarities_NPN[~own])
    if not len(same) or not len(different):
        raise RunError(
            f"No foreground was found in any picture of {', '.join(concepts)}: nothing to calibrate from."
        )
    threshold = float(different.quantile(quantile))
    apart = float(same.median() - different.median())
    return Calibration(
        threshold=threshold,
        balance=max(BALANCE_SHARE * apart, 0.0),
        quantile=quantile,
        same_median=float(same.median()),
        same_low=float(same.quantile(0.05)),
        different_median=float(different.median()),
        different_high=float(different.quantile(0.95)),
        recognized=float((same > threshold).float().mean()),
        concepts=len(concepts),
        exemplars=exemplars,
        probes=probes,
    )


def _probe(world: FusionWorld, concept: str, count: int, features: Sequence[Tensor]) -> Tensor:
    """Similarities [P, N] of new pictures of a concept to every concept."""
    seeds = [sample_seed(PROBE_SEED, 0, 0, i) for i in range(count)]
    conditioning = world.renderer.encode([world.prompt(concept)] * count)
    return world.scorer.similarities(world.renderer.sample(conditioning, seeds), features).similarities_BN


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]
