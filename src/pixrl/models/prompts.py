"""What every renderer does with prompts: check the words, encode each one once, keep the rows."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from pixrl.device import free_bytes
from pixrl.errors import InputError, UnknownWordError, did_you_mean
from pixrl.models.base import Conditioning
from pixrl.text import require_text

CACHE_BYTES = 2**30


def check_words(prompts: Sequence[str], vocabulary: frozenset[str] | None, name: str) -> None:
    """Raises UnknownWordError for the first word outside the vocabulary; None allows every word.

    Raises:
        InputError: one string instead of a list; or a prompt holds what is no text, such as half an emoji.
    """
    if isinstance(prompts, str):
        raise InputError(
            f"encode takes a list of prompts, got the one string {prompts!r}. Write [{prompts!r}]."
        )
    for prompt in prompts:
        require_text(prompt, f"the prompt {prompt!r}")
    if vocabulary is None:
        return
    for prompt in prompts:
        for word in prompt.lower().replace(",", " ").rstrip(" .!").split():
            if word not in vocabulary:
                words = sorted(vocabulary)
                raise UnknownWordError(
                    f"{name} does not know the word {word!r} of the prompt {prompt!r}."
                    f"{did_you_mean(word, words)} It knows: {', '.join(words)}."
                )


class PromptCache:
    """Prompt -> conditioning row, least recently used first out past `limit_bytes`.

    Each prompt is encoded alone, so that its row does not depend on what it was asked with, and a resumed run (whose
    cache starts empty) sees exactly the rows of the unbroken one.
    """

    def __init__(self, encode_one: Callable[[str], Conditioning], limit_bytes: int = CACHE_BYTES) -> None:
        self._encode_one = encode_one
        self._limit = limit_bytes
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def keep(self, prompts: Sequence[str], room: int | None = None) -> None:
        """Encodes prompts, keeps their rows on the CPU for good, and encodes nothing else from now on.

        `room`: bytes; None: half of the memory that is free.

        Raises:
            InputError: the rows would not fit.
        """
        wanted = list(dict.fromkeys(prompts))
        room = free_bytes(torch.device("cpu")) // 2 if room is None else room
        each = _size(self._encode_one(wanted[0]))
        if each * len(wanted) > room:
            raise InputError(
                f"The embeddings of {len(wanted)} prompts need {each * len(wanted) / 2**30:.1f} GiB, and "
                f"{room / 2**30:.1f} GiB may be used: keep the text encoders (machine.drop_text_encoders=false), on a "
                "GPU with machine.offload=parts."
            )
        self.clear()
        self._limit = room
        for prompt in wanted:
            self._rows[prompt] = self._encode_one(prompt).to(device="cpu")
        self._encode_one = _refuse

    def clear(self) -> None:
        """Forget every row: needed when the text encoder itself has changed."""
        self._rows.clear()
        self._bytes = 0

    def rows(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, in order."""
        if not prompts:
            raise InputError("encode was given no prompts.")
        found = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.cat([found[prompt] for prompt in prompts])

    def _row(self, prompt: str) -> Conditioning:
        row = self._rows.get(prompt)
        if row is None:
            row = self._encode_one(prompt)
            self._bytes += _size(row)
        self._rows[prompt] = row
        self._rows.move_to_end(prompt)
        while self._bytes > self._limit and len(self._rows) > 1:
            self._bytes -= _size(self._rows.popitem(last=False)[1])
        return row


def _refuse(prompt: str) -> Conditioning:
    raise InputError(
        f"The prompt {prompt!r} was not among those that were encoded before the text encoders were dropped: "
        "set machine.drop_text_encoders=false."
    )


def _size(row: Conditioning) -> int:
    pooled = 0 if row.pooled_BE is None else row.pooled_BE.nbytes
    return row.tokens_BLD.nbytes + pooled + sum(reference.nbytes for reference in row.references)
