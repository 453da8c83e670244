"""Means with 95 % intervals over units (pairs of concepts, seeds), and paired differences."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; nan bounds where one value gives none."""

    mean: float
    low: float
    high: float
    count: int
    """The number of units: pairs, or seeds."""

    def text(self, digits: int = 3) -> str:
        """Return the mean with the interval in brackets, where there is one."""
        if self.count == 0:
            return "–"
        if math.isnan(self.low):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval; false of fewer than two units."""
        return self.count > 1 and (self.low > 0 or self.high < 0)


Intervals = Callable[[Sequence[float]], Interval]


def gains_by_prompt(
    before: Sequence[float | None], after: Sequence[float | None], per_prompt: int
) -> list[float]:
    """Return each prompt's mean gain over its pictures that have both scores; nan of a prompt without one."""
    gains = [
        math.nan if old is None or new is None else new - old for old, new in zip(before, after, strict=True)
    ]
    groups = [gains[at : at + per_prompt] for at in range(0, len(gains), per_prompt)]
    known = [[gain for gain in group if not math.isnan(gain)] for group in groups]
    return [sum(group) / len(group) if group else math.nan for group in known]


def bootstrap(values: Sequence[float]) -> Interval:
    """Return the percentile bootstrap interval of the mean of one value a unit; nan is left out.

    There are 10,000 resamples with a fixed seed.
    """
    known = _known(values)
    if not len(known):
        return Interval(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(SEED)
    means = known[rng.integers(len(known), size=(RESAMPLES, len(known)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(known.mean()), float(low), float(high), len(known))


def student(values: Sequence[float]) -> Interval:
    """Return Student's t-interval of the mean of one value a unit; nan is left out.

    It is for few units (three seeds), where a bootstrap has too few different resamples and comes out far too narrow.
    """
    known = _known(values)
    if len(known) < 2:
        mean = float(known[0]) if len(known) else math.nan
        return Interval(mean, math.nan, math.nan, len(known))
    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    mean = float(known.mean())
    return Interval(mean, mean - half, mean + half, len(known))


def by_unit(
    records: Sequence[Mapping[str, object]], variant: str, figure: str, unit: str = "pair"
) -> dict[str, float]:
    """Return a variant's figure for each unit: the mean over its records that have the figure."""
    found: dict[str, list[float]] = {}
    for record in records:
        figures = record["figures"]
        assert isinstance(figures, Mapping)
        value = figures.get(figure)
        if record["variant"] == variant and value is not None:
            found.setdefault(str(record[unit]), []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def paired(
    records: Sequence[Mapping[str, object]],
    first: str,
    second: str,
    figure: str,
    unit: str = "pair",
    interval: Intervals = bootstrap,
) -> Interval:
    """Return the mean difference first - second over the units that have both, with its interval."""
    a, b = by_unit(records, first, figure, unit), by_unit(records, second, figure, unit)
    return interval([a[name] - b[name] for name in a if name in b])


def _known(values: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
