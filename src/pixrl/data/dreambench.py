"""DreamBench's `prompts_and_classes.txt`: thirty subjects with their classes, and two lists of prompts.

Ruiz et al. 2023 (DreamBooth). Prompts are templates `a {0} {1} in the jungle` of a rare token and the class word; with
reference pictures the rare token says nothing and is left out, as in UNO's list.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from pixrl.data.prompts import read_text
from pixrl.errors import InputError

CLASSES_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")
"""Classes that are asked the live prompts; the others are objects."""
_HEADER = "subject_name,class"
_OBJECT, _LIVE = "Object Prompts", "Live Subject Prompts"
_TEMPLATE = re.compile(r"""^\s*(['"])(?P<text>.*)\1\.format\(""")


def read_classes(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Each subject's name, class word and prompts, in the file's order.

    Raises:
        InputError: the file is not as google/dreambooth has it; says which part is missing.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    subjects = list(_subjects(path, lines))
    prompts = {title: list(_templates(path, lines, title)) for title in (_OBJECT, _LIVE)}
    return [
        (name, word, tuple(form.format(word) for form in prompts[_LIVE if word in LIVE_CLASSES else _OBJECT]))
        for name, word in subjects
    ]


def _subjects(path: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    if _HEADER not in lines:
        raise InputError(f"{path} has no line {_HEADER!r} before its subjects. {_REMEDY}")
    start = lines.index(_HEADER) + 1
    end = next((k for k in range(start, len(lines)) if not lines[k]), len(lines))
    if start == end:
        raise InputError(f"{path} lists no subject under {_HEADER!r}. {_REMEDY}")
    for number in range(start, end):
        name, comma, word = lines[number].partition(",")
        if not comma or not name.strip() or not word.strip():
            raise InputError(f"{path}, line {number + 1}: {lines[number]!r} is not 'name,class'. {_REMEDY}")
        yield name.strip(), word.strip()


def _templates(path: Path, lines: list[str], title: str) -> Iterator[str]:
    """The prompts under a title, with {} where the class word goes."""
    if title not in lines:
        raise InputError(f"{path} has no section {title!r}. {_REMEDY}")
    found = 0
    for line in lines[lines.index(title) + 1 :]:
        if line == "]":
            break
        match = _TEMPLATE.match(line)
        if match:
            found += 1
            yield match["text"].replace("{0} ", "").replace("{1}", "{}")
    if not found:
        raise InputError(f"{path} has no prompts under {title!r}. {_REMEDY}")


_REMEDY = "Take the file from a checkout of google/dreambooth."
