"""Prompts on their way into a model: words checked, rows encoded once and kept, and rows from changed embeddings.

A variant of a prompt is its token embeddings plus a perturbation, sent through the real encoder, a CLIP or a language
model (language.py). The embedding table's output is replaced and everything behind it (positions, causal mask, pooling
at the end token, projection) runs as published. All variants of a prompt go through as one batch, differentiable in the
embeddings. The features are then written over the encoder's own part of what `encode` gave; the other encoders' parts
stay as they are.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pixrl.device import free_bytes
from pixrl.equations import content_mask
from pixrl.errors import InputError, ShapeError, UnknownWordError, did_you_mean
from pixrl.models.base import Conditioning
from pixrl.text import require_text

Key = TypeVar("Key", bound=Hashable)
CACHE_BYTES = 2**30
"""The bytes of prompt rows that are kept."""
LANGUAGE = "language"
"""The name of the language model of a pipeline that reads prompts with one."""


def check_words(prompts: Sequence[str], vocabulary: frozenset[str] | None, name: str) -> None:
    """Check that prompts are text and hold no word outside the vocabulary; None allows every word.

    Raises:
        UnknownWordError: a word is outside the vocabulary.
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


class PromptCache(Generic[Key]):
    """A cache of conditioning rows of prompts, or of prompts with what is shown beside them.

    It drops the least recently used past `limit_bytes`. Each prompt is encoded alone, so that its row does not depend
    on what it was asked with, and a resumed run (whose cache starts empty) sees exactly the rows of the unbroken one.
    """

    def __init__(self, encode_one: Callable[[Key], Conditioning], limit_bytes: int = CACHE_BYTES) -> None:
        self._encode_one = encode_one
        self._limit = limit_bytes
        self._rows: OrderedDict[Key, Conditioning] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def keep(self, prompts: Sequence[Key], room: int | None = None) -> None:
        """Encode prompts, keep their rows on the CPU for good, and encode nothing else from now on.

        Args:
            prompts: at least one.
            room: the most bytes that the rows may take; None: half of the memory that is free.

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

    def rows(self, prompts: Sequence[Key]) -> Conditioning:
        """Return one row for each prompt, in order.

        Raises:
            InputError: there is no prompt.
        """
        if not prompts:
            raise InputError("encode was given no prompts.")
        found = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.cat([found[prompt] for prompt in prompts])

    def _row(self, prompt: Key) -> Conditioning:
        row = self._rows.get(prompt)
        if row is None:
            row = self._encode_one(prompt)
            self._bytes += _size(row)
        self._rows[prompt] = row
        self._rows.move_to_end(prompt)
        while self._bytes > self._limit and len(self._rows) > 1:
            self._bytes -= _size(self._rows.popitem(last=False)[1])
        return row


def _refuse(prompt: object) -> Conditioning:
    raise InputError(
        f"The prompt {prompt!r} was not among those that were encoded before the text encoders were dropped: "
        "set machine.drop_text_encoders=false."
    )


def _size(row: Conditioning) -> int:
    pooled = 0 if row.pooled_BE is None else row.pooled_BE.nbytes
    mask = 0 if row.mask_BL is None else row.mask_BL.nbytes
    return row.tokens_BLD.nbytes + pooled + mask + sum(reference.nbytes for reference in row.references)


@dataclass(frozen=True)
class PromptText:
    """A prompt as the input of one text encoder."""

    ids_L: Tensor
    """The token ids, padded to the pipeline's length, on the encoder's device."""
    content_L: Tensor
    """A mask (bool) that is true on the words: neither start, nor end, nor padding, nor the text around a prompt."""
    embeddings_LD: Tensor
    """The static input embeddings, float32, before positions are added."""
    end: int
    """The position of the first end token, where the encoder pools."""


@dataclass(frozen=True)
class TextFeatures:
    """The features that a pipeline takes from one text encoder, one row for each variant of a prompt."""

    pooled_KE: Tensor
    tokens_KLD: Tensor | None
    """The token features; None where the pipeline uses the pooled features alone (FLUX)."""

    def __getitem__(self, rows: Tensor) -> "TextFeatures":
        tokens = None if self.tokens_KLD is None else self.tokens_KLD[rows]
        return TextFeatures(self.pooled_KE[rows], tokens)

    @staticmethod
    def cat(parts: "list[TextFeatures]") -> "TextFeatures":
        """Return all rows of the parts, in order."""
        tokens = [part.tokens_KLD for part in parts if part.tokens_KLD is not None]
        return TextFeatures(
            torch.cat([part.pooled_KE for part in parts]), torch.cat(tokens) if tokens else None
        )


@dataclass(frozen=True)
class TextEncoder(ABC):
    """One frozen text encoder of a pipeline and where its features stand in a `Conditioning`."""

    name: str
    """The name of the encoder: `clip_l` or `clip_g`, as in the papers, or `LANGUAGE`."""
    model: Any
    """A text model of transformers."""
    tokenizer: Any
    length: int
    """The number of tokens that every prompt is padded or cut to."""

    @abstractmethod
    def read(self, prompt: str) -> PromptText:
        """Return a prompt's ids, content mask and static embeddings.

        Raises:
            InputError: the prompt has no word that could be perturbed.
        """

    @abstractmethod
    def pooled(self, ids_BL: Tensor, embeddings_BLD: Tensor) -> Tensor:
        """Return the pooled features [B, E] alone, float32, as `features` computes them.

        L may be cut after the first end tokens: under the causal mask later ones cannot reach them.
        """

    @abstractmethod
    def features(self, ids_BL: Tensor, embeddings_BLD: Tensor) -> TextFeatures:
        """Return pooled and token features, in the model's dtype, differentiable in the embeddings.

        Args:
            ids_BL: token ids, which say where the end token stands.
            embeddings_BLD: input embeddings in place of the table's.

        Raises:
            ShapeError: the embeddings are not `[B, L, D]` of these ids and this encoder.
        """

    @abstractmethod
    def blend(self, conditioning: Conditioning, features: TextFeatures, weight_B: Tensor) -> Conditioning:
        """Return a conditioning whose part of this encoder is (1 - weight) of its own and weight of the features.

        Args:
            conditioning: B rows; not changed.
            features: B rows.
            weight_B: in [0, 1]; where it is 0 the row stays exactly as it is.

        Raises:
            ShapeError: the numbers of rows differ, or the conditioning lacks what the pipeline takes.
        """

    def _text(self, ids_L: Tensor, content_L: Tensor, end: int, prompt: str) -> PromptText:
        """Return a prompt with its embeddings; InputError where it has no content."""
        if not content_L.any():
            raise InputError(
                f"The prompt {prompt!r} has no content token that {self.name} could perturb. "
                "Take it out of the prompts, or explore with noise alone."
            )
        table: nn.Module = self.model.get_input_embeddings()
        with torch.no_grad():
            embeddings: Tensor = table(ids_L[None])[0].float()
        return PromptText(ids_L, content_L, embeddings, end)

    def _run(self, ids_BL: Tensor, embeddings_BLD: Tensor, **options: Any) -> Any:
        """Run the model with these embeddings in place of its table's output."""
        table: nn.Module = self.model.get_input_embeddings()
        columns = next(table.parameters()).shape[1]
        wanted = (*ids_BL.shape, columns)
        if ids_BL.ndim != 2 or embeddings_BLD.shape != wanted:
            raise ShapeError(
                f"{self.name} takes embeddings {list(wanted)} for ids {list(ids_BL.shape)}, "
                f"got {list(embeddings_BLD.shape)}."
            )
        embeddings = embeddings_BLD.to(self.model.dtype)
        handle = table.register_forward_hook(lambda *_: embeddings)
        try:
            return self.model(ids_BL, **options)
        finally:
            handle.remove()


