"""T2I-CompBench's attribute score (Huang et al. 2023): BLIP-VQA is asked about every noun phrase of the prompt.

    score = product over phrases of P(yes) / (P(yes) + P(no)) for the question "{phrase}?"

P is the decoder's distribution over the first word of the answer. The prompt's phrases are metadata["phrases"] where a
sample has them, else spaCy's noun chunks (extra `compbench`), at most 8.
  1. transformers' BlipForQuestionAnswering leaves [CLS] at the start of a question, where BLIP puts its own [ENC]; here
     [ENC] is put there, as T2I-CompBench's BLIP does.
  2. A prompt without any noun phrase fails; the original gives it 1.
  3. Probabilities are not rounded to 4 digits before they are multiplied.
Questions run in groups of equal length, unpadded: transformers 5.23 does not hand BLIP's decoder the mask of the
question (`encoder_attention_mask` ends in BlipTextAttention), so padding would change the answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError, RunError
from pixrl.hub import folder
from pixrl.hub_check import Layout, read_json
from pixrl.libraries import require
from pixrl.rewards.base import Options, Read, Reward
from pixrl.rewards.preprocess import Preprocessing, load_tokenizer, require_images
from pixrl.rewards.weights import describe, load_folder
from pixrl.types import RewardBatch, Scores

KEY = "phrases"
"""The metadata key of a prompt's noun phrases."""
SPACY_MODEL = "en_core_web_sm"
PLACES = frozenset(["top", "the side", "the left", "the right"])
"""Noun chunks that name a place, not an object; T2I-CompBench leaves them out."""
MOST_PHRASES = 8
QUESTION_LENGTH = 35
MOST_WORDS = 50
ENCODE, START, YES, NO = "[ENC]", "[DEC]", "yes", "no"
BATCH = 32
_DROPPED = re.compile(r"[.!\"()*#:;~]")


class NounPhrases:
    """A finder of prompts' noun phrases by spaCy's small English model; each prompt is parsed once.

    Raises:
        RunError: spaCy or its model is not installed; the message says what to type.
    """

    def __init__(self) -> None:
        spacy = require("spacy", "compbench", "blip_vqa, for prompts whose metadata lists no phrases,")
        try:
            self._parse: Any = spacy.load(SPACY_MODEL)
        except OSError as error:
            raise RunError(
                f"blip_vqa needs spaCy's English model. Type: python -m spacy download {SPACY_MODEL}"
            ) from error
        self._found: dict[str, tuple[str, ...]] = {}

    def of(self, prompt: str) -> tuple[str, ...]:
        """Return at most 8 noun phrases of a prompt, in order, without those that name places."""
        if prompt not in self._found:
            chunks = [chunk.text for chunk in self._parse(prompt).noun_chunks]
            self._found[prompt] = tuple(chunk for chunk in chunks if chunk not in PLACES)[:MOST_PHRASES]
        return self._found[prompt]


