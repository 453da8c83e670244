"""What an align run's evaluation showed: how many pictures, of which subjects."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixrl.data.subjects import CLASS_FILE
from pixrl.errors import CheckpointError, InputError
from pixrl.runs.config import AlignConfig
from pixrl.runs.folder import RunFolder
from pixrl.runs.log import samples_of
from pixrl.runs.record import GALLERY, base_and_last, gallery_on_disk
from pixrl.text import read_text, shown_name

NAMED = 3
"""Subjects that a heading names; of more it says how many they are."""


def gallery_entries(folder: RunFolder) -> list[dict[str, Any]]:
    """One a picture of an evaluation: number, prompt, seed; subject and reference where it has them.

    Raises:
        CheckpointError: the file that lists them is damaged.
    """
    if not (folder.path / GALLERY).is_file():  # it stopped before its first step
        return []
    entries = gallery_on_disk(folder)
    if entries is None:
        raise CheckpointError(
            f"{folder.path / GALLERY} is damaged. Type: pixrl resume {folder.path}, which writes it again."
        )
    return entries


def before_and_after(folder: RunFolder) -> Iterator[tuple[dict[str, Any], Path, Path]]:
    """Entries of the gallery with the pictures of the base and the last evaluation; none where not both are there."""
    folders = [samples_of(folder, row["step"]) for row in base_and_last(folder)]
    for entry in gallery_entries(folder) if folders else []:
        first, last = folders
        name = f"{entry['number']:04d}.png"
        if (first / name).is_file() and (last / name).is_file():
            yield entry, first / name, last / name


def subjects_in_words(folder: RunFolder, config: AlignConfig) -> str:
    """The subjects that were trained on so far, such as `my_mug (mug)`; empty of a run without."""
    names = trained_subjects(folder)
    if len(names) > NAMED:
        return f"{len(names)} subjects"
    return ", ".join(in_words(name, class_word(config.prompts.source, name)) for name in names)


def trained_subjects(folder: RunFolder) -> list[str]:
    """Their names in order, each once."""
    return sorted({str(row.extra["subject"]) for row in folder.manifest() if "subject" in row.extra})


def in_words(subject: str, word: str | None) -> str:
    """A subject with what prompts call it."""
    return subject if word in (None, subject) else f"{subject} ({word})"


def class_word(source: str, subject: str) -> str | None:
    """What prompts call a subject of a source; None where that is no folder, or is not there any more."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    # a subject is called what its folder is shown as, which need not be how the folder's name is written
    own = (one / CLASS_FILE for one in folder.iterdir() if shown_name(one.name) == subject)
    file = next((one for one in (*own, folder / CLASS_FILE) if one.is_file()), None)
    try:
        return None if file is None else " ".join(read_text(file).split())
    except InputError:
        return None
