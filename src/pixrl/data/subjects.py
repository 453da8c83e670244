"""Subjects: what is to be kept, in which pictures it is shown, and what is asked of it.

| source | what |
|---|---|
| `toy:subjects` | the toy world's thirty held-out subjects (split `evaluation`), or others for training |
| a folder | one subject: pictures, `class.txt` (its class word), `prompts.txt` (one a line), or instead of that the |
|           | captions beside the pictures; masks of yours if there are any (`front.mask.png` for front.jpg) |
| a folder of such folders | each of them |
| a DreamBench checkout | google/dreambooth, or its `dataset/`: a folder a subject and `prompts_and_classes.txt` |
| `list.json` | UNO's lists: `[{"prompt": ..., "image_paths": [...]}, ...]`, paths from the file's folder, or the one |
|           | path of an `image_path`; those for training also have an `image_tgt_path`. Ours: `classes`, the class |
|           | word of each picture's subject |
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pixrl.data.pictures import (
    holds_pictures,
    is_junk,
    junk_note,
    list_pictures,
    mask_of,
    read_mask,
    read_picture,
    to_tensors,
)
from pixrl.data.prompts import PromptSet, Split, load_prompts, repeats_note
from pixrl.data.rows import caption_of
from pixrl.data.toy import toy_subjects
from pixrl.errors import InputError, did_you_mean
from pixrl.hub import TOY_PREFIX
from pixrl.text import comparable, parse_json, read_text, require_path, shown_name
from pixrl.text import lines as lines_of

if TYPE_CHECKING:
    from torch import Tensor


CLASS_FILE, PROMPTS_FILE = "class.txt", "prompts.txt"
_LAYOUT = (
    f"A subject is a folder with pictures, {CLASS_FILE} (such as: dog) and {PROMPTS_FILE} (one a line), or captions "
    "beside the pictures (00.caption or 00.txt)."
)


@dataclass(frozen=True)
class Subject:
    """One subject (or several that are always shown together, as UNO's lists may have)."""

    name: str
    word: str | None
    """The class word that prompts call it by; None where the source does not say (UNO's lists)."""
    prompts: tuple[str, ...]
    references: tuple[Path | Image.Image, ...]
    """At least one; a file is read when `pictures` is called."""
    targets: tuple[Path | Callable[[], Image.Image] | None, ...] = ()
    """How the picture of each prompt should look, where the source has that; empty where it has none."""
    words: tuple[str, ...] = ()
    """Class words of several subjects that are shown together, one a reference; empty for one subject."""

    def target(self, number: int) -> Callable[[], Image.Image] | None:
        """What opens the target of a prompt, by its number; None where there is none."""
        found = self.targets[number] if self.targets else None
        return partial(read_picture, found) if isinstance(found, Path) else found

    @cached_property
    def masks(self) -> tuple[Path | None, ...]:
        """The mask of yours beside each reference; none for those without one."""
        return tuple(mask_of(one) if isinstance(one, Path) else None for one in self.references)

    def pictures(self) -> list[Image.Image]:
        """The references as RGB, each in its own size.

        Raises:
            InputError: a file was changed since it was checked and can no longer be read.
        """
        return [one if isinstance(one, Image.Image) else read_picture(one) for one in self.references]

    def tensors(self) -> list["Tensor"]:
        """The references, float32 [3, H, W] in [0, 1] each."""
        return to_tensors(self.pictures())


@dataclass(frozen=True)
class SubjectSet:
    """Subjects in the source's order."""

    name: str
    subjects: tuple[Subject, ...]
    notes: tuple[str, ...] = ()
    """What a person should know of how the source was read: rows that repeat others, files that were passed over."""

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> Subject:
        return self.subjects[index]

    def __iter__(self) -> Iterator[Subject]:
        return iter(self.subjects)


def load_subjects(source: str | Path, *, split: str = Split.TRAIN) -> SubjectSet:
    """The subjects of a source (see the table above). Every picture is opened once, to check it.

    Args:
        source: `toy:subjects`, a folder or a .json file.
        split: of the toy world's subjects; a folder or file is read as it is for either.

    Raises:
        InputError: no such source or split; a subject without a picture, class word or prompt; a picture that cannot
            be read or is tiny; a prompt that does not name the class; a list that is not as UNO writes it.
    """
    if split not in list(Split):
        raise InputError(f"Unknown split {split!r}.{did_you_mean(str(split), Split)} Use {', '.join(Split)}.")
    name = require_path(str(source), "the source of subjects")
    if name.startswith(TOY_PREFIX):
        toy = toy_subjects(name.removeprefix(TOY_PREFIX), held_out=split == Split.EVALUATION)
        return SubjectSet(name, tuple(Subject(*entry) for entry in toy))
    path, notes = Path(source), list[str]()
    if path.suffix.lower() == ".json":
        return SubjectSet(name, _checked(_read_uno(path, notes)), tuple(notes))
    if not path.is_dir():
        raise InputError(
            f"{name!r} is neither a folder nor a .json list (looked in {Path.cwd()}). {_LAYOUT} "
            "The toy world's are toy:subjects."
        )
    checkout = next((one for one in (path, path / "dataset") if (one / CLASSES_FILE).is_file()), None)
    parts = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and not is_junk(p))
    if checkout is not None:
        found, (listed, repeats) = [], read_classes(checkout / CLASSES_FILE)
        there = [checkout / one for one, _, _ in listed if (checkout / one).is_dir()]
        notes += [*repeats, *junk_note([checkout, *there])]
        for one, word, prompts in listed:
            if not (checkout / one).is_dir():
                raise InputError(
                    f"{checkout / CLASSES_FILE} lists {one!r}, but there is no folder {checkout / one}. "
                    "Check out google/dreambooth again."
                )
            _require_word(one, word, prompts, f"mend {checkout / CLASSES_FILE}")
            found.append(Subject(one, word, prompts, tuple(list_pictures(checkout / one))))
    elif parts and not holds_pictures(path) and not (path / CLASS_FILE).exists():
        notes += [*junk_note([path]), *junk_note(parts)]
        found = [_read_subject(part, notes) for part in parts]
    else:
        notes += junk_note([path])
        found = [_read_subject(path, notes)]
    return SubjectSet(name, _checked(found), tuple(dict.fromkeys(notes)))


