"""Where what a run learns from and is evaluated on lies, and checksums of it: prompts, words, reference pictures."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pixrl.algorithms.sft import TARGET
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.hub import full_path
from pixrl.rewards.references import KEY
from pixrl.runs.align_config import AlignConfig

SUBJECT = "subject"
ConfigT = TypeVar("ConfigT", bound=AlignConfig)


_SOURCES = ("model", "prompts.source", "evaluation.source", "output.features", "lora.base")
"""Settings that may name a file or a folder."""


def with_full_paths(config: ConfigT, known: AlignConfig | None = None) -> ConfigT:
    """A recipe that names files and folders by their whole paths; settings that are those of `known` stay as they are.

    The rewards' options are among them.
    """
    values, before = config.model_dump(), {} if known is None else known.model_dump()
    changed = config
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


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def data_checksums(training: PromptSet, evaluation: PromptSet) -> dict[str, str]:
    """A checksum each of the two prompt sets, by what they are for and where they come from."""
    return {
        f"prompts.source {training.name}": checksum(training),
        f"evaluation.source {evaluation.name}": checksum(evaluation),
    }


def checksum(prompts: Iterable[Prompt]) -> str:
    """Of texts and metadata in their order; the pictures of a subject are read once, targets never: they are many."""
    total, known = hashlib.sha256(), set()
    for prompt in prompts:
        total.update(prompt.text.encode())
        subject = prompt.metadata.get(SUBJECT)
        pictures_too = subject is None or subject not in known
        known.add(subject)
        for key in sorted(prompt.metadata):
            if key != TARGET and (pictures_too or key == SUBJECT):
                total.update(key.encode())
                _add(total, prompt.metadata[key])
    return total.hexdigest()[:16]


def what_is_asked(prompts: Iterable[Prompt]) -> Iterator[str]:
    """What each prompt is of: its subject, by the pictures and whatever it is called; without a subject, its text.

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
