"""What a score's provenance says of everything that the score depends on.

It is a flat table of texts. The main model is `model` (id with checksum), `revision` and `licence`; every further part
has its own name in front: `segmenter`, `segmenter_revision`, `segmenter_licence`, and what else it says of itself.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pixrl.rewards.sources import NOT_STATED, WORDS, licence
from pixrl.rewards.weights import origin

OWN_LICENCE = "its own"


def part(name: str, provenance: Mapping[str, str]) -> dict[str, str]:
    """A part's provenance under its name in the whole's: `model` becomes NAME, any other key NAME_key."""
    return {name if key == "model" else f"{name}_{key}": value for key, value in provenance.items()}


def describe_words(
    ref: str | Path, folder: Path, patterns: Sequence[str] = WORDS, known: str = NOT_STATED
) -> dict[str, str]:
    """Provenance of a checkpoint of which config, tokenizer and preprocessing are taken: with those files' checksum.

    Args:
        ref: what the user calls it.
        folder: where its files lie.
        patterns: their names.
        known: the licence of the published checkpoint, where neither the folder nor our table states one.
    """
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    stated = licence(ref, folder)
    return origin(ref, folder, files, known if stated == NOT_STATED else stated)


def describe_function(function: Callable[..., object], label: str | None = None) -> dict[str, str]:
    """Provenance of a function of the user's: its import path with the checksum of the file that it is written in.

    A file that this one imports is not in the checksum.
    """
    inner = unwrapped(function)
    named = inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)
    path = f"{named.__module__}:{named.__qualname__}"
    return {
        "model": f"{path if label is None else label} ({_source_hash(named)})",
        "revision": "local",
        "licence": OWN_LICENCE,
    }


def source_of(function: Callable[..., object]) -> str:
    """The text of a function, where it has one: of one that no import leads to again, all that tells what it did."""
    inner = unwrapped(function)
    try:
        return inspect.getsource(inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner))
    except (OSError, TypeError):
        return f"no source: {function!r}"


def unwrapped(function: Callable[..., object]) -> Callable[..., object]:
    """What is behind decorators and `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    inner: Callable[..., object] = inspect.unwrap(function)
    return inner


def _source_hash(function: Callable[..., object]) -> str:
    """16 hex digits from the file that the function is written in."""
    module = inspect.getmodule(function)
    file = None if module is None else vars(module).get("__file__")
    if file is None or not Path(file).is_file():
        return "no source file"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