def check_targets(subjects: SubjectSet) -> None:
    """Refuses subjects that supervised training cannot learn from. Every target in a file is opened once.

    Raises:
        InputError: a prompt has no target picture, or one that cannot be read.
    """
    for subject in subjects:
        for number, prompt in enumerate(subject.prompts):
            if subject.target(number) is None:
                raise InputError(
                    f"sft needs a target picture for every prompt, and {prompt!r} of {subject.name!r} has none. "
                    "Sources with targets are toy:subjects and UNO's lists with image_tgt_path; other methods need "
                    "none."
                )
            path = subject.targets[number]
            if isinstance(path, Path):
                read_picture(path)


def _read_subject(path: Path, notes: list[str]) -> Subject:
    if not (path / CLASS_FILE).is_file():
        raise InputError(f"{path} has no {CLASS_FILE} with its class word. {_LAYOUT}{_checkout_hint(path)}")
    word = " ".join(read_text(path / CLASS_FILE).split())
    if not word:
        raise InputError(f"{path / CLASS_FILE} is empty. Write what the subject is, such as: dog")
    name = shown_name(path.resolve().name)
    found = _prompts_of(path)
    notes += found.notes
    prompts = tuple(dict.fromkeys(prompt.text for prompt in found))
    _require_word(name, word, prompts, f"mend {path / CLASS_FILE}")
    return Subject(name, word, prompts, tuple(list_pictures(path)))


def _prompts_of(path: Path) -> PromptSet:
    """A subject's prompts: those that were written for it, or else the captions of its pictures."""
    captions = [file for picture in list_pictures(path) if (file := caption_of(picture)) is not None]
    if not (path / PROMPTS_FILE).is_file():
        if not captions:
            raise InputError(
                f"{path} has no {PROMPTS_FILE} with its prompts. {_LAYOUT}{_checkout_hint(path)}"
            )
        return load_prompts(path)
    found = load_prompts(path / PROMPTS_FILE)
    if not captions:
        return found
    more = f" and {len(captions) - 1} more" if len(captions) > 1 else ""
    note = f"{path}: {PROMPTS_FILE} says what is asked, so the caption {captions[0].name}{more} is not read"
    return replace(found, notes=(*found.notes, note))


def _checkout_hint(path: Path) -> str:
    """What to type where the folder is a part of a DreamBench checkout, which says the class words itself."""
    for folder in path.resolve().parents[:2]:
        if (folder / CLASSES_FILE).is_file():
            return f" It is a part of a DreamBench checkout: for all its subjects, give {folder}"
    return ""


