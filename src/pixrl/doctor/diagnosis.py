"""The findings of `pixrl doctor`: as an object, as JSON and in words."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pixrl import errors
from pixrl.errors import CheckpointError, PixrlError
from pixrl.models.memory.estimate import Cost, PartSize


class Need(StrEnum):
    """The kinds of things that can be missing."""

    PACKAGE = "package"
    WEIGHTS = "weights"
    TOKEN = "token"
    SERVICE = "service"
    DATA = "data"
    DEVICE = "device"
    MEMORY = "memory"
    DISK = "disk"
    SETTING = "setting"
    PLACE = "place"
    """A folder for the run."""


@dataclass(frozen=True)
class Problem:
    """One reason why the recipe cannot run here, and what to do."""

    need: Need
    message: str
    error: str
    """Name of the class in `pixrl.errors` with which a run refuses because of it."""


_ERRORS = {Need.WEIGHTS: "CheckpointError"} | dict.fromkeys(
    (Need.PACKAGE, Need.SERVICE, Need.MEMORY, Need.DISK, Need.PLACE), "RunError"
)
"""Errors of needs whose problem is given as a text; for needs that are not listed, an InputError."""


@dataclass
class Findings:
    """Problems, and notes that are worth knowing; filled as the checks go on."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def miss(self, need: Need, message: object) -> None:
        """Add a problem, an error or a text, once."""
        kinds = [kind.__name__ for kind in type(message).__mro__ if kind.__module__ == errors.__name__]
        problem = Problem(need, str(message), kinds[0] if kinds else _ERRORS.get(need, "InputError"))
        if all(problem.message != one.message for one in self.problems):
            self.problems.append(problem)

    def note(self, message: str) -> None:
        """Add what is worth knowing, once."""
        if message not in self.notes:
            self.notes.append(message)

    @contextmanager
    def catch(self, need: Need, *, weights: bool = False) -> Iterator[None]:
        """Add a PixrlError of the block as a problem, with `weights` a CheckpointError as one of the weights."""
        try:
            yield
        except PixrlError as error:
            self.miss(Need.WEIGHTS if weights and isinstance(error, CheckpointError) else need, error)


@dataclass(frozen=True)
class Hardware:
    """The device on which the run would compute."""

    device: str
    processes: int
    weights: str
    """The dtype of the weights."""
    computing: str
    """The dtype of matrix products."""
    free: int
    """Bytes that are free on the device now."""
    local: int
    """Number of processes on this host, which share its main memory."""


@dataclass(frozen=True)
class Trained:
    """The memory that training adds to the weights, in bytes."""

    parameters: int
    slots: int
    """Bytes of all slots."""
    saved: int
    """Bytes of the slots in a checkpoint."""
    gradients: int
    optimizer: int
    """Bytes of its state after the first step."""
    what: str
    """What is trained, in words."""
    replaced: int = 0
    """Bytes of the loaded weights that the slots replace: the denoiser's, where all of it is trained."""
    casts: int = 0
    """Bytes of copies in the computing dtype that autocast keeps during a pass, where trained weights are whole."""
    folded: int = 0
    """Bytes of the layers' weights with a slot's LoRA in them, where passes without a gradient compute with those."""


