"""This module knows what a person would type for a scene, and what such a prompt asks for.

`caption` and `parse` are inverse to each other on everything a caption fixes. `canonical` is that content as
one string; a tenth of all such strings is held out from training.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixrl.errors import InputError, UnknownWordError, did_you_mean
from pixrl.toy.scene import Scene, SceneObject, Task, random_scene
from pixrl.toy.vocabulary import (
    ACCESSORY_PHRASES,
    BACKGROUND_PHRASES,
    COLOURS,
    KINDS,
    NUMBERS,
    PATTERN_WORDS,
    PLURALS,
    RELATIONS,
)

PREFIXES = ("a photo of", "a picture of", "a drawing of", "")
BARE_PREFIX = "a photo of"
BARE_SHARE = 0.2
"""How often a random caption of one object leaves out the article: 'a photo of owl'."""

_PHRASES = [
    phrase
    for table in (BACKGROUND_PHRASES, ACCESSORY_PHRASES)
    for entry in table.values()
    for phrase in entry
]
_SINGULARS = {plural: kind for kind, plural in PLURALS.items()}
_KIND_OF = {kind: kind for kind in KINDS} | _SINGULARS
_PATTERN_OF = {word: pattern for pattern, word in PATTERN_WORDS.items()}
_NUMBER_WORDS = {count: word for word, count in NUMBERS.items()}
_COLOURED = (Task.COLORS, Task.COLOR_ATTR)

WORDS: tuple[str, ...] = tuple(
    sorted(
        {word for phrase in (*PREFIXES, *_PHRASES, *RELATIONS) for word in phrase.split()}
        | {"a", "an", "and", *KINDS, *PLURALS.values(), *COLOURS, *PATTERN_WORDS.values(), *NUMBERS}
    )
)
"""Every word a caption can contain."""


class UnknownWord(UnknownWordError):
    """This error says that a prompt uses a word the toy world does not know."""

    def __init__(self, word: str, allowed: Sequence[str]) -> None:
        self.word = word
        self.allowed = tuple(allowed)
        super().__init__(
            f"The toy world does not know the word {word!r}.{did_you_mean(word, allowed)} "
            f"It knows: {', '.join(allowed)}."
        )


class UnreadablePrompt(InputError):
    """This error says that the words of a prompt are known, but not what they say together."""

    def __init__(self, prompt: str, reason: str) -> None:
        super().__init__(
            f"Cannot read the prompt {prompt!r}: {reason}. "
            "Prompts look like 'a photo of a red owl on the beach', 'a photo of three cats', "
            "'a photo of a cup left of a tree' or 'an owl wearing a hat in the snow'."
        )


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """A parsed prompt is a GenEval entry, and what GenEval has no word for (None where it is not mentioned)."""

    metadata: dict[str, Any]
    background: str | None
    accessories: tuple[str, ...]
    pattern: str | None


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Return what a person would type for the scene; without `rng` always the first form, 'a photo of ...'."""
    prefix = PREFIXES[0] if rng is None else _choose(rng, PREFIXES)
    first = scene.objects[0]
    if scene.task is Task.COUNTING:
        count = len(scene.objects)
        body = f"{_NUMBER_WORDS[count]} {first.kind if count == 1 else PLURALS[first.kind]}"
    elif len(scene.objects) == 2:
        pair = [_with_article(_noun(scene, thing)) for thing in scene.objects]
        if scene.relation is None and rng is not None and rng.random() < 0.5:
            pair.reverse()
        body = f" {scene.relation or 'and'} ".join(pair)
    else:
        body = _noun(scene, first)
        if rng is not None and rng.random() < BARE_SHARE:
            prefix = BARE_PREFIX
        else:
            body = _with_article(body)
    parts = [prefix, body]
    if first.accessory is not None:
        parts.append(_choose(rng, ACCESSORY_PHRASES[first.accessory]))
    if scene.mentions_background:
        parts.append(_choose(rng, BACKGROUND_PHRASES[scene.background]))
    return " ".join(part for part in parts if part)


def _noun(scene: Scene, thing: SceneObject) -> str:
    words = [thing.kind]
    if scene.task is not Task.SUBJECT and thing.pattern != "plain":
        words.insert(0, PATTERN_WORDS[thing.pattern])
    if scene.task in _COLOURED and thing.colour is not None:
        words.insert(0, thing.colour)
    return " ".join(words)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _choose(rng: np.random.Generator | None, options: Sequence[str]) -> str:
    return options[0] if rng is None else options[int(rng.integers(len(options)))]