def _read_uno(path: Path, notes: list[str]) -> list[Subject]:
    """One subject for each list of references, with all the prompts that go with it."""
    entries: Any = parse_json(read_text(path), str(path), like=_UNO_LAYOUT)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} must hold a list that is not empty. {_UNO_LAYOUT}")
    rows: dict[tuple[str, ...], dict[tuple[str, str | None], tuple[int, str]]] = {}
    words: dict[tuple[str, ...], tuple[str, ...]] = {}
    repeats = []
    for number, entry in enumerate(entries, 1):
        references, prompt, target, own = _uno_entry(path, number, entry)
        if words.setdefault(references, own) != own:
            raise InputError(
                f"{path}, entry {number} gives the classes {list(own)} to the same pictures as an entry before, which "
                f"gives {list(words[references])}. Give the same everywhere."
            )
        known = rows.setdefault(references, {})
        first, _ = known.setdefault((comparable(prompt), target), (number, prompt))
        if first != number:
            repeats.append(f"entry {number} repeats entry {first}: {prompt!r}")
    notes += repeats_note(path.name, len(entries), repeats)
    return [
        Subject(
            name,
            None,
            tuple(prompt for _, prompt in asked.values()),
            tuple(path.parent / one for one in paths),
            tuple(None if target is None else path.parent / target for _, target in asked),
            words[paths],
        )
        for name, (paths, asked) in zip(_uno_names(list(rows)), rows.items(), strict=True)
    ]


_UNO_LAYOUT = 'Each entry is like {"prompt": "a dog in the snow", "image_paths": ["dog/00.jpg"]}.'


def _uno_entry(
    path: Path, number: int, entry: object
) -> tuple[tuple[str, ...], str, str | None, tuple[str, ...]]:
    """Return an entry's references, prompt, target and the class word of each reference (none without `classes`)."""
    place = f"{path}, entry {number}"
    if not isinstance(entry, Mapping):
        raise InputError(f"{place} is {entry!r}. {_UNO_LAYOUT}")
    if "image_path" in entry and "image_paths" in entry:
        raise InputError(f"{place} has both image_path and image_paths. Give one of them. {_UNO_LAYOUT}")
    prompt, target = entry.get("prompt"), entry.get("image_tgt_path")
    paths = [entry["image_path"]] if "image_path" in entry else entry.get("image_paths")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{place} has no prompt. {_UNO_LAYOUT}")
    if not isinstance(paths, list) or not paths or not all(isinstance(one, str) and one for one in paths):
        raise InputError(f"{place} has no reference: image_paths is {paths!r}. {_UNO_LAYOUT}")
    if target is not None and not (isinstance(target, str) and target):
        raise InputError(f"{place}: image_tgt_path is {target!r}; give a path, or leave it out.")
    given = entry.get("classes", [])
    if not isinstance(given, list) or not all(isinstance(one, str) and one.strip() for one in given):
        raise InputError(f'{place}: classes is {given!r}; write it like ["dog", "cat"].')
    if given and len(given) != len(paths):
        raise InputError(
            f"{place} has {len(paths)} pictures and {len(given)} classes; give one class a picture."
        )
    for word in given:
        mend = f"mend the entry's classes in {path}"
        _require_word(f"entry {number} of {path.name}", word, [prompt.strip()], mend)
    return tuple(paths), prompt.strip(), target, tuple(given)


def _uno_names(lists: Sequence[Sequence[str]]) -> list[str]:
    """A name of its own for each list of pictures.

    Their folders, `backpack` for dataset/backpack/02.jpg; with the files, `backpack-02`, where several lists share
    them; numbered where that is not enough.
    """
    folders = [
        "+".join(dict.fromkeys(Path(one).parent.name or Path(one).stem for one in paths)) for paths in lists
    ]
    shared = {name for name, count in Counter(folders).items() if count > 1}
    names = [
        f"{name}-{'+'.join(Path(one).stem for one in paths)}" if name in shared else name
        for name, paths in zip(folders, lists, strict=True)
    ]
    taken: set[str] = set()
    for place, name in enumerate(names):
        number = 1
        while names[place] in taken:
            number += 1
            names[place] = f"{name}-{number}"
        taken.add(names[place])
    return names