class BlipVQAReward(Reward):
    """The probability in [0, 1] that the picture shows every phrase of its prompt, with its attributes.

    Metadata: `phrases`, a list such as ["a red owl", "two cats"], where a sample has one. Without, spaCy finds them.

    Args:
        model: a folder or hub id of a BlipForQuestionAnswering (Salesforce/blip-vqa-capfilt-large).

    Raises:
        CheckpointError: the checkpoint is missing, half written or of another class.
        RunError: (when scoring) a sample has no phrases, and spaCy or its model is not installed.
    """

    name = "blip_vqa"
    examples: ClassVar[Mapping[str, object]] = {"model": "Salesforce/blip-vqa-capfilt-large"}
    licences: ClassVar[Mapping[str, str]] = {"Salesforce/blip-vqa-capfilt-large": "BSD-3-Clause"}

    def __init__(self, model: str | Path, device: str = "auto", dtype: str = "float32") -> None:
        path = folder(model, Layout.TRANSFORMERS)
        kind = read_json(path / "config.json").get("model_type")
        if kind != "blip":
            raise CheckpointError(
                f"{path} holds a {kind!r} model; blip_vqa needs a 'blip' one, such as "
                "Salesforce/blip-vqa-capfilt-large."
            )
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.preprocess = Preprocessing.from_folder(path, square=True)
        self.tokenizer = load_tokenizer(path)
        self.ids = answer_ids(self.tokenizer, path)
        with quiet_loading():
            from transformers import BlipForQuestionAnswering

            loaded = load_folder(BlipForQuestionAnswering, path, self.precision.weights)
        self.model = loaded.to(self.device)
        self._phrases: NounPhrases | None = None
        self.provenance: Mapping[str, str] = {
            **describe(model, path, self.licences),
            "preprocessing": self.preprocess.describe(),
            "phrases": f"metadata[{KEY!r}], else spaCy {SPACY_MODEL}; at most {MOST_PHRASES}",
        }

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        return {"model": Read(kinds=("blip",))}

    @classmethod
    def lacks_package(cls, metadata: Sequence[Mapping[str, object]]) -> str | None:
        if all(one.get(KEY) is not None for one in metadata):
            return None
        finds = "finds the phrases of prompts whose metadata lists none with"
        model = f"python -m spacy download {SPACY_MODEL}"
        if find_spec("spacy") is None:
            return f"{finds} spacy. Type: pip install 'pixrl[compbench]' && {model}"
        if find_spec(SPACY_MODEL) is None and not Path(SPACY_MODEL).is_dir():
            return f"{finds} spaCy's {SPACY_MODEL}. Type: {model}"
        return None

    @torch.inference_mode()
    def score(self, batch: RewardBatch) -> Scores:
        require_images(batch.images_BCHW)
        finite = batch.images_BCHW.isfinite().flatten(1).all(dim=1).tolist()
        values_B = torch.full((len(finite),), torch.nan)
        reasons: list[str | None] = []
        asked: list[tuple[int, str]] = []
        for row, ok in enumerate(finite):
            found = self._phrases_of(batch, row) if ok else ()
            reasons.append(_reason(ok, found))
            if ok and not isinstance(found, str):
                asked += [(row, phrase) for phrase in found]
        for (row, _), probability in zip(asked, self._ask(batch.images_BCHW, asked), strict=True):
            before = values_B[row].nan_to_num(1.0)
            values_B[row] = before * probability
        return Scores.checked(values_B, reasons, self.provenance)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return what the picture encoder makes of pictures [B, 3, H, W]: its states [B, L, D]."""
        pixels = self.preprocess(images_BCHW.to(self.device)).to(self.precision.weights)
        with self.precision.context(self.device):
            return torch.as_tensor(self.model.vision_model(pixel_values=pixels).last_hidden_state)

    def _ask(self, images_BCHW: Tensor, asked: Sequence[tuple[int, str]]) -> list[float]:
        """Return the probability of each (picture, phrase); every picture is encoded once."""
        rows = list(dict.fromkeys(row for row, _ in asked))
        seen: dict[int, Tensor] = {}
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            seen |= zip(part, self.encode(images_BCHW[part]), strict=True)
        probabilities: list[float] = []
        for start in range(0, len(asked), BATCH):
            some = asked[start : start + BATCH]
            pictures = torch.stack([seen[row] for row, _ in some])
            probabilities += self.yes(pictures, [question(phrase) for _, phrase in some]).tolist()
        return probabilities

    def yes(self, seen_BLD: Tensor, questions: Sequence[str]) -> Tensor:
        """Return [B]: P(yes) / (P(yes) + P(no)) as the first word of the answer, float32."""
        ids = self.tokenizer(list(questions), truncation=True, max_length=QUESTION_LENGTH).input_ids
        by_length: dict[int, list[int]] = {}
        for row, tokens in enumerate(ids):
            by_length.setdefault(len(tokens), []).append(row)
        values_B = torch.empty(len(ids), device=self.device)
        for rows in by_length.values():
            ids_BL = torch.tensor([ids[row] for row in rows], device=self.device)
            ids_BL[:, 0] = self.ids.encode
            starts = torch.full((len(rows), 1), self.ids.start, device=self.device)
            with self.precision.context(self.device):
                states = self.model.text_encoder(
                    input_ids=ids_BL, encoder_hidden_states=seen_BLD[rows], is_decoder=False
                ).last_hidden_state
                logits = self.model.text_decoder(input_ids=starts, encoder_hidden_states=states).logits[:, 0]
            # the other words' probabilities cancel
            values_B[rows] = logits[:, [self.ids.yes, self.ids.no]].float().softmax(dim=-1)[:, 0]
        return values_B

    def _phrases_of(self, batch: RewardBatch, row: int) -> Sequence[str] | str:
        """Return a sample's phrases, or why its metadata cannot be read."""
        given = batch.metadata[row].get(KEY) if batch.metadata else None
        if given is not None:
            if isinstance(given, str) or not isinstance(given, Sequence):
                return f"metadata[{KEY!r}] is a list of phrases, got {given!r}"
            if not all(isinstance(phrase, str) and phrase.strip() for phrase in given):
                return f"metadata[{KEY!r}] holds something that is no phrase: {list(given)!r}"
            return list(given)
        if self._phrases is None:
            self._phrases = NounPhrases()
        return self._phrases.of(batch.prompts[row])


def _reason(finite: bool, found: Sequence[str] | str) -> str | None:
    if not finite:
        return "the picture is not finite"
    if isinstance(found, str):
        return found
    return None if found else "the prompt has no noun phrase to ask about"


def question(phrase: str) -> str:
    """Return a phrase as BLIP is asked about it: lower case, some punctuation dropped, at most 50 words."""
    words = _DROPPED.sub("", f"{phrase}?".lower()).rstrip(" ").split(" ")
    return " ".join(words[:MOST_WORDS])


@dataclass(frozen=True)
class AnswerIds:
    """The numbers of the tokens that the score depends on."""

    encode: int
    start: int
    yes: int
    no: int


def answer_ids(tokenizer: Any, path: Path) -> AnswerIds:
    """Return the numbers of BLIP's tokens; its own two come after BERT's where the tokenizer does not know them.

    Raises:
        CheckpointError: the vocabulary has no yes or no.
    """
    known = tokenizer.get_vocab()
    for word in (YES, NO):
        if word not in known:
            raise CheckpointError(
                f"{path}: its vocabulary has no {word!r}. blip_vqa needs BERT's English vocabulary, as in "
                "Salesforce/blip-vqa-capfilt-large."
            )
    words = sorted(set(known) - {START, ENCODE})
    start = known.get(START, len(words))
    return AnswerIds(known.get(ENCODE, len(words) + 1), start, known[YES], known[NO])
