"""Prompts x subjects as a prompt list: each prompt carries its subject's pictures in its metadata.

| key         | what                                                                             |
|-------------|----------------------------------------------------------------------------------|
| `subject`   | its name                                                                         |
| `class`     | its class word, where the source has one                                         |
| `include`, `exclude` | with the class word: a GenEval entry that asks for one of its class and no second one |
| `shown`     | the pictures that the model is shown: the first `count` references               |
| `reference` | all references, which rewards compare with                                       |
| `subjects`  | where several are shown together: a list of `class` and `reference`, one a subject |
| `target`    | how the picture should look, where the source has it; only `sft` learns from it  |

Pictures are read when they are asked for, and the last ones are kept.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pixrl.data.pictures import as_floats, read_picture, to_levels
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.data.subjects import Subject, SubjectSet
from pixrl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LEVEL_BYTES = 2**29
"""The bytes of 8-bit pictures that are kept, 170 of the largest ones: DreamBench has 158."""
CACHE_BYTES = 2**28
"""The bytes of the same pictures that are kept as float32."""
LARGEST = 1024
"""The pixels of a reference's longer side, to which larger ones are reduced: no reward or model looks at more."""

_Key = tuple[object, ...]


def subject_prompts(subjects: SubjectSet, *, count: int | None = 1) -> PromptSet:
    """Return every prompt of every subject, subject by subject.

    Args:
        subjects: of `load_subjects`.
        count: how many references the model is shown of each subject, the first ones; None: all.

    Raises:
        InputError: a subject has fewer references, or with None not all have as many.
    """
    fewest = min(subjects, key=lambda one: len(one.references))
    most = max(subjects, key=lambda one: len(one.references))
    have = len(fewest.references)
    if count is None and have != len(most.references):
        raise InputError(
            f"The subjects of {subjects.name} have different numbers of references ({fewest.name}: {have}, "
            f"{most.name}: {len(most.references)}), and all of a batch must be shown as many. Say how many: "
            f"--set references.count={have}"
        )
    if count is not None and have < count:
        raise InputError(
            f"references.count is {count}, but the subject {fewest.name!r} has {have}. Give it more pictures, or "
            f"type: --set references.count={have}"
        )
    store = _Store()
    return PromptSet(
        subjects.name,
        tuple(
            Prompt(text, _About(store, index, subject, number, count))
            for index, subject in enumerate(subjects)
            for number, text in enumerate(subject.prompts)
        ),
        subjects.notes,
    )


class _Kept:
    """A cache of pictures as tensors up to so many bytes, which drops the least recently used."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tensors: OrderedDict[_Key, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: _Key, make: Callable[[], "Tensor"]) -> "Tensor":
        found = self._tensors.get(key)
        if found is None:
            found = make()
            self._bytes += found.nbytes
        self._tensors[key] = found
        self._tensors.move_to_end(key)
        while self._bytes > self._limit and len(self._tensors) > 1:
            self._bytes -= self._tensors.popitem(last=False)[1].nbytes
        return found


class _Store:
    """A cache of pictures in 8 bits, and of the last ones as float tensors: the same tensor costs a reward nothing."""

    def __init__(self, levels: int = LEVEL_BYTES, floats: int = CACHE_BYTES) -> None:
        self._levels = _Kept(levels)
        self._floats = _Kept(floats)

    def get(self, key: _Key, read: Callable[[], Image.Image]) -> "Tensor":
        """Return the picture of a key, float32 [3, H, W]."""
        return self._floats.get(key, lambda: as_floats(self._levels.get(key, lambda: to_levels(read()))))


class _About(Mapping[str, object]):
    """One prompt's metadata, whose pictures are read when they are asked for."""

    def __init__(self, store: _Store, index: int, subject: Subject, number: int, count: int | None) -> None:
        self._store = store
        self._index = index
        self._subject = subject
        self._number = number
        self._count = count
        self._keys = ["subject", "reference", "shown"]
        self._keys += ["class", "include", "exclude"] if subject.word is not None else []
        self._keys += ["subjects"] if subject.words else []
        self._keys += ["target"] if subject.target(number) is not None else []

    def __getitem__(self, key: str) -> object:
        if key not in self._keys:
            raise KeyError(key)
        match key:
            case "subject":
                return self._subject.name
            case "class":
                return self._subject.word
            case "include" | "exclude":
                return [{"class": self._subject.word, "count": 1 if key == "include" else 2}]
            case "subjects":
                pictures = self._pictures(None)
                return [
                    {"class": word, "reference": picture}
                    for word, picture in zip(self._subject.words, pictures, strict=True)
                ]
            case "target":
                target = self._subject.target(self._number)
                assert target is not None
                return self._store.get((self._index, key, self._number), target)
            case "shown":
                return self._pictures(self._count)
        return self._pictures(None)

    def __contains__(self, key: object) -> bool:
        """Return whether the key is known, without reading a picture."""
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _pictures(self, count: int | None) -> "list[Tensor]":
        chosen = self._subject.references[:count]
        return [
            self._store.get((self._index, number), partial(_opened, one)) for number, one in enumerate(chosen)
        ]


def _opened(picture: Path | Image.Image) -> Image.Image:
    found = picture if isinstance(picture, Image.Image) else read_picture(picture)
    if max(found.size) <= LARGEST:
        return found
    smaller = found.copy()
    smaller.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return smaller
