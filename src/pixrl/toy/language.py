"""What a person would type for a scene, and what such a prompt asks for.

`caption` and `parse` are inverse to each other on everything a caption fixes, in every phrasing: both go by the forms
of `phrases`. `canonical` is that content as one string; a tenth of all such strings is held out from training.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pixrl.errors import InputError, UnknownWordError
from pixrl.toy.phrases import (
    CLAUSES,
    COUNT_FORMS,
    EXCHANGE_FORMS,
    HYBRID_FORMS,
    NEAREST,
    ONE_FORMS,
    OVERLAY_FORMS,
    PAIR_FORMS,
    PREFIXES,
    RELATION_FORMS,
)
from pixrl.toy.random_scenes import random_scene
from pixrl.toy.scene import Scene, SceneObject, Task
from pixrl.toy.vocabulary import (
    ACCESSORY_PHRASES,
    ANIMALS,
    BACKGROUND_PHRASES,
    COLOURS,
    KINDS,
    MOOD_WORDS,
    NAMES,
    NUMBERS,
    PART_WORDS,
    PATTERN_WORDS,
    PLURALS,
    SIZE_WORDS,
    SLOTS,
)

BARE_PREFIX = "a photo of"
BARE_SHARE = 0.15
"""How often a random caption of one object leaves out the article: "a photo of owl"."""
SECOND_NAME_SHARE = 0.25
CLAUSE_SHARE = 0.2
BACKGROUND_FIRST_SHARE = 0.2
_COLOURED = (Task.COLORS, Task.COLOR_ATTR)

_ADJECTIVES: dict[str, tuple[str, str]] = {
    **{word: ("size", size) for size, words in SIZE_WORDS.items() for word in words},
    **{word: ("mood", mood) for mood, words in MOOD_WORDS.items() for word in words},
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("pattern", pattern) for pattern, words in PATTERN_WORDS.items() for word in words},
}
"""Every adjective, as what it says of an object."""
_KIND_OF = {name: kind for kind, names in NAMES.items() for name in names}
_SINGULAR = {PLURALS[name]: kind for name, kind in _KIND_OF.items()}
_NUMBER_WORDS = {count: word for word, count in NUMBERS.items()}
_PARTS = {(kind, word): slot for kind, words in PART_WORDS.items() for slot, word in enumerate(words)}


def _words_of(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in text.replace("{}", " ").split()}


WORDS: tuple[str, ...] = tuple(
    sorted(
        _words_of(PREFIXES)
        | _words_of((*PAIR_FORMS, *COUNT_FORMS, *ONE_FORMS, *HYBRID_FORMS, *EXCHANGE_FORMS, *OVERLAY_FORMS))
        | _words_of(form for forms in RELATION_FORMS.values() for form in forms)
        | _words_of(
            p
            for table in (BACKGROUND_PHRASES, ACCESSORY_PHRASES)
            for phrases in table.values()
            for p in phrases
        )
        | _words_of(word for words in PART_WORDS.values() for word in words)
        | _words_of((*_ADJECTIVES, *_KIND_OF, *_SINGULAR, *NUMBERS, *CLAUSES.values(), "a", "an"))
    )
)
"""Every word a caption can contain."""


class UnknownWord(UnknownWordError):
    """A prompt uses a word the toy world does not know."""

    def __init__(self, word: str, allowed: Sequence[str] = KINDS) -> None:
        self.word = word
        self.allowed = tuple(allowed)
        near = NEAREST.get(word)
        hint = f" Near in meaning: {', '.join(near)}." if near else ""
        super().__init__(
            f"The toy world does not know the word {word!r}.{hint} It draws: {', '.join(allowed)}."
        )


class UnreadablePrompt(InputError):
    """A prompt's words are known but not what they say together."""

    def __init__(self, prompt: str, reason: str) -> None:
        super().__init__(
            f"Cannot read the prompt {prompt!r}: {reason}. "
            "Prompts look like 'a photo of a red owl on the beach', 'three cats', 'a cup left of a tree', "
            "'a happy owl wearing a hat in the snow' or 'a mix of an owl and a snail'."
        )


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """What a prompt asks for: a GenEval entry, and what GenEval has no word for (None: not mentioned).

    `parents` are the kinds of a hybrid; `exchanged` names the slot that the second one gives, if the prompt says so.
    """

    metadata: dict[str, Any]
    background: str | None = None
    accessories: tuple[str, ...] = ()
    pattern: str | None = None
    mood: str | None = None
    size: str | None = None
    parents: tuple[str, ...] = ()
    exchanged: str | None = None


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """What a person would type; without rng always the first form, "a photo of ..."."""
    first = scene.objects[0]
    prefix = _choose(rng, PREFIXES)
    if len(scene.objects) == 1 and scene.task in (Task.SINGLE_OBJECT, Task.COLORS, Task.SUBJECT):
        body = _single(scene, first, rng)
        if _chance(rng, BARE_SHARE):
            prefix, body = BARE_PREFIX, re.sub("^an? ", "", body)
    elif scene.task is Task.HYBRID:
        body = _hybrid(first, rng)
    elif scene.task is Task.OVERLAY:
        form = _choose(rng, OVERLAY_FORMS)
        above = _noun(scene, scene.pasted[0], rng)
        below = _with_article(_noun(scene, first, rng))
        body = form.format(below, above if "a small {}" in form else _with_article(above))
    elif scene.task is Task.COUNTING:
        count, name = len(scene.objects), _name(first.kind, rng)
        if count == 1:
            body = _choose(rng, ONE_FORMS).format(name)
        else:
            body = _choose(rng, COUNT_FORMS).format(_NUMBER_WORDS[count], PLURALS[name])
    else:
        nouns = [_with_article(_noun(scene, thing, rng)) for thing in scene.objects]
        form = _choose(rng, PAIR_FORMS if scene.relation is None else RELATION_FORMS[scene.relation])
        if scene.relation is None and rng is not None and not _chance(rng, 0.5):
            nouns.reverse()
        body = form.format(*nouns)
    if first.accessory is not None and len(scene.objects) == 1:
        body = f"{body} {_choose(rng, ACCESSORY_PHRASES[first.accessory])}"
    if not scene.mentions_background:
        return f"{prefix} {body}".strip()
    place = _choose(rng, BACKGROUND_PHRASES[scene.background])
    if _chance(rng, BACKGROUND_FIRST_SHARE):
        prefix = "there is" if prefix == "there is" else ""
        return f"{place}, {prefix} {body}".replace("  ", " ")
    return f"{prefix} {body} {place}".strip()


