"""Lists of concepts to fuse: one `a & b` a line, more concepts by more `&`."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixrl.data.pictures import FOREIGN_SUFFIXES, SUFFIXES
from pixrl.errors import InputError
from pixrl.text import comparable, lines, read_text, require_text

SEPARATOR = "&"
COMMENT = "#"
EXAMPLE = "Each line names two or more concepts, like: owl & snail"


@dataclass(frozen=True)
class PairList:
    """A list of concepts to fuse, in the file's order, with notes of what was left out or respelled."""

    source: str
    pairs: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    """One sentence for each duplicate that was dropped and each concept whose spelling was unified."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self.pairs)

    @property
    def concepts(self) -> tuple[str, ...]:
        """Every concept once, in order of appearance."""
        return tuple(dict.fromkeys(concept for pair in self.pairs for concept in pair))


def read_pairs(path: Path | str) -> PairList:
    """Read a list of pairs from a text file as `parse_pairs` does."""
    return parse_pairs(lines(read_text(Path(path))), str(path))


def parse_pairs(lines: Sequence[str], source: str = "the list of pairs") -> PairList:
    """Return the list of pairs of a text, one `a & b` a line; `source` names it in messages.

    Spaces around names are dropped. A line that names the same concepts as an earlier one, whatever their case, the
    composition of their letters and their order, is left out and noted; a concept is spelled as where it first
    appears. Lines that start with # are comments.

    Raises:
        InputError: a line does not name at least two different concepts, names a picture or holds what is no text;
            there is none.
    """
    spelling: dict[str, str] = {}
    first_line: dict[frozenset[str], int] = {}
    pairs: list[tuple[str, ...]] = []
    notes: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.startswith(COMMENT):
            continue
        given = _parse(source, number, line)
        concepts = tuple(spelling.setdefault(_key(concept), concept) for concept in given)
        notes += [
            f"{source}, line {number}: {old!r} is spelled {new!r}, as before."
            for old, new in zip(given, concepts, strict=True)
            if old != new
        ]
        key = frozenset(_key(concept) for concept in concepts)
        if key in first_line:
            notes.append(
                f"{source}, line {number}: {line.strip()!r} repeats line {first_line[key]} and is left out."
            )
            continue
        first_line[key] = number
        pairs.append(concepts)
    if not pairs:
        raise InputError(f"{source} names no concepts. {EXAMPLE}")
    return PairList(source, tuple(pairs), tuple(notes))


def check_concepts(concepts: Sequence[str]) -> tuple[str, ...]:
    """Return the concepts without stray spaces.

    Raises:
        InputError: there are fewer than two, or one is empty, no text or given twice.
    """
    names = tuple(" ".join(concept.split()) for concept in concepts)
    if len(names) < 2:
        given = f"only {names[0]!r} was given" if names else "none was given"
        raise InputError(
            f"A fusion needs at least two concepts; {given}. Type, for example: pixrl fuse owl snail"
        )
    if not all(names):
        raise InputError(f"A concept is empty in {list(concepts)!r}. Type, for example: pixrl fuse owl snail")
    seen: set[str] = set()
    for name in names:
        if _key(require_text(name, f"the concept {name!r}")) in seen:
            raise InputError(f"The concept {name!r} is given twice; a fusion is between different concepts.")
        seen.add(_key(name))
    return names


def split_picture(concept: str) -> tuple[str, str | None]:
    """Return a concept's name, and the file of the picture that stands for it, where it is one.

    `photo.png` is a picture without words, named as its file; `owl=photo.png` one of what the word says.
    """
    if not concept.lower().endswith(SUFFIXES + FOREIGN_SUFFIXES):
        return concept, None
    word, equals, file = concept.partition("=")
    return (word.strip(), file.strip()) if equals else (Path(concept).name, concept)


def is_wordless(concept: str) -> bool:
    """Return whether a concept's name is the file name of a picture without words."""
    return split_picture(concept)[1] is not None


def _key(concept: str) -> str:
    """Return what is the same for all spellings of a concept."""
    return comparable(comparable(concept).casefold())


def _parse(source: str, number: int, line: str) -> tuple[str, ...]:
    place = f"{source}, line {number}"
    require_text(line, place)
    if not line.strip():
        raise InputError(f"{place} is empty. {EXAMPLE}. Delete the line or start it with {COMMENT}.")
    if SEPARATOR not in line:
        raise InputError(f"{place}: {line.strip()!r} has no {SEPARATOR!r}. {EXAMPLE}")
    names = [" ".join(part.split()) for part in line.split(SEPARATOR)]
    if not all(names):
        raise InputError(f"{place}: {line.strip()!r} has nothing on one side of {SEPARATOR!r}. {EXAMPLE}")
    for name in names:
        if split_picture(name)[1] is not None:
            raise InputError(
                f"{place}: {name!r} is a picture, and a list holds words alone. Fuse it by itself: "
                f"pixrl fuse owl {shlex.quote(name)}"
            )
    if len({_key(name) for name in names}) < len(names):
        raise InputError(f"{place}: {line.strip()!r} names the same concept twice. {EXAMPLE}")
    return tuple(names)
