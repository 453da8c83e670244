"""The byte-pair tokenizers of the world, in the published file formats: most words are two or three pieces."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from pixrl.toy.language import WORDS, caption
from pixrl.toy.random_scenes import random_scene
from pixrl.toy.scene import Task

LENGTH = 40
"""Tokens of a prompt, start and end included; `longest` measures what captions need."""
T5_LENGTH = 28
PIECES = 170
"""Learned merges, beside one symbol for every byte."""
CORPUS, SEED = 20_000, 11


def corpus() -> Iterator[str]:
    """Random captions of every task."""
    rng = np.random.default_rng(SEED)
    tasks = tuple(Task)
    for index in range(CORPUS):
        yield caption(random_scene(rng, tasks[index % len(tasks)]), rng)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from captions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(",", "")])
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), letters])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + PIECES,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:PIECES]
    vocabulary = [
        *dict.fromkeys([*symbols, *("".join(pair) for pair in merges)]),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        lines = "\n".join(" ".join(pair) for pair in merges)
        Path(folder, "merges.txt").write_text(f"#version: 0.2\n{lines}\n")
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    return tokenizer


def t5_tokenizer() -> T5Tokenizer:
    """A unigram list for FLUX's second text slot: every known word one piece, letters for the rest. Lower case only.

    T5's own trainer was tried: with so few words it keeps letters ("▁ p h o t o") and prompts get twice as long.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS] + [("▁", -8.0)]
    pieces += [(letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def longest(tokenizer: CLIPTokenizer, captions: int = 4000) -> int:
    """The most tokens that one of some random captions needs, start and end included."""
    texts = [text for text, _ in zip(corpus(), range(captions), strict=False)]
    return max(len(ids) for ids in tokenizer(texts).input_ids)