def _hybrid(thing: SceneObject, rng: np.random.Generator | None) -> str:
    """Of an object with one foreign slot half of the captions say which; else they say what is mixed."""
    counts = [thing.slots.count(kind) for kind in thing.parents]
    if sorted(counts) == [1, 3] and _chance(rng, 0.5):
        (odd,) = (slot for slot, kind in enumerate(thing.slots) if kind != thing.kind)
        main, other = (_with_article(_name(kind, rng)) for kind in (thing.kind, thing.slots[odd]))
        return _choose(rng, EXCHANGE_FORMS).format(main, PART_WORDS[thing.slots[odd]][odd], other)
    names = [_name(kind, rng) for kind in thing.parents]
    if rng is not None:
        names = [names[k] for k in rng.permutation(len(names))]
    form = _choose(rng, HYBRID_FORMS)
    if form.startswith("half"):
        if len(names) == 2:
            return form.format(*names)
        form = HYBRID_FORMS[0]
    nouns = [_with_article(name) for name in names]
    return form.format(" and ".join(nouns[:-1]), nouns[-1])


def _single(scene: Scene, thing: SceneObject, rng: np.random.Generator | None) -> str:
    said = _said(scene, thing)
    if said and _chance(rng, CLAUSE_SHARE):
        moved = _choose(rng, tuple(said))
        clause = CLAUSES[moved].format(_adjective(moved, said.pop(moved), rng))
        return f"{_with_article(_phrase(said, thing.kind, rng))} {clause}"
    return _with_article(_phrase(said, thing.kind, rng))


