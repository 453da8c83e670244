"""The second edition's captions: read back in every phrasing, and refused with words that help."""

import re

import numpy as np
import pytest
from transformers import CLIPTokenizer

from pixrl.toy.language import (
    WORDS,
    UnknownWord,
    UnreadablePrompt,
    canonical,
    caption,
    held_out_prompts,
    is_held_out,
    parse,
)
from pixrl.toy.phrases import NEAREST, PREFIXES
from pixrl.toy.random_scenes import random_scene
from pixrl.toy.scene import GENEVAL, Scene, Task
from pixrl.toy.vocabulary import KINDS, SLOTS
from toy_build.tokenizers import LENGTH, T5_LENGTH, clip_tokenizer, corpus, t5_tokenizer


@pytest.mark.parametrize("task", list(Task))
def test_a_caption_is_read_back_in_every_phrasing(task: Task) -> None:
    rng = np.random.default_rng(1)
    for _ in range(250):
        scene = random_scene(rng, task)
        for text in (caption(scene), caption(scene, rng)):
            _same(scene, text)


def _same(scene: Scene, text: str) -> None:
    found, first, task = parse(text), scene.objects[0], scene.task
    assert found.background == (scene.background if scene.mentions_background else None), text
    entries = found.metadata["include"]
    assert found.metadata["tag"] == (Task.SINGLE_OBJECT if task is Task.SUBJECT else task).value, text
    if task in (Task.SINGLE_OBJECT, Task.COLORS, Task.SUBJECT):
        assert (found.mood, found.size) == (first.mood, first.size_word), text
        assert found.accessories == ((first.accessory,) if first.accessory else ()), text
        assert found.pattern == (
            first.pattern if first.pattern != "plain" and task is not Task.SUBJECT else None
        ), text
        assert entries[0]["class"] == first.kind, text
        assert entries[0].get("color") == (first.colour if task is Task.COLORS else None), text
    elif task is Task.COUNTING:
        assert entries == [{"class": first.kind, "count": len(scene.objects)}], text
        assert found.metadata["exclude"] == [{"class": first.kind, "count": len(scene.objects) + 1}], text
    elif task is Task.POSITION:
        assert entries[1]["position"] == [scene.relation, 0], text
        assert [entries[1]["class"], entries[0]["class"]] == [thing.kind for thing in scene.objects], text
    elif task is Task.HYBRID:
        assert set(found.parents) == set(first.parents), text
        if found.exchanged is not None:
            assert first.slots[SLOTS.index(found.exchanged)] == found.parents[1], text
    elif task is Task.OVERLAY:
        assert [entry["class"] for entry in entries] == [first.kind, scene.pasted[0].kind], text
    else:
        wanted = {(thing.kind, thing.colour if task is Task.COLOR_ATTR else None) for thing in scene.objects}
        assert {(entry["class"], entry.get("color")) for entry in entries} == wanted, text


def test_a_scene_has_many_phrasings() -> None:
    rng = np.random.default_rng(2)
    for task in Task:
        scene = random_scene(rng, task)
        assert len({caption(scene, rng) for _ in range(80)}) >= 5, task
    assert len(PREFIXES) >= 5


def test_equal_captions_have_equal_content() -> None:
    rng = np.random.default_rng(3)
    keys: dict[str, str] = {}
    for number in range(2000):
        task = (*GENEVAL, Task.OVERLAY)[number % 7]
        scene = random_scene(rng, task)
        assert keys.setdefault(caption(scene), canonical(scene)) == canonical(scene)


def test_a_tenth_is_held_out_bare_kinds_and_hybrids_never() -> None:
    rng = np.random.default_rng(4)
    keys = {canonical(random_scene(rng, GENEVAL[number % 6])) for number in range(4000)}
    assert 0.08 < np.mean([is_held_out(key) for key in keys]) < 0.12
    assert not any(is_held_out(f"single_object: {kind} | - | -") for kind in KINDS)
    assert not any(is_held_out(canonical(random_scene(rng, Task.HYBRID))) for _ in range(100))
    prompts = held_out_prompts(Task.POSITION, 40, 5)
    assert len(set(prompts)) == 40
    with pytest.raises(ValueError, match="held-out prompts of the task 'hybrid'"):
        held_out_prompts(Task.HYBRID, 1, 5)


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("a photo of a dragon", UnknownWord, "'dragon'.*Near in meaning: lion, peacock"),
        ("a photo of a quasar", UnknownWord, "'quasar'. It draws: owl, snail"),
        ("a mix of an owl and a bird of the night", UnreadablePrompt, "mixes owl with itself"),
        (
            "an owl with the wings of a snail",
            UnreadablePrompt,
            "a snail has no wings; its parts are eyestalks",
        ),
        ("a happy cup", UnreadablePrompt, "no face to look happy"),
        ("a red blue owl", UnreadablePrompt, "two of colour"),
        ("red and blue", UnreadablePrompt, "names no kind"),
        ("a photo of", UnreadablePrompt, "names no kind|no object"),
        ("", UnreadablePrompt, "it is empty"),
        ("an owl that is on", UnreadablePrompt, "nothing that an object can be"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(
    prompt: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as raised:
        parse(prompt)
    assert "drawing'?" not in str(raised.value)


def test_near_words_are_known_ones() -> None:
    known = {*WORDS, "plain", "a natural colour: leave it out"}
    for word, near in NEAREST.items():
        with pytest.raises((UnknownWord, UnreadablePrompt), match=f"ear in meaning: {re.escape(near[0])}"):
            parse(f"a photo of a {word}")
        assert set(near) <= known, word


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return clip_tokenizer()


def test_prompts_have_a_few_to_thirty_pieces_and_words_several(tokenizer: CLIPTokenizer) -> None:
    texts = [text for text, _ in zip(corpus(), range(1500), strict=False)]
    lengths = np.array([len(ids) - 2 for ids in tokenizer(texts).input_ids])
    assert lengths.max() <= LENGTH - 2
    assert np.quantile(lengths, 0.99) <= 32
    split = [kind for kind in KINDS if len(tokenizer.tokenize(kind)) > 1]
    assert len(split) >= 16
    assert max(len(ids) for ids in t5_tokenizer()(texts).input_ids) <= T5_LENGTH


def test_different_prompts_have_different_tokens(tokenizer: CLIPTokenizer) -> None:
    texts = {re.sub("[ ,]+", " ", text) for text, _ in zip(corpus(), range(3000), strict=False)}
    assert len({tuple(ids) for ids in tokenizer(sorted(texts)).input_ids}) == len(texts)
