"""Whether a run can be trusted before it starts: is the first update on-policy, and do all processes agree?

With the weights that drew the pictures, GRPO's ratio is 1 and NFT's trained and old velocity are the same; what is left
is rounding, which depends on dtype and batch size and must stay below the clip range to leave a signal.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from pixrl.algorithms.base import Rollouts
from pixrl.algorithms.trainer import Aligner
from pixrl.device import Precision
from pixrl.errors import RunError
from pixrl.models.pipeline import FlowPipelinePolicy, chunks

ROWS = 8
"""The most pictures of a step that are checked."""
BROKEN = 0.05
"""A deviation that no rounding explains: weights, schedule or conditioning of sampling and training differ."""
AGREEMENT = 1e-6
"""The largest disagreement between the processes' gradients that passes."""


@dataclass(frozen=True)
class Deviation:
    """The distance of the first update from on-policy at one dtype and batch size, and the loss's limit for it."""

    dtype: str
    batch: int
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the deviation is within its limit."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Report:
    """The result of a self-check."""

    measure: str
    deviations: tuple[Deviation, ...]
    gradient_disagreement: float
    processes: int
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the run's own dtype and batch, which come first, are within the limit, and the gradients agree."""
        return self.deviations[0].passed and self.gradient_disagreement <= AGREEMENT

    def to_json(self) -> dict[str, object]:
        """Return the report as `pixrl selfcheck --json` prints it."""
        rows = [{**asdict(one), "passed": one.passed} for one in self.deviations]
        return {**asdict(self), "deviations": rows, "passed": self.passed}

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        head = f"{self.measure}, limit {self.deviations[0].limit:g}:"
        rows = [
            f"  {'ok  ' if one.passed else 'over'}  {one.dtype:<9} batch {one.batch:<4} {one.value:.2e}"
            for one in self.deviations
        ]
        agree = f"gradients of {self.processes} process(es) differ by {self.gradient_disagreement:.1e}"
        return [*self.notes, head, *rows, agree, "passed" if self.passed else "FAILED"]


def deviations(
    aligner: Aligner, rollouts: Rollouts, dtypes: Sequence[str], sizes: Sequence[int]
) -> list[Deviation]:
    """Measure how far the first rollouts are from on-policy, at each dtype and batch size in the given order."""
    policy, loss, limit = aligner.policy, aligner.method.loss, aligner.method.loss.on_policy_limit
    rows = range(min(ROWS, len(rollouts)))
    found = []
    for dtype in dtypes:
        for size in dict.fromkeys(min(size, len(rows)) for size in sizes):
            with computing_in(policy, dtype):
                pieces = [loss.deviation(policy, rollouts, rows[piece]) for piece in chunks(len(rows), size)]
            found.append(Deviation(dtype, size, max(pieces), limit))
    return found


def possible_dtypes(policy: object) -> list[str]:
    """List the dtypes that a loaded model can compute in, its own first."""
    assert isinstance(policy, FlowPipelinePolicy)
    own = dtype_name(policy.precision)
    return [
        own,
        *(one for one in ("float32", "bfloat16") if one != own and policy.precision.weights is torch.float32),
    ]


def dtype_name(precision: Precision) -> str:
    """Name the dtype that matrix products run in: float32, bfloat16 or float16."""
    return str(precision.autocast or precision.weights).removeprefix("torch.")


@contextmanager
def computing_in(policy: object, dtype: str) -> Iterator[None]:
    """Run the model's matrix products in another dtype within the `with` block."""
    assert isinstance(policy, FlowPipelinePolicy)
    before = policy.precision
    if dtype != dtype_name(before):
        policy.precision = Precision(before.weights, None if dtype == "float32" else torch.bfloat16)
    try:
        yield
    finally:
        policy.precision = before


def require_on_policy(found: Deviation, measure: str) -> str | None:
    """Return a warning for a deviation above its limit, else None.

    Raises:
        RunError: the deviation is one that no rounding explains.
    """
    if not found.value <= BROKEN:
        raise RunError(
            f"The first update is not on-policy: {measure} is {found.value:.3g}. The weights, the schedule or the "
            "conditioning of sampling and training differ. Please report this with the recipe."
        )
    if found.passed:
        return None
    return (
        f"Warning: {measure} is {found.value:.1e} in {found.dtype}, above {found.limit:g}: rounding drowns part of the "
        "signal. Compute in float32 (--set machine.dtype=float32), or raise loss.clip where the recipe has one."
    )


def require_agreement(value: float) -> None:
    """Raise a RunError where the processes' gradients differ by more than `AGREEMENT`."""
    if not value <= AGREEMENT:
        raise RunError(
            f"The processes' gradients differ by {value:.1e} after the first update; they must be equal."
        )