def _said(scene: Scene, thing: SceneObject) -> dict[str, str]:
    """What a caption says of an object besides its kind, in the order of the words."""
    said = {
        "size": thing.size_word,
        "mood": thing.mood,
        "colour": thing.colour if scene.task in _COLOURED else None,
        "pattern": None if scene.task is Task.SUBJECT or thing.pattern == "plain" else thing.pattern,
    }
    return {name: value for name, value in said.items() if value is not None}


def _noun(scene: Scene, thing: SceneObject, rng: np.random.Generator | None) -> str:
    return _phrase(_said(scene, thing), thing.kind, rng)


def _phrase(said: Mapping[str, str], kind: str, rng: np.random.Generator | None) -> str:
    return " ".join([*(_adjective(name, value, rng) for name, value in said.items()), _name(kind, rng)])


def _adjective(name: str, value: str, rng: np.random.Generator | None) -> str:
    words = {"size": SIZE_WORDS, "mood": MOOD_WORDS, "pattern": PATTERN_WORDS}.get(name, {}).get(
        value, (value,)
    )
    return _choose(rng, words)


def _name(kind: str, rng: np.random.Generator | None) -> str:
    names = NAMES[kind]
    return names[1] if len(names) > 1 and _chance(rng, SECOND_NAME_SHARE) else names[0]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _choose(rng: np.random.Generator | None, options: Sequence[str]) -> str:
    return options[0] if rng is None else options[int(rng.integers(len(options)))]


def _chance(rng: np.random.Generator | None, share: float) -> bool:
    return rng is not None and bool(rng.random() < share)


def parse(prompt: str) -> ParsedPrompt:
    """What the prompt asks for, with `metadata` shaped as a line of GenEval's metadata file.

    Raises:
        UnknownWord: a word that no caption contains.
        UnreadablePrompt: known words that say nothing together.
    """
    words = prompt.lower().replace(",", " ").rstrip(" .!").split()
    for word in words:
        if word not in WORDS:
            raise UnknownWord(word)
    if not words:
        raise UnreadablePrompt(prompt, "it is empty")
    text, background = _cut_background(" ".join(words))
    for prefix in PREFIXES:
        if prefix and text.startswith(f"{prefix} "):
            text = text.removeprefix(prefix).strip()
            break
    return _Reader(prompt, text, background).read()


def _cut_background(text: str) -> tuple[str, str | None]:
    for name, phrases in BACKGROUND_PHRASES.items():
        for phrase in phrases:
            if text.endswith(f" {phrase}"):
                return text.removesuffix(phrase).strip(), name
            if text.startswith(f"{phrase} "):
                return text.removeprefix(phrase).strip(), name
    return text, None


def _patterns(forms: Iterable[str]) -> list[re.Pattern[str]]:
    """The forms as patterns, those with most words of their own first."""
    ordered = sorted(forms, key=lambda form: -len(form.replace("{}", "")))
    return [re.compile(re.escape(form).replace(r"\{\}", "(.+)")) for form in ordered]


_OVERLAYS = _patterns(OVERLAY_FORMS)
_HYBRIDS = _patterns(HYBRID_FORMS)
_PART = f"({'|'.join(sorted({word for _, word in _PARTS}, key=len, reverse=True))})"
_EXCHANGES = [
    re.compile(form.replace("{}", "(.+?)", 1).replace("{}", _PART, 1).replace("{}", "(.+)"))
    for form in EXCHANGE_FORMS
]
_RELATIONS = [
    (pattern, relation) for relation, forms in RELATION_FORMS.items() for pattern in _patterns(forms)
]
_RELATIONS.sort(key=lambda entry: -len(entry[0].pattern))
_PAIRS = _patterns(PAIR_FORMS)
_ONES = _patterns(ONE_FORMS)
_COUNTS = [
    re.compile(form.replace("{}", f"({'|'.join(NUMBERS)})", 1).replace("{}", "(.+)"))
    for form in sorted(COUNT_FORMS, key=len, reverse=True)
]