def parse(prompt: str) -> ParsedPrompt:
    """Return what the prompt asks for, with `metadata` shaped as a line of GenEval's metadata file.

    Raises:
        UnknownWord: the prompt has a word that no caption contains.
        UnreadablePrompt: the prompt names no object, or words are left that nothing explains.
    """
    words = prompt.lower().replace(",", " ").rstrip(" .!").split()
    for word in words:
        if word not in WORDS:
            raise UnknownWord(word, WORDS)
    text = " ".join(words)
    for prefix in PREFIXES:
        if prefix and text.startswith(f"{prefix} "):
            text = text.removeprefix(prefix).strip()
            break
    text, background = _cut_phrase(text, BACKGROUND_PHRASES)
    text, accessory = _cut_phrase(text, ACCESSORY_PHRASES)
    pattern = None
    between = next((word for word in (*RELATIONS, "and") if f" {word} " in text), None)
    if between is not None:
        (first, _), (second, _) = (_read_noun(part, prompt) for part in text.split(f" {between} ", 1))
        if between in RELATIONS:
            metadata = {"tag": "position", "include": [second, first | {"position": [between, 0]}]}
        else:
            tag = "color_attr" if "color" in first or "color" in second else "two_object"
            metadata = {"tag": tag, "include": [first, second]}
    else:
        entry, pattern = _read_noun(text, prompt)
        metadata = {"tag": "colors" if "color" in entry else "single_object", "include": [entry]}
        if text.split()[0] in NUMBERS:
            excluded = {"class": entry["class"], "count": entry["count"] + 1}
            metadata = {"tag": "counting", "include": [entry], "exclude": [excluded]}
    if accessory is not None and len(metadata["include"]) > 1:
        raise UnreadablePrompt(prompt, "only a picture of one object can name an accessory")
    metadata["prompt"] = prompt
    return ParsedPrompt(metadata, background, (accessory,) if accessory else (), pattern)


def _cut_phrase(text: str, table: dict[str, tuple[str, ...]]) -> tuple[str, str | None]:
    for name, phrases in table.items():
        for phrase in phrases:
            if text.endswith(f" {phrase}"):
                return text.removesuffix(phrase).strip(), name
    return text, None


def _read_noun(text: str, prompt: str) -> tuple[dict[str, Any], str | None]:
    words = text.split()
    if not words:
        raise UnreadablePrompt(prompt, "it names no object")
    kind = _KIND_OF.get(words.pop())
    if kind is None:
        raise UnreadablePrompt(prompt, f"{text!r} does not end in an object")
    entry: dict[str, Any] = {"class": kind, "count": 1}
    pattern = _PATTERN_OF[words.pop()] if words and words[-1] in _PATTERN_OF else None
    if words and words[-1] in COLOURS:
        entry["color"] = words.pop()
    if words and words[-1] in NUMBERS:
        entry["count"] = NUMBERS[words.pop()]
    elif words and words[-1] in ("a", "an"):
        words.pop()
    if words:
        raise UnreadablePrompt(prompt, f"{' '.join(words)!r} is not understood before {kind!r}")
    return entry, pattern


def canonical(scene: Scene) -> str:
    """Return what the scene's caption fixes as one string, which is equal for scenes that one prompt describes."""
    names = [_noun(scene, thing) for thing in scene.objects]
    if scene.task is Task.COUNTING:
        names = [f"{len(names)} {names[0]}"]
    elif scene.relation is None:
        names.sort()
    task = Task.SINGLE_OBJECT if scene.task is Task.SUBJECT else scene.task
    content = f" {scene.relation} ".join(names) if scene.relation else " and ".join(names)
    accessory = scene.objects[0].accessory or "-"
    return f"{task}: {content} | {accessory} | {scene.background if scene.mentions_background else '-'}"


def is_held_out(key: str) -> bool:
    """Return whether a canonical string belongs to the tenth kept from training; one of a bare kind never does."""
    if key in _BARE_KEYS:
        return False
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 10 == 0


_BARE_KEYS = frozenset(f"{Task.SINGLE_OBJECT}: {kind} | - | -" for kind in KINDS)


def held_out_prompts(task: Task, n: int, seed: int) -> list[str]:
    """Return `n` different captions of a task that training never saw; the seed fixes which.

    Raises:
        ValueError: the task has too few of them.
    """
    rng = np.random.default_rng(seed)
    prompts: dict[str, str] = {}
    for _ in range(1000 * n):
        if len(prompts) == n:
            break
        scene = random_scene(rng, task)
        key = canonical(scene)
        if is_held_out(key):
            prompts.setdefault(key, caption(scene))
    if len(prompts) < n:
        raise ValueError(
            f"Only {len(prompts)} held-out prompts of the task {task.value!r} were found; asked for {n}."
        )
    return list(prompts.values())
