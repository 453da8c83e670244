"""Language: a caption says what its scene fixes, nothing else, and parsing gives it back."""

import numpy as np
import pytest

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
from pixrl.toy.scene import Scene, Task, random_scene
from pixrl.toy.vocabulary import KINDS, PLURALS

TASKS = tuple(Task)


def scenes(task: Task, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, task) for _ in range(count)]


def expected_include(scene: Scene) -> list[dict[str, object]]:
    if scene.task is Task.COUNTING:
        return [{"class": scene.objects[0].kind, "count": len(scene.objects)}]
    coloured = scene.task in (Task.COLORS, Task.COLOR_ATTR)
    entries: list[dict[str, object]] = [
        {"class": thing.kind, "count": 1} | ({"color": thing.colour} if coloured else {})
        for thing in scene.objects
    ]
    if scene.relation is not None:
        return [entries[1], entries[0] | {"position": [scene.relation, 0]}]
    return entries


@pytest.mark.parametrize("task", TASKS)
def test_parse_gives_back_what_the_caption_fixes(task: Task) -> None:
    rng = np.random.default_rng(1)
    for scene in scenes(task, 1000):
        for text in (caption(scene), caption(scene, rng)):
            parsed = parse(text)
            include, wanted = parsed.metadata["include"], expected_include(scene)
            if task in (Task.TWO_OBJECT, Task.COLOR_ATTR):
                include, wanted = (
                    sorted(entries, key=lambda entry: entry["class"]) for entries in (include, wanted)
                )
            first = scene.objects[0]
            assert include == wanted
            assert parsed.metadata["prompt"] == text
            assert parsed.metadata["tag"] == ("single_object" if task is Task.SUBJECT else task.value)
            assert parsed.background == (scene.background if scene.mentions_background else None)
            assert parsed.accessories == ((first.accessory,) if first.accessory else ())
            assert parsed.pattern == (
                None if task is Task.SUBJECT or first.pattern == "plain" else first.pattern
            )


@pytest.mark.parametrize("task", TASKS)
def test_captions_are_short_lower_case_and_in_the_closed_vocabulary(task: Task) -> None:
    rng = np.random.default_rng(2)
    for scene in scenes(task, 500, seed=2):
        text = caption(scene, rng)
        assert text == text.lower() and len(text.split()) <= 20
        assert set(text.split()) <= set(WORDS)


def test_every_word_is_used_by_some_caption() -> None:
    rng = np.random.default_rng(3)
    used = {
        word for task in TASKS for scene in scenes(task, 3000, seed=3) for word in caption(scene, rng).split()
    }
    assert used == set(WORDS)


def test_the_fusion_papers_form_without_article_is_among_the_captions() -> None:
    rng = np.random.default_rng(4)
    texts = {caption(scene, rng) for scene in scenes(Task.SINGLE_OBJECT, 4000)}
    assert {f"a photo of {kind}" for kind in KINDS} <= texts


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a photo of owl", {"tag": "single_object", "include": [{"class": "owl", "count": 1}]}),
        (
            "a photo of three fish",
            {
                "tag": "counting",
                "include": [{"class": "fish", "count": 3}],
                "exclude": [{"class": "fish", "count": 4}],
            },
        ),
        (
            "A photo of a red cup.",
            {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]},
        ),
        (
            "a cup left of a tree",
            {
                "tag": "position",
                "include": [
                    {"class": "tree", "count": 1},
                    {"class": "cup", "count": 1, "position": ["left of", 0]},
                ],
            },
        ),
        (
            "a photo of a red cup and a blue tree",
            {
                "tag": "color_attr",
                "include": [
                    {"class": "cup", "count": 1, "color": "red"},
                    {"class": "tree", "count": 1, "color": "blue"},
                ],
            },
        ),
    ],
)
def test_metadata_has_genevals_shape(prompt: str, metadata: dict[str, object]) -> None:
    assert parse(prompt).metadata == metadata | {"prompt": prompt}


def test_an_unknown_word_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(UnknownWord, match="Did you mean 'owl'") as caught:
        parse("a photo of an owll")
    assert caught.value.word == "owll" and caught.value.allowed == WORDS


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photo of",
        "a photo of a red",
        "owl owl",
        "a cup above",
        "a cup and",
        "an owl and a cat wearing a hat",
    ],
)
def test_unreadable_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(UnreadablePrompt):
        parse(prompt)


@pytest.mark.parametrize("task", TASKS)
def test_equal_captions_have_equal_keys(task: Task) -> None:
    keys: dict[str, str] = {}
    for scene in scenes(task, 3000):
        assert keys.setdefault(caption(scene), canonical(scene)) == canonical(scene)


def test_about_a_tenth_of_the_keys_is_held_out_and_no_bare_kind() -> None:
    keys = {canonical(scene) for task in TASKS for scene in scenes(task, 2000)}
    assert 0.08 < np.mean([is_held_out(key) for key in sorted(keys)]) < 0.12
    assert not any(is_held_out(f"single_object: {kind} | - | -") for kind in KINDS)
    assert any(is_held_out(f"counting: 3 {kind} | - | -") for kind in KINDS)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_prompts_are_distinct_readable_and_fixed_by_the_seed(task: Task) -> None:
    prompts = held_out_prompts(task, 20, seed=0)
    assert len(set(prompts)) == 20 and prompts == held_out_prompts(task, 20, seed=0)
    for prompt in prompts:
        parse(prompt)


def test_plurals_are_distinct() -> None:
    assert len(set(PLURALS.values())) == len(KINDS)
