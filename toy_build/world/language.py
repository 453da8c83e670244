"""What a person would type for a scene, and what such a prompt asks for.

`caption` and `parse` are inverse to each other on everything a caption fixes, in every phrasing. `canonical` is that
content as one string; a tenth of all such strings is held out from training.
"""

import hashlib

from toy_build.world.scene import Scene, SceneObject, Task
from toy_build.world.vocabulary import KINDS

_COLOURED = (Task.COLORS, Task.COLOR_ATTR)


def canonical(scene: Scene) -> str:
    """What the scene's caption fixes, as one string: equal for two scenes that the same prompt describes."""
    if scene.task is Task.HYBRID:
        content = " x ".join(sorted(scene.objects[0].parents))
    elif scene.task is Task.OVERLAY:
        content = f"{scene.pasted[0].kind} on {scene.objects[0].kind}"
    else:
        names = [_named(scene, thing) for thing in scene.objects]
        if scene.task is Task.COUNTING:
            names = [f"{len(names)} {names[0]}"]
        elif scene.relation is None:
            names.sort()
        content = f" {scene.relation} ".join(names) if scene.relation else " and ".join(names)
    accessory = scene.objects[0].accessory or "-"
    task = Task.SINGLE_OBJECT if scene.task is Task.SUBJECT else scene.task
    return f"{task}: {content} | {accessory} | {scene.background if scene.mentions_background else '-'}"


def _named(scene: Scene, thing: SceneObject) -> str:
    """The adjectives that a caption gives the object, and its kind."""
    colour = thing.colour if scene.task in _COLOURED else None
    pattern = thing.pattern if scene.task is not Task.SUBJECT and thing.pattern != "plain" else None
    words = (thing.size_word, thing.mood, colour, pattern, thing.kind)
    return " ".join(word for word in words if word is not None)


def is_held_out(key: str) -> bool:
    """Whether a canonical key belongs to the tenth kept from training; a bare kind never does, and hybrids are held
    out by pairs (`pairs.is_held_out_pair`)."""
    if key in _BARE_KEYS or key.startswith(f"{Task.HYBRID}:"):
        return False
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 10 == 0


_BARE_KEYS = frozenset(f"{Task.SINGLE_OBJECT}: {kind} | - | -" for kind in KINDS)