def _checked(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """The subjects, after every picture was opened once."""
    seen: set[Path] = set()
    for subject in subjects:
        if not subject.references:
            raise InputError(f"The subject {subject.name!r} has no reference picture. {_LAYOUT}")
        for picture in subject.references:
            if isinstance(picture, Path) and picture not in seen:
                read_picture(picture)
                seen.add(picture)
                if (mask := mask_of(picture)) is not None:
                    read_mask(mask, picture)
    return tuple(subjects)


def _require_word(name: str, word: str, prompts: Sequence[str], mend: str) -> None:
    """Every prompt says the class word, in any case, singular or with an s."""
    said = re.escape(_plain(word))
    if re.search("[A-Za-z]", word):  # other scripts may not set words apart, or may inflect otherwise
        said = rf"(?<!\w){said}(e?s)?(?!\w)"
    says = re.compile(said, re.IGNORECASE)
    for number, prompt in enumerate(prompts, 1):
        if not says.search(_plain(prompt)):
            raise InputError(
                f"Prompt {number} of the subject {name!r} does not name its class {word!r}: {prompt!r}. "
                f"The class word is how the prompt asks for the subject: write it in, or {mend}."
            )


def _plain(text: str) -> str:
    """One way to write each accented letter, and one space between words."""
    return " ".join(comparable(text).split())


# DreamBench's prompts_and_classes.txt (Ruiz et al. 2023, DreamBooth): thirty subjects with their classes, and two lists
# of prompts. Those are templates `a {0} {1} in the jungle` of a rare token and the class word; with reference pictures
# the rare token says nothing and is left out, as in UNO's list.

CLASSES_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")
"""Classes that are asked the live prompts; the others are objects."""
_HEADER = "subject_name,class"
_OBJECT, _LIVE = "Object Prompts", "Live Subject Prompts"
_CLASS, _TOKEN = "{1}", "{0} "
"""In a template: where the class word goes, and the rare token before it."""
_TEMPLATE = re.compile(r"""^\s*(['"])(?P<text>.*)\1\.format\(""")
_DREAMBENCH_REMEDY = "Take the file from a checkout of google/dreambooth."


def read_classes(path: Path) -> tuple[list[tuple[str, str, tuple[str, ...]]], list[str]]:
    """Return each subject's name, class word and prompts, in the file's order, and a note of each repeated line.

    Raises:
        InputError: the file is not as google/dreambooth has it; says which part is missing, or which line is wrong.
    """
    lines = [line.strip() for line in lines_of(read_text(path))]
    if _HEADER not in lines:
        raise InputError(f"{path} has no line {_HEADER!r} before its subjects. {_DREAMBENCH_REMEDY}")
    start = lines.index(_HEADER) + 1
    end = next((k for k in range(start, len(lines)) if not lines[k]), len(lines))
    if start == end:
        raise InputError(f"{path} lists no subject under {_HEADER!r}. {_DREAMBENCH_REMEDY}")
    notes: list[str] = []
    words: dict[str, str] = {}
    for number in range(start, end):
        name, word = (part.strip() for part in lines[number].partition(",")[::2])
        if not name or not word:
            raise InputError(
                f"{path}, line {number + 1}: {lines[number]!r} is not 'name,class'. {_DREAMBENCH_REMEDY}"
            )
        if words.get(name, word) != word:
            raise InputError(
                f"{path}, line {number + 1} calls {name!r} {word!r}, and a line before {words[name]!r}. Delete one."
            )
        if name in words:
            notes.append(f"{path}: line {number + 1} repeats the subject {name!r}")
        words[name] = word
    templates = {title: _listed_templates(path, lines, title, notes) for title in (_OBJECT, _LIVE)}
    listed = []
    for name, word in words.items():
        asked = templates[_LIVE if word in LIVE_CLASSES else _OBJECT]
        listed.append((name, word, tuple(text.replace(_CLASS, word) for text in asked)))
    return listed, notes


def _listed_templates(path: Path, lines: list[str], title: str, notes: list[str]) -> list[str]:
    """Return the prompts under a title, without the rare token and with {1} where the class word goes."""
    if title not in lines:
        raise InputError(f"{path} has no section {title!r}. {_DREAMBENCH_REMEDY}")
    found: dict[str, str] = {}
    for number, line in enumerate(lines[lines.index(title) + 1 :], lines.index(title) + 2):
        if line == "]":
            break
        match = _TEMPLATE.match(line)
        if match:
            text = match["text"].replace(_TOKEN, "")
            if set("{}") & set(text.replace(_CLASS, "")):
                raise InputError(
                    f"{path}, line {number}: {match['text']!r} has braces other than {{0}}, with a space after it, for "
                    "the rare token and {1} for the class. Write it like 'a {0} {1} in the snow'."
                )
            if comparable(text) in found:
                notes.append(f"{path}: line {number} repeats the prompt {match['text']!r}")
            found.setdefault(comparable(text), text)
    if not found:
        raise InputError(f"{path} has no prompts under {title!r}. {_DREAMBENCH_REMEDY}")
    return list(found.values())
