"""Pairs of pictures of one prompt, of which one was preferred: what `loss: {kind: dpo}` learns from.

    {"prompt": "a photo of an owl", "winner": "0/a.png", "loser": "0/b.png"}

is a line of a .jsonl, or a row of any other file that prompts are read from. Paths are relative to the file. All that
else stands in a row (a seed, a variant, what a reward asks for) becomes the prompt's metadata, as for any prompt.

| key         | what                                                                       |
|-------------|----------------------------------------------------------------------------|
| `winner`    | the preferred picture, float32 [3, H, W], read when it is asked for         |
| `loser`     | the other one                                                              |
| `checksums` | of both files: a run that is gone on with has the same pairs               |
"""

from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path

from pixrl.data.pictures import PictureStore, opened, read_picture
from pixrl.data.prompts import Prompt, PromptSet, load_prompts
from pixrl.data.rows import FORMATS
from pixrl.errors import InputError

WINNER, LOSER = SIDES = ("winner", "loser")
"""The keys of the pictures that were and were not preferred."""
CHECKSUMS = "checksums"
LIKE = '{"prompt": "a photo of an owl", "winner": "0/a.png", "loser": "0/b.png"}'


def load_pairs(source: str | Path, *, column: str | None = None) -> PromptSet:
    """Load the pairs of a file. Every picture is opened once.

    Args:
        source: a file with rows, as `load_prompts` reads it.
        column: the column or key of its prompts; None: the usual ones.

    Raises:
        InputError: what `load_prompts` says; a source without rows; a row without a winner or a loser, or with a
            picture that is missing or cannot be read; a winner that is its own loser.
    """
    path = Path(source)
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{str(source)!r} holds no pairs of pictures, which loss: dpo learns from. Give a file of them: "
            f"--set prompts.source=pairs.jsonl, with lines like {LIKE}"
        )
    found = load_prompts(path, column=column)
    store = PictureStore()
    return PromptSet(
        found.name, tuple(Prompt(one.text, _checked(store, path, one)) for one in found), found.notes
    )


def _checked(store: PictureStore, path: Path, prompt: Prompt) -> "_PairRow":
    files, sums = {}, []
    for side in SIDES:
        name = prompt.metadata.get(side)
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{path}: the pair of {prompt.text!r} names no {side}. A line is like {LIKE}")
        files[side] = path.parent / name
        read_picture(files[side])
        sums.append(blake2b(files[side].read_bytes(), digest_size=16).hexdigest())
    if sums[0] == sums[1]:
        raise InputError(
            f"{path}: winner and loser of {prompt.text!r} are the same picture ({files[SIDES[0]]}), of which neither "
            "can be preferred. Take the line out."
        )
    return _PairRow(store, prompt.metadata, files, sums)


class _PairRow(Mapping[str, object]):
    """A prompt's metadata, whose two pictures are read when they are asked for."""

    def __init__(
        self, store: PictureStore, row: Mapping[str, object], files: Mapping[str, Path], sums: list[str]
    ) -> None:
        self._store = store
        self._files = files
        self._sums = sums
        self._values = {**row, CHECKSUMS: sums}

    def __getitem__(self, key: str) -> object:
        if key in self._files:
            return self._store.get((self._sums[SIDES.index(key)],), partial(opened, self._files[key]))
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        """Return whether the key is known, without reading a picture."""
        return key in self._values
