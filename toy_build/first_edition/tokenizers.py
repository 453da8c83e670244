"""Word-level tokenizers in the published file formats: a CLIP BPE and a T5 unigram, every known word one token."""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from pixrl.toy.language import WORDS

CLIP_LENGTH = 20
"""Tokens of a prompt, start and end included: captions are at most 18 words."""
T5_LENGTH = 20


def clip_tokenizer() -> CLIPTokenizer:
    """BPE whose merges are learned from the word list until each word is one token; other text falls to letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(list(WORDS), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH)
    _check(tokenizer, extra=2)
    return tokenizer


def t5_tokenizer() -> T5Tokenizer:
    """A unigram list: every word with its leading mark, and single letters for anything else. Lower case only."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS] + [("▁", -8.0)]
    pieces += [(letter, -12.0) for letter in letters]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)
    _check(tokenizer, extra=1)
    return tokenizer


def _check(tokenizer: CLIPTokenizer | T5Tokenizer, extra: int) -> None:
    broken = [word for word in WORDS if len(tokenizer(word).input_ids) != 1 + extra]
    if broken:
        raise RuntimeError(f"these words are not one token in {type(tokenizer).__name__}: {broken}")
