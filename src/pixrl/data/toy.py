"""The toy world's prompts, by name.

This layer may not import the toy world, which is built on it: its parts are looked up in a table when they are needed.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pixrl.errors import InputError, did_you_mean

PARTS = {
    "Task": "pixrl.toy.scene:Task",
    "random_scene": "pixrl.toy.scene:random_scene",
    "canonical": "pixrl.toy.language:canonical",
    "caption": "pixrl.toy.language:caption",
    "is_held_out": "pixrl.toy.language:is_held_out",
    "parse": "pixrl.toy.language:parse",
}
"""Part -> where it is."""
GENEVAL = "geneval"
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's six tasks, in its order."""
TRAINING_PROMPTS, EVALUATION_PROMPTS = 64, 32
"""Prompts of one task in each split."""
SEED = 71
_EXAMPLE = "Type toy:geneval, or some of its tasks: toy:geneval/counting,colors"


def part(name: str) -> Any:
    """A part of the toy world."""
    module, _, attribute = PARTS[name].partition(":")
    return vars(import_module(module))[attribute]


def toy_prompts(name: str, *, held_out: bool) -> list[tuple[str, dict[str, object]]]:
    """Prompts with their GenEval entries, the same at every call.

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
    tags = _tags(rest) if slash else TAGS
    return [prompt for tag in tags for prompt in _prompts_of(tag, held_out)]


def _tags(given: str) -> Sequence[str]:
    tags = [tag.strip() for tag in given.split(",")]
    for position, tag in enumerate(tags):
        if tag not in TAGS:
            raise InputError(
                f"Toy GenEval has no task {tag!r}.{did_you_mean(tag, TAGS)} It has {', '.join(TAGS)}. {_EXAMPLE}"
            )
        if tag in tags[:position]:
            raise InputError(f"The task {tag!r} is given twice in toy:{GENEVAL}/{given}. Give it once.")
    return tags


def _prompts_of(tag: str, held_out: bool) -> list[tuple[str, dict[str, object]]]:
    """As many different prompts of one task as its split has."""
    import numpy as np

    random_scene, canonical, caption = part("random_scene"), part("canonical"), part("caption")
    is_held_out, parse, task = part("is_held_out"), part("parse"), part("Task")(tag)
    rng = np.random.default_rng((SEED, int(held_out), TAGS.index(tag)))
    wanted = EVALUATION_PROMPTS if held_out else TRAINING_PROMPTS
    found: dict[str, str] = {}
    while len(found) < wanted:
        scene = random_scene(rng, task)
        key = canonical(scene)
        if is_held_out(key) == held_out:
            found.setdefault(key, caption(scene))
    return [(prompt, parse(prompt).metadata) for prompt in found.values()]
