"""Prompts x subjects as a prompt list: each prompt carries its subject's pictures in its metadata.

| key         | what                                                                             |
|-------------|----------------------------------------------------------------------------------|
| `subject`   | its name                                                                         |
| `class`     | its class word, where the source has one                                         |
| `include`, `exclude` | with the class word: a GenEval entry that asks for one of its class and no second one |
| `shown`     | the pictures that the model is shown: the first `count` references               |
| `reference` | all references, which rewards compare with                                       |
| `mask`      | where there are masks of yours: one a reference, [3, H, W], white the subject; None without one |
| `subjects`  | where several are shown together: a list of `class`, `reference` and `mask`, one a subject |
| `target`    | how the picture should look, where the source has it; only `sft` learns from it  |

Pictures are read when they are asked for, and the last ones are kept.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pixrl.data.pictures import PictureStore, opened, read_mask
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.data.subjects import Subject, SubjectSet
from pixrl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


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
    store = PictureStore()
    return PromptSet(
        subjects.name,
        tuple(
            Prompt(text, _About(store, index, subject, number, count))
            for index, subject in enumerate(subjects)
            for number, text in enumerate(subject.prompts)
        ),
        subjects.notes,
    )


class _About(Mapping[str, object]):
    """One prompt's metadata, whose pictures are read when they are asked for."""

    def __init__(
        self, store: PictureStore, index: int, subject: Subject, number: int, count: int | None
    ) -> None:
        self._store = store
        self._index = index
        self._subject = subject
        self._number = number
        self._count = count
        self._keys = ["subject", "reference", "shown"]
        self._keys += ["class", "include", "exclude"] if subject.word is not None else []
        self._keys += ["mask"] if any(subject.masks) else []
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
                several = zip(self._subject.words, self._pictures(None), self._masks(), strict=True)
                return [
                    {"class": word, "reference": picture, **({} if mask is None else {"mask": [mask]})}
                    for word, picture, mask in several
                ]
            case "mask":
                return self._masks()
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

    def _masks(self) -> "list[Tensor | None]":
        pairs = zip(self._subject.masks, self._subject.references, strict=True)
        return [
            self._store.get((self._index, "mask", number), partial(_opened_mask, mask, picture))
            if mask is not None and isinstance(picture, Path)
            else None
            for number, (mask, picture) in enumerate(pairs)
        ]

    def _pictures(self, count: int | None) -> "list[Tensor]":
        chosen = self._subject.references[:count]
        return [
            self._store.get((self._index, number), partial(opened, one)) for number, one in enumerate(chosen)
        ]


def _opened_mask(mask: Path, picture: Path) -> Image.Image:
    return opened(read_mask(mask, picture))
