"""Two-stage selection over a run's manifest: candidates by presence and balance, then the largest total similarity."""

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixrl.equations import is_candidate, select, shortfall
from pixrl.equations.fusion import BALANCE, PRESENCE
from pixrl.fusion.config import FuseConfig, resolve_options, sampler_of
from pixrl.hub import Presence
from pixrl.metrics.true_fusion import Fusion, FusionVerdict
from pixrl.runs.folder import ManifestRow
from pixrl.runs.reading import SIMILARITY, TRUE_FUSION, VERDICT


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of a candidate, and where they come from."""

    presence: float
    balance: float
    presence_source: str
    balance_source: str


@dataclass(frozen=True)
class Near:
    """A picture that did not qualify, and by how much it missed each test."""

    index: int
    presence: float
    balance: float


@dataclass(frozen=True)
class Selection:
    """The selected pictures by index, best first, and how many there were to choose from."""

    thresholds: Thresholds
    keep: int
    images: int
    failed: int
    candidates: int
    indices: tuple[int, ...]
    nearest: tuple[Near, ...] = ()
    pool: bool = False
    """Whether the choice was among the pool, the pictures that a policy drew when it had learned."""

    def summary(self, run: Path | None = None) -> str:
        """Return one or two sentences for the end of a run; `run` is the folder in the command that they advise."""
        t = self.thresholds
        test = f"presence > {t.presence:.3f} ({t.presence_source}), balance < {t.balance:.3f} ({t.balance_source})"
        where = " of the pool" if self.pool else ""
        if self.indices:
            share = f"{self.candidates} of {self.images} pictures{where} are candidates"
            return f"{share} ({test}); selected: {', '.join(map(str, self.indices))}."
        if not self.nearest:
            return f"None of {self.images} pictures{where} could be scored, so none is selected."
        best = self.nearest[0]
        misses = [f"{value:.3f} in {name}" for name, value in (("presence", best.presence), ("balance", best.balance))
                  if value > 0]  # fmt: skip
        missed = " and ".join(misses) or "nothing but the strict inequality"
        return (
            f"None of {self.images} pictures{where} qualifies ({test}). The nearest, {best.index}, fell short by "
            f"{missed}. To choose with other thresholds, without new pictures: "
            f"pixrl select{'' if run is None else f' {shlex.quote(str(run))}'} --presence {self._offer():.2f}"
        )

    def _offer(self) -> float:
        """A presence threshold, rounded down, that the nearest picture would pass."""
        return math.floor((self.thresholds.presence - self.nearest[0].presence) * 100 - 1e-6) / 100

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Selection":
        return Selection(
            thresholds=Thresholds(**data["thresholds"]),
            keep=data["keep"],
            images=data["images"],
            failed=data["failed"],
            candidates=data["candidates"],
            indices=tuple(data["indices"]),
            nearest=tuple(Near(**near) for near in data["nearest"]),
            pool=data.get("pool", False),
        )


def choose_thresholds(config: FuseConfig, calibrated: Presence | None) -> Thresholds:
    """Return the recipe's own thresholds, else the checkpoint's calibration, else the published ones."""
    if config.clip is not None or config.segmenter is not None:
        calibrated = None  # it holds for the checkpoint's own encoder and segmentation only
    published = "published for CLIP ViT-H/14 on photographs"
    presence, presence_source = PRESENCE, published
    balance, balance_source = BALANCE, published
    if calibrated is not None:
        presence, balance = calibrated.threshold, calibrated.balance
        presence_source = balance_source = f"calibrated for {config.model}"
    if config.presence is not None:
        presence, presence_source = config.presence, "given"
    if config.balance is not None:
        balance, balance_source = config.balance, "given"
    return Thresholds(presence, balance, presence_source, balance_source)


def choose(
    similarities_BN: Tensor,
    config: FuseConfig,
    thresholds: Thresholds,
    keep: int,
    seeds: Sequence[int] | None = None,
    everywhere: bool = False,
) -> Selection:
    """Select among scored pictures; row i is picture i, drawn from the noise `seeds[i]`.

    The first is the candidate with the largest total similarity (RMLer Eq. 7). Pictures of one noise look much alike,
    so the following ones take the best candidate of each other noise first. With a pool, the pictures that the policy
    learned from are no candidates; `everywhere` makes them such.
    """
    pooled = config.pool_images > 0 and len(similarities_BN) > config.learning_images and not everywhere
    open_B = torch.arange(len(similarities_BN)) >= (config.learning_images if pooled else 0)
    listed_B = shortlist(similarities_BN, config) & open_B
    passed_BN = similarities_BN.masked_fill(~listed_B[:, None], torch.nan)
    limits = (thresholds.presence, thresholds.balance)
    ranked = select(passed_BN, len(passed_BN), *limits).tolist() if len(passed_BN) else []
    chosen = one_a_noise_first(ranked, seeds or range(len(passed_BN)))[:keep]
    nearest: list[Near] = []
    if not chosen:  # those that missed the two tests by the least in all
        missed = shortfall(passed_BN, *limits)
        total_B = (missed.presence + missed.balance).nan_to_num(torch.inf)
        order = [int(i) for i in total_B.argsort(stable=True)[:keep] if bool(total_B[i].isfinite())]
        nearest = [Near(i, float(missed.presence[i]), float(missed.balance[i])) for i in order]
    return Selection(
        thresholds=thresholds,
        keep=keep,
        images=int(open_B.sum()),
        failed=int(similarities_BN[open_B].isnan().any(dim=1).sum()),
        candidates=int(is_candidate(passed_BN, *limits).sum()),
        indices=tuple(chosen),
        nearest=tuple(nearest),
        pool=pooled,
    )


def one_a_noise_first(ranked: Sequence[int], seeds: Sequence[int]) -> list[int]:
    """Order a ranking so that each noise's best picture comes before every noise's second best, and so on."""
    places: Counter[int] = Counter()
    order = []
    for rank, index in enumerate(ranked):
        order.append((places[seeds[index]], rank, index))
        places[seeds[index]] += 1
    return [index for _, _, index in sorted(order)]


def shortlist(similarities_BN: Tensor, config: FuseConfig) -> Tensor:
    """Return which pictures the sampler's method passes on to the selection, bool [B]."""
    options = resolve_options(config.sampler, config.options)
    return sampler_of(config.sampler).shortlist(options, similarities_BN)


def similarities_of(rows: Sequence[ManifestRow], concepts: Sequence[str]) -> Tensor:
    """Return the similarities [B, N] that a manifest holds; nan where scoring failed."""
    values = [[row.scores.get(f"{SIMILARITY}{concept}") for concept in concepts] for row in rows]
    numbers = [[math.nan if value is None else value for value in row] for row in values]
    return torch.tensor(numbers, dtype=torch.float32).reshape(len(rows), len(concepts))


def truths_of(rows: Sequence[ManifestRow], concepts: Sequence[str]) -> tuple[Fusion, ...]:
    """Return what a manifest says of its pictures; () where nothing told which of them are true fusions."""
    return tuple(
        Fusion(
            FusionVerdict(row.extra[VERDICT]),
            tuple(row.scores.get(f"{TRUE_FUSION}/{concept}") or 0.0 for concept in concepts),
            row.scores.get(TRUE_FUSION) or 0.0,
        )
        for row in rows
        if VERDICT in row.extra
    )
