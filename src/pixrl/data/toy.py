"""The toy world's prompts and subjects, by name.

This layer may not import the toy world, which is built on it: its parts are looked up in a table when they are needed.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from itertools import islice
from typing import Any

from pixrl.errors import InputError, did_you_mean

PARTS = {
    "ACCESSORIES": "pixrl.toy.vocabulary:ACCESSORIES",
    "ACCESSORY_PHRASES": "pixrl.toy.vocabulary:ACCESSORY_PHRASES",
    "BACKGROUNDS": "pixrl.toy.vocabulary:BACKGROUNDS",
    "BACKGROUND_PHRASES": "pixrl.toy.vocabulary:BACKGROUND_PHRASES",
    "Task": "pixrl.toy.scene:Task",
    "render": "pixrl.toy.scene:render",
    "held_out_subjects": "pixrl.toy.random_scenes:held_out_subjects",
    "random_scene": "pixrl.toy.random_scenes:random_scene",
    "random_subject": "pixrl.toy.random_scenes:random_subject",
    "resembles_held_out": "pixrl.toy.random_scenes:resembles_held_out",
    "subject_scene": "pixrl.toy.random_scenes:subject_scene",
    "canonical": "pixrl.toy.language:canonical",
    "caption": "pixrl.toy.language:caption",
    "is_held_out": "pixrl.toy.language:is_held_out",
    "parse": "pixrl.toy.language:parse",
}
"""The module and attribute of each part."""
GENEVAL = "geneval"
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six tasks of GenEval, in its order."""
TRAINING_PROMPTS, EVALUATION_PROMPTS = 64, 32
"""The number of prompts of one task in each split."""
SUBJECTS = "subjects"
TRAINING_SUBJECTS = 64
VIEWS = 4
"""The number of reference pictures of a subject."""
SEED = 71
_EXAMPLE = "Type toy:geneval, or some of its tasks: toy:geneval/counting,colors"


def part(name: str) -> Any:
    """Return a part of the toy world by its name in `PARTS`."""
    module, _, attribute = PARTS[name].partition(":")
    return vars(import_module(module))[attribute]


def toy_prompts(name: str, *, held_out: bool) -> list[tuple[str, dict[str, object]]]:
    """Return prompts with their GenEval entries, the same at every call.

    Args:
        name: `geneval`, or `geneval/` and some of its tasks, `geneval/counting,colors`.
        held_out: the evaluation split: prompts that neither the toy generator nor the training split has seen.

    Raises:
        InputError: there is no such list or task.
    """
    listed, slash, rest = name.partition("/")
    if listed != GENEVAL:
        raise InputError(
            f"The toy world has no prompts {listed!r}.{did_you_mean(listed, [GENEVAL])} {_EXAMPLE}"
        )
    tags = [tag.strip() for tag in rest.split(",")] if slash else TAGS
    for position, tag in enumerate(tags):
        if tag not in TAGS:
            raise InputError(
                f"Toy GenEval has no task {tag!r}.{did_you_mean(tag, TAGS)} It has {', '.join(TAGS)}. {_EXAMPLE}"
            )
        if tag in tags[:position]:
            raise InputError(f"The task {tag!r} is given twice in toy:{GENEVAL}/{rest}. Give it once.")
    parse = part("parse")
    return [(text, parse(text).metadata) for tag in tags for text in _texts_of(tag, held_out)]


@cache
def _texts_of(tag: str, held_out: bool) -> tuple[str, ...]:
    """Return as many different prompts of one task as its split has."""
    import numpy as np

    random_scene, canonical, caption = part("random_scene"), part("canonical"), part("caption")
    is_held_out, task = part("is_held_out"), part("Task")(tag)
    rng = np.random.default_rng((SEED, int(held_out), TAGS.index(tag)))
    wanted = EVALUATION_PROMPTS if held_out else TRAINING_PROMPTS
    found: dict[str, str] = {}
    while len(found) < wanted:
        scene = random_scene(rng, task)
        key = canonical(scene)
        if is_held_out(key) == held_out:
            found.setdefault(key, caption(scene))
    return tuple(found.values())


ToySubject = tuple[str, str, tuple[str, ...], tuple[Any, ...], tuple[Callable[[], Any], ...]]
"""A subject: name, class word, prompts, reference pictures (PIL), and functions that draw each prompt's target."""


@cache
def toy_subjects(name: str, *, held_out: bool) -> tuple[ToySubject, ...]:
    """Return the thirty-two held-out subjects, or sixty-four others that resemble none of them; the same at every call.

    Each has four pictures of its own in different places, and all prompts that name a background, an accessory that it
    does not already have, or both.

    Raises:
        InputError: the name is not `subjects`.
    """
    import numpy as np

    if name != SUBJECTS:
        raise InputError(
            f"The toy world has no subjects {name!r}.{did_you_mean(name, [SUBJECTS])} Type toy:{SUBJECTS}"
        )
    if held_out:
        chosen = part("held_out_subjects")()
    else:
        rng = np.random.default_rng((SEED, 2))
        drawn = iter(lambda: part("random_subject")(rng), None)
        chosen = islice((one for one in drawn if not part("resembles_held_out")(one)), TRAINING_SUBJECTS)
    found: list[ToySubject] = []
    for number, subject in enumerate(chosen):
        rng = np.random.default_rng((SEED, 3, int(held_out), number))
        scenes = [part("subject_scene")(subject, rng, added_accessory=0.0) for _ in range(VIEWS)]
        pictures = tuple(part("render")(scene) for scene in scenes)
        article = "an" if subject.kind[0] in "aeiou" else "a"
        backgrounds = [key for key in part("BACKGROUNDS") if key != "plain"]
        worn = [key for key in part("ACCESSORIES") if key != subject.accessory]
        asked: list[tuple[str | None, str | None]] = [
            *((None, background) for background in backgrounds),
            *((accessory, None) for accessory in worn),
            *((accessory, background) for accessory in worn for background in backgrounds),
        ]
        prompts, targets = [], []
        for k, (accessory, background) in enumerate(asked):
            tables = (("ACCESSORY_PHRASES", accessory), ("BACKGROUND_PHRASES", background))
            phrases = [part(table)[key][0] for table, key in tables if key is not None]
            prompts.append(" ".join((f"a photo of {article} {subject.kind}", *phrases)))
            own = (SEED, 4, int(held_out), number, k)
            targets.append(partial(_subject_target, subject, own, accessory, background))
        called = f"{subject.kind}_{number:02d}" if held_out else f"training_{subject.kind}_{number:02d}"
        found.append((called, subject.kind, tuple(prompts), pictures, tuple(targets)))
    return tuple(found)


def _subject_target(subject: Any, key: tuple[int, ...], accessory: str | None, background: str | None) -> Any:
    """Draw the subject as a prompt asks for it, in a place of its own; a background that is not named is plain."""
    import numpy as np

    scene = part("subject_scene")(subject, np.random.default_rng(key), added_accessory=0.0)
    (thing,) = scene.objects
    wanted = replace(
        scene,
        objects=(replace(thing, accessory=accessory),),
        background="plain" if background is None else background,
        mentions_background=background is not None,
    )
    return part("render")(wanted)
