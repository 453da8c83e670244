"""DreamBench's `prompts_and_classes.txt`: thirty subjects with their classes, and two lists of prompts.

Ruiz et al. 2023 (DreamBooth). Prompts are templates `a {0} {1} in the jungle` of a rare token and the class word; with
reference pictures the rare token says nothing and is left out, as in UNO's list.
"""

import re
from pathlib import Path

from pixrl.data.prompts import read_text
from pixrl.errors import InputError

CLASSES_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")
"""Classes that are asked the live prompts; the others are objects."""
_HEADER = "subject_name,class"
_OBJECT, _LIVE = "Object Prompts", "Live Subject Prompts"
_CLASS, _TOKEN = "{1}", "{0} "
"""In a template: where the class word goes, and the rare token before it."""
_TEMPLATE = re.compile(r"""^\s*(['"])(?P<text>.*)\1\.format\(""")


def read_classes(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Each subject's name, class word and prompts, in the file's order.

    Raises:
        InputError: the file is not as google/dreambooth has it; says which part is missing, or which line is wrong or
            repeats another one.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    subjects = _subjects(path, lines)
    templates = {title: _templates(path, lines, title) for title in (_OBJECT, _LIVE)}
    return [
        (name, word, tuple(text.replace(_CLASS, word) for text in templates[_kind(word)]))
        for name, word in subjects.items()
    ]


def _kind(word: str) -> str:
    return _LIVE if word in LIVE_CLASSES else _OBJECT


def _subjects(path: Path, lines: list[str]) -> dict[str, str]:
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
        if name in found:
            raise InputError(f"{path}, line {number + 1} repeats the subject {name!r}. Delete it.")
        found[name] = word
    return found


def _templates(path: Path, lines: list[str], title: str) -> list[str]:
    """The prompts under a title, with {1} where the class word goes."""
    if title not in lines:
        raise InputError(f"{path} has no section {title!r}. {_REMEDY}")
    found: list[str] = []
    for number, line in enumerate(lines[lines.index(title) + 1 :], lines.index(title) + 2):
        if line == "]":
            break
        match = _TEMPLATE.match(line)
        if match:
            text = _template(match["text"], f"{path}, line {number}")
            if text in found:
                raise InputError(f"{path}, line {number} repeats the prompt {match['text']!r}. Delete it.")
            found.append(text)
    if not found:
        raise InputError(f"{path} has no prompts under {title!r}. {_REMEDY}")
    return found


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
