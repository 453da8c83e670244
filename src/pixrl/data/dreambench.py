"""DreamBench's `prompts_and_classes.txt`: thirty subjects with their classes, and two lists of prompts.

Ruiz et al. 2023 (DreamBooth). Prompts are templates `a {0} {1} in the jungle` of a rare token and the class word; with
reference pictures the rare token says nothing and is left out, as in UNO's list.
"""

import re
from pathlib import Path

from pixrl.errors import InputError
from pixrl.text import comparable, read_text
from pixrl.text import lines as lines_of

CLASSES_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")
"""Classes that are asked the live prompts; the others are objects."""
_HEADER = "subject_name,class"
_OBJECT, _LIVE = "Object Prompts", "Live Subject Prompts"
_CLASS, _TOKEN = "{1}", "{0} "
"""In a template: where the class word goes, and the rare token before it."""
_TEMPLATE = re.compile(r"""^\s*(['"])(?P<text>.*)\1\.format\(""")


def read_classes(path: Path) -> tuple[list[tuple[str, str, tuple[str, ...]]], list[str]]:
    """Each subject's name, class word and prompts, in the file's order; and a note of each line that repeats another.

    Raises:
        InputError: the file is not as google/dreambooth has it; says which part is missing, or which line is wrong.
    """
    lines = [line.strip() for line in lines_of(read_text(path))]
    notes: list[str] = []
    subjects = _subjects(path, lines, notes)
    templates = {title: _templates(path, lines, title, notes) for title in (_OBJECT, _LIVE)}
    listed = [
        (name, word, tuple(text.replace(_CLASS, word) for text in templates[_kind(word)]))
        for name, word in subjects.items()
    ]
    return listed, notes


def _kind(word: str) -> str:
    return _LIVE if word in LIVE_CLASSES else _OBJECT


def _subjects(path: Path, lines: list[str], notes: list[str]) -> dict[str, str]:
    """Name -> class word."""
    if _HEADER not in lines:
        raise InputError(f"{path} has no line {_HEADER!r} before its subjects. {_REMEDY}")
    start = lines.index(_HEADER) + 1
    end = next((k for k in range(start, len(lines)) if not lines[k]), len(lines))
    if start == end:
        raise InputError(f"{path} lists no subject under {_HEADER!r}. {_REMEDY}")
    found: dict[str, str] = {}
    for number in range(start, end):
        name, word = (part.strip() for part in lines[number].partition(",")[::2])
        if not name or not word:
            raise InputError(f"{path}, line {number + 1}: {lines[number]!r} is not 'name,class'. {_REMEDY}")
        if name in found and found[name] != word:
            raise InputError(
                f"{path}, line {number + 1} calls {name!r} {word!r}, and a line before {found[name]!r}. Delete one."
            )
        if name in found:
            notes.append(f"{path}: line {number + 1} repeats the subject {name!r}")
        found[name] = word
    return found


def _templates(path: Path, lines: list[str], title: str, notes: list[str]) -> list[str]:
    """The prompts under a title, with {1} where the class word goes."""
    if title not in lines:
        raise InputError(f"{path} has no section {title!r}. {_REMEDY}")
    found: dict[str, str] = {}
    for number, line in enumerate(lines[lines.index(title) + 1 :], lines.index(title) + 2):
        if line == "]":
            break
        match = _TEMPLATE.match(line)
        if match:
            text = _template(match["text"], f"{path}, line {number}")
            if comparable(text) in found:
                notes.append(f"{path}: line {number} repeats the prompt {match['text']!r}")
            found.setdefault(comparable(text), text)
    if not found:
        raise InputError(f"{path} has no prompts under {title!r}. {_REMEDY}")
    return list(found.values())


def _template(text: str, place: str) -> str:
    """A template without the rare token. InputError where anything else stands in braces."""
    found = text.replace(_TOKEN, "")
    if set("{}") & set(found.replace(_CLASS, "")):
        raise InputError(
            f"{place}: {text!r} has braces other than {{0}}, with a space after it, for the rare token and {{1}} for "
            "the class. Write it like 'a {0} {1} in the snow'."
        )
    return found


_REMEDY = "Take the file from a checkout of google/dreambooth."