@dataclass(slots=True)
class _Noun:
    kind: str
    count: int = 1
    said: dict[str, str] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        colour = {"color": self.said["colour"]} if "colour" in self.said else {}
        return {"class": self.kind, "count": self.count, **colour}


@dataclass(slots=True)
class _Reader:
    prompt: str
    text: str
    background: str | None

    def read(self) -> ParsedPrompt:
        match = _first(_OVERLAYS, self.text)
        if match:
            return self._result(Task.OVERLAY, [self._noun(part).entry() for part in match.groups()])
        match = _first(_EXCHANGES, self.text)
        if match:
            main, part, other = match.groups()
            kinds = (self._noun(main).kind, self._noun(other).kind)
            slot = _PARTS.get((kinds[1], part))
            if slot is None:
                raise UnreadablePrompt(
                    self.prompt,
                    f"a {kinds[1]} has no {part}; its parts are {', '.join(PART_WORDS[kinds[1]])}",
                )
            return self._mixed(kinds, SLOTS[slot])
        mixed = self._hybrid()
        if mixed is not None:
            return mixed
        for pattern, relation in _RELATIONS:
            match = pattern.fullmatch(self.text)
            if match:
                first, second = (self._noun(part).entry() for part in match.groups())
                return self._result(Task.POSITION, [second, first | {"position": [relation, 0]}])
        for name, phrases in ACCESSORY_PHRASES.items():
            for phrase in phrases:
                if self.text.endswith(f" {phrase}"):
                    self.text = self.text.removesuffix(phrase).strip()
                    return self._alone(name)
        match = _first(_PAIRS, self.text)
        if match:
            nouns = [self._noun(part) for part in match.groups()]
            coloured = any("colour" in noun.said for noun in nouns)
            tag = Task.COLOR_ATTR if coloured else Task.TWO_OBJECT
            return self._result(tag, [noun.entry() for noun in nouns])
        return self._counted() or self._alone(None)

    def _result(self, tag: Task, include: list[dict[str, Any]], **rest: Any) -> ParsedPrompt:
        metadata = {"tag": tag.value, "include": include, **rest.pop("more", {}), "prompt": self.prompt}
        return ParsedPrompt(metadata, self.background, **rest)

    def _hybrid(self) -> ParsedPrompt | None:
        match = _first(_HYBRIDS, self.text)
        if not match:
            return None
        parts = [part for group in match.groups() for part in group.split(" and ")]
        return self._mixed(tuple(self._noun(part).kind for part in parts), None)

    def _mixed(self, kinds: tuple[str, ...], slot: str | None) -> ParsedPrompt:
        if len(set(kinds)) < len(kinds):
            raise UnreadablePrompt(self.prompt, f"it mixes {kinds[0]} with itself; name different kinds")
        return self._result(
            Task.HYBRID, [_Noun(kind).entry() for kind in kinds], parents=kinds, exchanged=slot
        )

    def _counted(self) -> ParsedPrompt | None:
        match, one = _first(_COUNTS, self.text), _first(_ONES, self.text)
        if one and not (match and match.group(2) in _SINGULAR):
            noun = self._noun(one.group(1))
        elif match:
            noun = self._noun(match.group(2), plural=True)
            noun.count = NUMBERS[match.group(1)]
        else:
            return None
        excluded = {"class": noun.kind, "count": noun.count + 1}
        return self._result(
            Task.COUNTING, [noun.entry()], more={"exclude": [excluded]}, pattern=noun.said.get("pattern")
        )

    def _alone(self, accessory: str | None) -> ParsedPrompt:
        noun = self._noun(self.text)
        tag = Task.COLORS if "colour" in noun.said else Task.SINGLE_OBJECT
        worn = (accessory,) if accessory else ()
        said = {name: noun.said.get(name) for name in ("pattern", "mood", "size")}
        if said["mood"] and noun.kind not in ANIMALS:
            raise UnreadablePrompt(
                self.prompt, f"a {noun.kind} has no face to look {said['mood']}; animals have"
            )
        return self._result(tag, [noun.entry()], accessories=worn, **said)

    def _noun(self, text: str, *, plural: bool = False) -> _Noun:
        """An article, adjectives in any order, a name, and perhaps an adjective behind "that is" or "that looks"."""
        rest, _, clause = text.partition(" that ")
        said: dict[str, str] = {}
        if clause:
            clause = clause.removeprefix("is ").removeprefix("looks ")
            if clause not in _ADJECTIVES:
                raise UnreadablePrompt(self.prompt, f"{clause!r} is nothing that an object can be")
            name, value = _ADJECTIVES[clause]
            said[name] = value
        rest = re.sub("^(an?|one) ", "", rest)
        names = _SINGULAR | _KIND_OF if plural else _KIND_OF
        while rest not in names:
            adjective = next((word for word in _ADJECTIVES if rest.startswith(f"{word} ")), None)
            if adjective is None:
                near = NEAREST.get(rest, ())
                hint = f" (near in meaning: {', '.join(near)})" if near else ""
                reason = f"{rest!r} names no kind{hint}" if rest else "it names no object"
                raise UnreadablePrompt(self.prompt, reason)
            name, value = _ADJECTIVES[adjective]
            if name in said:
                raise UnreadablePrompt(self.prompt, f"it gives one object two of {name}")
            said[name] = value
            rest = rest.removeprefix(adjective).strip()
        return _Noun(names[rest], 1, said)


