"""A training step of `pixrl align`: collect, score, update; and whether the first one can be trusted.

It can where the first update is on-policy and all processes agree. With the weights that drew the pictures, GRPO's
ratio is 1 and NFT's trained and old velocity are the same; what is left is rounding, which depends on dtype and batch
size and must stay below the clip range to leave a signal.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pixrl.algorithms.loss import Rollouts
from pixrl.algorithms.trainer import Aligner
from pixrl.algorithms.world import Tally
from pixrl.device import Precision
from pixrl.errors import RunError
from pixrl.metrics.diversity import group_diversity
from pixrl.models.pipeline import FlowPipelinePolicy, chunks
from pixrl.runs.loaded import LoadedRun
from pixrl.runs.loop import Clock
from pixrl.types import Scores

ROWS = 8
"""The most pictures of a step that are checked."""
BROKEN = 0.05
"""A deviation that no rounding explains: weights, schedule or conditioning of sampling and training differ."""
AGREEMENT = 1e-6
"""The largest disagreement between the processes' gradients that passes."""


@dataclass
class Training:
    """Alignment as an algorithm of the loop: this process's groups of a step, their rewards, and what is checked once.

    Args:
        run: everything that the recipe names.
        aligner: the method.
        say: tells the user what was noticed.
        first: the step that this process begins with, whose update is checked.
    """

    run: LoadedRun
    aligner: Aligner
    say: Callable[[str], None]
    first: int
    kl_raised: float = 1.0
    """What the guard has multiplied the weight of the loss's KL by."""

    def images(self, step: int) -> int:
        return self.run.config.prompts.per_step * self.run.method.group_size

    def collect(self, step: int, clock: Clock) -> Rollouts:
        with clock.phase("collect"):
            rewards = self.run.rewards
            watch = rewards.expect if rewards.are_elsewhere else None
            return self.aligner.collect(self.run.groups(step), step, watch)

    def score(self, rollouts: Rollouts, clock: Clock) -> Mapping[str, Scores]:
        with clock.phase("score"):
            batch = rollouts.samples.batch(rollouts.images_BCHW, rollouts.step)
            return self.run.rewards.score(batch, self.run.team.gather)

    def update(self, rollouts: Rollouts, scores: Mapping[str, Scores], clock: Clock) -> dict[str, float]:
        first = rollouts.step == self.first
        checks = self._check_on_policy(rollouts) if first else {}
        with clock.phase("update"):
            metrics = self.aligner.update(rollouts, scores, self.run.rewards.weights(rollouts.step))
        if first:
            checks["gradient_disagreement"] = self.aligner.gradient_disagreement()
            require_agreement(checks["gradient_disagreement"])
        with clock.phase("diversity"):
            spread_P = group_diversity(rollouts.images_BCHW, self.run.method.group_size, self.run.features)
            tally = Tally()
            tally.add({"diversity": spread_P})
            metrics |= tally.over(self.run.team).means()
        return metrics | checks

    def raise_kl(self, factor: float) -> float:
        """Multiply the weight of the loss's KL from here on, and return it."""
        self.kl_raised *= factor
        method = self.run.method
        loss = copy.copy(method.loss)
        kl = float(loss.settings.model_dump()["kl"]) * self.kl_raised
        loss.settings = loss.settings.model_copy(update={"kl": kl})
        self.aligner.method = replace(method, loss=loss)
        return kl

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.aligner.tensors()

    def state(self) -> dict[str, Any]:
        raised = {} if self.kl_raised == 1 else {"kl_raised": self.kl_raised}
        return {"algorithm": self.aligner.state(), **raised}

    def restore(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        self.aligner.restore(tensors, state["algorithm"])
        if "kl_raised" in state:
            self.raise_kl(state["kl_raised"])

    def _check_on_policy(self, rollouts: Rollouts) -> dict[str, float]:
        """Of a run's first update, as it is computed; NFT's old policy rightly differs from the trained one later on.

        Other dtypes and batches are `pixrl selfcheck`'s to measure.
        """
        aligner = self.aligner
        later = rollouts.step > 0 and not aligner.method.loss.is_always_on_policy
        if later or not len(rollouts):
            return {}
        own = possible_dtypes(aligner.policy)[:1]
        (found,) = deviations(aligner, rollouts, own, [aligner.micro_batches.train])
        warning = require_on_policy(found, aligner.method.loss.on_policy_measure)
        if warning is not None:
            self.say(warning)
        return {f"on_policy_deviation/{found.dtype}/batch_{found.batch}": found.value}


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