@dataclass(frozen=True)
class ClipEncoder(TextEncoder):
    """A CLIPTextModelWithProjection or CLIPTextModel."""

    projected: bool
    """Whether the pooled features are the projected ones (SD3) or the raw end token's (FLUX)."""
    pooled_columns: slice | None
    """The columns of the pooled features; None where the pipeline takes none from this encoder (SDXL's CLIP-L)."""
    token_columns: slice | None
    """The columns of the first `length` token rows; None where the pipeline takes no tokens from this encoder."""

    def read(self, prompt: str) -> PromptText:
        found = self.tokenizer(
            [prompt], padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = found.input_ids.to(self.model.device)
        edges = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        end = int((ids[0] == self.tokenizer.eos_token_id).int().argmax())
        # Padding comes after the first end token. It is not told by its id: CLIP-G's "!" is also a word.
        before_end = torch.arange(self.length, device=ids.device) < end
        return self._text(ids[0], content_mask(ids, edges)[0] & before_end, end, prompt)

    def pooled(self, ids_BL: Tensor, embeddings_BLD: Tensor) -> Tensor:
        return self._pooled(self._run(ids_BL, embeddings_BLD, output_hidden_states=False)).float()

    def features(self, ids_BL: Tensor, embeddings_BLD: Tensor) -> TextFeatures:
        with_tokens = self.token_columns is not None
        output = self._run(ids_BL, embeddings_BLD, output_hidden_states=with_tokens)
        return TextFeatures(self._pooled(output), output.hidden_states[-2] if with_tokens else None)

    def blend(self, conditioning: Conditioning, features: TextFeatures, weight_B: Tensor) -> Conditioning:
        rows = len(conditioning)
        if conditioning.pooled_BE is None or len(features.pooled_KE) != rows or len(weight_B) != rows:
            raise ShapeError(
                f"blend: {rows} conditionings, {len(features.pooled_KE)} rows of features and {len(weight_B)} "
                "weights; give one each, and conditionings with pooled features."
            )
        pooled = conditioning.pooled_BE.clone()
        if self.pooled_columns is not None:
            lerp_rows(pooled[:, self.pooled_columns], features.pooled_KE, weight_B)
        if self.token_columns is None or features.tokens_KLD is None:
            return replace(conditioning, pooled_BE=pooled)
        tokens = conditioning.tokens_BLD.clone()
        lerp_rows(tokens[:, : self.length, self.token_columns], features.tokens_KLD, weight_B)
        return replace(conditioning, tokens_BLD=tokens, pooled_BE=pooled)

    def _pooled(self, output: Any) -> Tensor:
        pooled: Tensor = output.text_embeds if self.projected else output.pooler_output
        return pooled


class PerturbableText(ABC):
    """A policy whose prompts pass through text encoders that can be given changed input embeddings."""

    @abstractmethod
    def text_encoders(self) -> tuple[TextEncoder, ...]:
        """Return CLIP-L, and then CLIP-G where there is one, in the layout of `encode`; or the language model."""


def lerp_rows(part: Tensor, other: Tensor, weight_B: Tensor) -> None:
    """Move a view toward `other`, row by row; exact at the weights 0 and 1."""
    weight = weight_B.to(device=part.device, dtype=part.dtype).view(-1, *[1] * (part.ndim - 1))
    part.copy_(torch.lerp(part, other.to(device=part.device, dtype=part.dtype), weight))
