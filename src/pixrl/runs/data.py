"""The data that a run learns from and is evaluated on: its paths, its checksums, and which prompts a step draws.

A group is never cut: each process gets whole ones. The order of prompts is a function of (seed, step) alone, so a
resumed run needs nothing but its step.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pixrl import plugins
from pixrl.algorithms.exploration import Group
from pixrl.algorithms.sft import TARGET
from pixrl.data.preferences import LOSER, WINNER
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.hub import full_path
from pixrl.rewards.references import KEY
from pixrl.runs.config import AlignConfig
from pixrl.types import sample_seed

SUBJECT = "subject"
ConfigT = TypeVar("ConfigT", bound=AlignConfig)


_SOURCES = ("model", "prompts.source", "evaluation.source", "output.features", "lora.base")
"""The settings that may name a file or a folder."""
_PARTS = ("loss", "exploration", "advantage")
"""The settings whose `kind` may name a file."""


def with_full_paths(config: ConfigT, known: AlignConfig | None = None) -> ConfigT:
    """Make the paths in a recipe absolute, the rewards' options among them; settings that equal `known`'s stay."""
    values, before = config.model_dump(), {} if known is None else known.model_dump()
    changed = config
    for name in _PARTS:
        inner = changed.__dict__[name]
        if inner != (None if known is None else known.__dict__[name]):
            update = {"kind": plugins.full_path(inner.kind)}
            changed = changed.model_copy(update={name: inner.model_copy(update=update)})
    for name in _SOURCES:
        part, _, key = name.rpartition(".")
        own = values.get(part) if part else values
        old = before.get(part) if part else before
        if own is None or own.get(key) is None or own[key] == (old or {}).get(key):
            continue
        full = full_path(own[key])
        inner = changed.__dict__[part].model_copy(update={key: full}) if part else full
        changed = changed.model_copy(update={part or key: inner})
    if known is not None and known.rewards == config.rewards:
        return changed
    return changed.model_copy(update={"rewards": tuple(one.with_full_paths() for one in config.rewards)})


_READ_ONCE = (TARGET, WINNER, LOSER)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def data_checksums(training: PromptSet, evaluation: PromptSet) -> dict[str, str]:
    """Return a checksum of each prompt set, by its setting and source: `prompts.source NAME`."""
    return {
        f"prompts.source {training.name}": checksum(training),
        f"evaluation.source {evaluation.name}": checksum(evaluation),
    }


def checksum(prompts: Iterable[Prompt]) -> str:
    """Compute a checksum of texts and metadata in their order.

    The pictures of a subject are read once, and targets and pairs never, since they are many; a pair's `checksums` are
    of its files.
    """
    total, known = hashlib.sha256(), set()
    for prompt in prompts:
        total.update(prompt.text.encode())
        subject = prompt.metadata.get(SUBJECT)
        pictures_too = subject is None or subject not in known
        known.add(subject)
        for key in sorted(prompt.metadata):
            if key not in _READ_ONCE and (pictures_too or key == SUBJECT):
                total.update(key.encode())
                _add(total, prompt.metadata[key])
    return total.hexdigest()[:16]


def what_is_asked(prompts: Iterable[Prompt]) -> Iterator[str]:
    """Identify what each prompt asks for: its subject by a checksum of the pictures, else its text.

    A subject's other prompts count as the same, since it is the subject that is learned.
    """
    known: dict[object, str] = {}
    for prompt in prompts:
        subject = prompt.metadata.get(SUBJECT)
        if subject is None:
            yield prompt.text
            continue
        if subject not in known:
            total = hashlib.sha256()
            _add(total, prompt.metadata.get(KEY))
            known[subject] = total.hexdigest()
        yield known[subject]


def _add(total: _Hash, value: Any) -> None:
    """A value of metadata: pictures by their numbers, containers by their parts, anything else as it is written."""
    if isinstance(value, Tensor):
        total.update(str(tuple(value.shape)).encode())
        total.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            _add(total, key)
            _add(total, value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            _add(total, part)
    else:
        total.update(repr(value).encode())


_ORDER_KEY = -4
"""The prompt index whose seeds shuffle the order of prompts; prompts use 0 and up."""


class PromptSampler:
    """A sampler that goes through a prompt set again and again in new orders; a step takes the next `per_step`."""

    def __init__(self, prompts: PromptSet, *, per_step: int, seed: int) -> None:
        self.prompts = prompts
        self.per_step = per_step
        self.seed = seed
        self._orders: dict[int, list[int]] = {}

    def groups(self, step: int) -> list[Group]:
        """Return all groups of a training step. A prompt occurs once an epoch, so epoch and index name a group."""
        first = step * self.per_step
        return [self._group(place, first + place) for place in range(self.per_step)]

    def _group(self, place: int, position: int) -> Group:
        epoch, turn = divmod(position, len(self.prompts))
        if epoch not in self._orders:  # the newest alone is kept: steps go on
            drawer = torch.Generator().manual_seed(sample_seed(self.seed, epoch, _ORDER_KEY, 0))
            self._orders = {epoch: torch.randperm(len(self.prompts), generator=drawer).tolist()}
        index = self._orders[epoch][turn]
        prompt = self.prompts[index]
        return Group(place, epoch, index, prompt.text, prompt.metadata)


def share(count: int, rank: int, size: int) -> slice:
    """Return the part of `count` items that process `rank` of `size` takes: consecutive ones, as evenly as possible."""
    return slice(count * rank // size, count * (rank + 1) // size)