@dataclass(frozen=True)
class Work:
    """The amount of work of a run; None where it is not known."""

    prompts: int | None
    images_per_step: int
    steps_per_epoch: int | None
    images_per_epoch: int | None
    images_in_all: int
    seconds_per_step: float | None = None
    known_from: str | None = None
    """The run that was measured, or how a lower bound was found."""
    is_lower_bound: bool = False

    @property
    def seconds_per_epoch(self) -> float | None:
        """The seconds of one pass over the prompts."""
        if self.seconds_per_step is None or self.steps_per_epoch is None:
            return None
        return self.seconds_per_step * self.steps_per_epoch


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a run: pictures that are drawn and trained at a time, and why so many."""

    rollout: int
    train: int | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found out about a recipe. Unknown parts are None or empty; the problems say why."""

    kind: str
    model: str
    place: Hardware
    parts: Mapping[str, PartSize]
    rewards: Mapping[str, int]
    """Bytes on the disk of each model of a reward; in memory it takes about as many."""
    size: tuple[int, int] | None
    """Width and height of the pictures in pixels."""
    drawing: Cost | None
    batches: Batches | None
    needed: int | None
    """Bytes of one process at its peak, with these batches."""
    disk: int | None
    """Bytes that the run's folder may grow to."""
    work: Work
    problems: Sequence[Problem]
    notes: Sequence[str]
    trained: Trained | None = None
    training: Cost | None = None
    sharded: bool = False
    """Whether the processes divide the denoiser's weights among them."""

    @property
    def can_run(self) -> bool:
        """Whether nothing is missing."""
        return not self.problems

    @property
    def memory_checked(self) -> bool:
        """Whether the memory that is needed is known."""
        return self.needed is not None

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis as one JSON object."""
        found = {name: value for name, value in asdict(self).items() if name != "work"}
        work = asdict(self.work) | {"seconds_per_epoch": self.work.seconds_per_epoch}
        weights = sum(part.bytes for part in self.parts.values())
        known = {"can_run": self.can_run, "memory_checked": self.memory_checked}
        return {**known, **found, "work": work, "weights": weights}

    def lines(self) -> Iterator[str]:
        """Yield the diagnosis as lines for people."""
        place = self.place
        yield f"{self.kind}  {self.model}"
        yield f"device      {place.device} x {place.processes}, weights {place.weights}, computes in {place.computing}"
        for name, part in self.parts.items():
            yield f"{'weights':<12}{name:<18}{part.parameters / 1e6:>10.2f} M parameters{size(part.bytes):>12}"
        for name, taken in self.rewards.items():
            yield f"{'reward':<12}{name:<18}{'':>23}{size(taken):>12}"
        if self.trained is not None:
            t = self.trained
            yield f"{'training':<12}{t.what:<18}{t.parameters / 1e6:>10.2f} M parameters{size(t.slots):>12}"
            yield f"{'':<12}{'gradients':<41}{size(t.gradients):>12}"
            yield f"{'':<12}{'optimizer':<41}{size(t.optimizer):>12}"
        for name, cost in (("drawing", self.drawing), ("training", self.training)):
            if cost is not None:
                first = f"{name}, one picture"
                yield f"{'activations':<12}{first:<41}{size(cost.first):>12}, each further {size(cost.each)}"
        if self.batches is not None:
            yield from (f"{'batches':<12}{reason}" for reason in self.batches.reasons)
        if self.needed is None:
            why = "what is missing comes first" if self.parts else "it is not known before the model is there"
            yield f"{'memory':<12}not checked: {why}"
        else:
            how = ", the denoiser sharded" if self.sharded else ""
            yield f"{'memory':<12}{size(self.needed)} at the peak of a process{how}, {size(place.free)} free"
        yield from self._work()
        yield from (f"note        {note}" for note in self.notes)
        for problem in self.problems:
            yield f"MISSING     {problem.need.value}: {problem.message}"
        if not self.can_run:
            yield "It cannot run here as it is."
        elif self.memory_checked:
            yield "It can run."
        else:
            yield "Nothing else is missing, but memory was not checked."

    def _work(self) -> Iterator[str]:
        work = self.work
        yield f"{'pictures':<12}{work.images_per_step} a step, {work.images_in_all} in all"
        if work.steps_per_epoch is not None:
            seconds = "time not known"
            if work.seconds_per_epoch is not None:
                least = "at least " if work.is_lower_bound else ""
                seconds = f"{least}{work.seconds_per_epoch:.0f} s ({work.known_from})"
            yield (
                f"{'epoch':<12}{work.prompts} prompts: {work.steps_per_epoch} steps, {work.images_per_epoch} pictures, "
                f"{seconds}"
            )
        if self.disk is not None:
            yield f"{'disk':<12}{size(self.disk)} at most"


def require(found: Diagnosis | Findings) -> tuple[str, ...]:
    """Refuse what cannot run, by the first problem's own error; return the notes on what can.

    Raises:
        PixrlError: the problems, in one message.
    """
    if not found.problems:
        return tuple(found.notes)
    messages = [problem.message for problem in found.problems]
    kind: type[PixrlError] = vars(errors)[found.problems[0].error]
    if len(messages) == 1:
        raise kind(messages[0])
    raise kind("\n  ".join([f"{len(messages)} things stand against this run:", *messages]))


def size(count: int) -> str:
    """Return a number of bytes in words, such as 1.2 GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def run_name(path: Path) -> str:
    """Return the name by which `Work.known_from` calls a run."""
    return f"measured in {path}"
