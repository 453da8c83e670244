"""How a study's folder is made: pictures read, matched and written anew, then all of it put in place at once."""

import io
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from pixrl.data.pictures import read_picture
from pixrl.errors import InputError
from pixrl.human_study import sources
from pixrl.human_study.sources import SystemPicture
from pixrl.human_study.study import (
    PICTURES,
    STUDY,
    VOTES,
    Design,
    Folder,
    Item,
    Picture,
    Study,
    StudySettings,
    opaque,
    require_new,
    spoil,
)
from pixrl.human_study.votes import Votes
from pixrl.runs.files import fsync_folder, temporary, write_all_atomic, write_atomic
from pixrl.text import shown_name

CHECK_ITEMS = 12
"""Prompts at most of which there are spoilt pictures: participants see a few of them."""


def make(
    systems: Mapping[str, Path],
    settings: StudySettings,
    out: Path,
    *,
    participants: int,
    only_matched: bool = False,
) -> Folder:
    """Make a study's folder, which appears only when all of it is on the disk.

    Args:
        systems: name -> folder, as `sources.parse_systems` returns them.
        settings: how it asks.
        out: the new folder.
        participants: how many links.
        only_matched: leave out prompts that not every system drew.

    Raises:
        RunError: there is a study already, or anything else; or a run has no pictures yet.
        InputError: pictures are missing, do not match or cannot be read; or best of n of two systems was asked.
    """
    require_new(out)
    if settings.design is Design.BEST and len(systems) < 3:
        raise InputError("The best of two is a pair: give three systems or more, or --design pairs.")
    found = sources.match(
        {name: sources.read_system(path) for name, path in systems.items()}, only_matched=only_matched
    )
    keys = list(dict.fromkeys(key for key, _ in found))
    if settings.prompts is not None:
        if settings.prompts > len(keys):
            raise InputError(
                f"--prompts {settings.prompts}: there are {len(keys)} prompts. Give that or fewer."
            )
        kept = set(random.Random(f"{settings.seed} prompts").sample(keys, settings.prompts))
        found = {item: drawn for item, drawn in found.items() if item[0] in kept}
    place = temporary(out.absolute(), "new")
    place.parent.mkdir(parents=True, exist_ok=True)
    (place / PICTURES).mkdir(parents=True)
    try:
        study = _write(place, settings, list(systems), found)
        with Votes(place / VOTES, make=True) as made:
            made.add_participants(study, participants)
        write_atomic(place / STUDY, study.model_dump_json(indent=1).encode())
        if out.exists():
            out.rmdir()  # an empty one, or this would fail
        place.rename(out)
        fsync_folder(out.absolute().parent)
    finally:
        if place.exists():
            shutil.rmtree(place)
    return Folder(out, study)


def _write(
    place: Path,
    settings: StudySettings,
    systems: Sequence[str],
    found: Mapping[sources.Item, Mapping[str, SystemPicture]],
) -> Study:
    items: list[Item] = []
    pictures: dict[str, Picture] = {}
    spoilt: dict[str, str] = {}
    references: dict[Path, str] = {}
    checked = set(
        random.Random(f"{settings.seed} checks").sample(range(len(found)), min(CHECK_ITEMS, len(found)))
    )
    for number, ((_, k), drawn) in enumerate(found.items()):
        first = next(iter(drawn.values()))
        shown = next((source.reference for source in drawn.values() if source.reference is not None), None)
        if shown is not None and shown not in references:
            references[shown] = _save(place, read_picture(shown))
        items.append(
            Item(prompt=first.prompt, number=k, reference=None if shown is None else references[shown])
        )
        names = []
        for system, source in drawn.items():
            picture = read_picture(source.file)
            names.append(_save(place, picture))
            origin = shown_name(source.file)
            pictures[names[-1]] = Picture(
                item=number, system=system, source=origin, scores=dict(source.scores)
            )
            if number in checked and settings.checks:
                spoilt[_save(place, spoil(picture, f"{settings.seed} {number} {system}"))] = names[-1]
    fsync_folder(place / PICTURES)
    order = list(pictures)
    random.Random(settings.seed).shuffle(order)  # so that not even the order in the file tells
    return Study(
        settings=settings,
        systems=tuple(systems),
        items=tuple(items),
        pictures={name: pictures[name] for name in order},
        spoilt=spoilt,
    )


def _save(place: Path, picture: Image.Image) -> str:
    name = opaque()
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=6)
    write_all_atomic({place / PICTURES / f"{name}.png": buffer.getvalue()})
    return name