def _first(patterns: Iterable[re.Pattern[str]], text: str) -> re.Match[str] | None:
    return next((match for pattern in patterns if (match := pattern.fullmatch(text))), None)


def canonical(scene: Scene) -> str:
    """What the scene's caption fixes, as one string: equal for two scenes that the same prompt describes."""
    if scene.task is Task.HYBRID:
        content = " x ".join(sorted(scene.objects[0].parents))
    elif scene.task is Task.OVERLAY:
        content = f"{scene.pasted[0].kind} on {scene.objects[0].kind}"
    else:
        names = [" ".join([*_said(scene, thing).values(), thing.kind]) for thing in scene.objects]
        if scene.task is Task.COUNTING:
            names = [f"{len(names)} {names[0]}"]
        elif scene.relation is None:
            names.sort()
        content = f" {scene.relation} ".join(names) if scene.relation else " and ".join(names)
    accessory = scene.objects[0].accessory or "-"
    task = Task.SINGLE_OBJECT if scene.task is Task.SUBJECT else scene.task
    return f"{task}: {content} | {accessory} | {scene.background if scene.mentions_background else '-'}"


def is_held_out(key: str) -> bool:
    """Whether a canonical key belongs to the tenth kept from training; a bare kind never does, and hybrids are held
    out by pairs (`pairs.is_held_out_pair`)."""
    if key in _BARE_KEYS or key.startswith(f"{Task.HYBRID}:"):
        return False
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 10 == 0


_BARE_KEYS = frozenset(f"{Task.SINGLE_OBJECT}: {kind} | - | -" for kind in KINDS)


def held_out_prompts(task: Task, n: int, seed: int) -> list[str]:
    """n different captions of a task that training never saw.

    Raises:
        ValueError: the task has fewer.
    """
    rng = np.random.default_rng(seed)
    prompts: dict[str, str] = {}
    for _ in range(1000 * n):
        if len(prompts) == n:
            return list(prompts.values())
        scene = random_scene(rng, task)
        key = canonical(scene)
        if is_held_out(key):
            prompts.setdefault(key, caption(scene))
    raise ValueError(
        f"Only {len(prompts)} held-out prompts of the task {task.value!r} were found; asked for {n}."
    )
