"""The reference pictures that a sample's metadata carries."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TypeVar

from torch import Tensor

from pixrl.errors import ConfigError, did_you_mean

KEY = "reference"
"""metadata[KEY]: one picture [3, H, W], several of one size [M, 3, H, W], or a list of pictures of any sizes."""


SUBJECTS = "subjects"
"""metadata[SUBJECTS]: metadata of each of several subjects that a picture should hold, a class and a reference each."""


def of_subject(metadata: Mapping[str, object], number: int | None) -> Mapping[str, object]:
    """The metadata of one of several subjects; all of it with None, and nothing where there is no such subject."""
    if number is None:
        return metadata
    several = metadata.get(SUBJECTS)
    if not isinstance(several, Sequence) or not 0 <= number < len(several):
        return {}
    found = several[number]
    return found if isinstance(found, Mapping) else {}


def references_of(metadata: Mapping[str, object]) -> list[Tensor]:
    """The references, each [1, 3, H, W]; empty where there is none or it is no picture."""
    given = metadata.get(KEY)
    parts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    pictures: list[Tensor] = []
    for part in parts:
        if not isinstance(part, Tensor) or part.ndim not in (3, 4):
            return []
        pictures.extend([part[None]] if part.ndim == 3 else part.split(1))
    return pictures


class References(StrEnum):
    """Which of a sample's references are compared: the mean over all, or the first alone."""

    ALL = "all"
    FIRST = "first"


def chosen(pictures: Sequence[Tensor], which: References) -> Sequence[Tensor]:
    """The references that are compared."""
    return pictures[:1] if which is References.FIRST else pictures


ChoiceT = TypeVar("ChoiceT", bound=StrEnum)


def choice(reward: str, option: str, given: str, choices: type[ChoiceT]) -> ChoiceT:
    """A reward's option as one of its choices.

    Raises:
        ConfigError: it is none of them.
    """
    if given not in list(choices):
        raise ConfigError(
            f"{reward}: unknown {option} {given!r}.{did_you_mean(str(given), choices)} Use {', '.join(choices)}."
        )
    return choices(given)


class FeatureCache:
    """Features of pictures by their content: a group's samples share their references, and so do later steps."""

    def __init__(self, limit: int = 1024) -> None:
        self.limit = limit
        self._rows: dict[str, Tensor] = {}

    def get(self, image_BCHW: Tensor, what: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives for this one picture; `what` tells apart features of the same picture."""
        content = image_BCHW.detach().float().cpu().contiguous().numpy().tobytes()
        key = f"{what}/{list(image_BCHW.shape)}/{hashlib.blake2b(content, digest_size=16).hexdigest()}"
        if key not in self._rows:
            while len(self._rows) >= self.limit:
                del self._rows[next(iter(self._rows))]
            self._rows[key] = make()
        return self._rows[key]
