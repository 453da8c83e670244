"""Means with 95 % intervals over pairs of concepts, and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval: the percentile bootstrap over pairs, 10,000 resamples with a fixed seed."""

    mean: float
    low: float
    high: float
    pairs: int

    def text(self, digits: int = 3) -> str:
        if self.pairs == 0:
            return "–"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    @property
    def excludes_zero(self) -> bool:
        return self.pairs > 1 and (self.low > 0 or self.high < 0)


def bootstrap(values: Sequence[float]) -> Interval:
    """The interval of the mean of one value a pair; nan values are left out."""
    known = np.asarray([value for value in values if not np.isnan(value)], dtype=np.float64)
    if not len(known):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(SEED)
    means = known[rng.integers(len(known), size=(RESAMPLES, len(known)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(known.mean()), float(low), float(high), len(known))


def by_pair(records: Sequence[Mapping[str, object]], variant: str, figure: str) -> dict[str, float]:
    """A figure of a variant, one value a pair: the mean over its seeds. Seeds without the figure are left out."""
    found: dict[str, list[float]] = {}
    for record in records:
        figures = record["figures"]
        assert isinstance(figures, Mapping)
        value = figures.get(figure)
        if record["variant"] == variant and value is not None:
            found.setdefault(str(record["pair"]), []).append(float(value))
    return {pair: sum(values) / len(values) for pair, values in found.items()}


def paired(records: Sequence[Mapping[str, object]], first: str, second: str, figure: str) -> Interval:
    """The mean difference first - second over the pairs that have both."""
    a, b = by_pair(records, first, figure), by_pair(records, second, figure)
    return bootstrap([a[pair] - b[pair] for pair in a if pair in b])
