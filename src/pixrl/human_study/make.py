"""How a study's folder is made: pictures read, matched and written anew, then all of it put in place at once.

| a system | its pictures |
|---|---|
| a run of align or personalize | those of the newest evaluation, with its scores.json |
| RUN/samples/step-000000 | those of that evaluation: here the base model's |
| a run of fuse | the chosen ones, best first; where none was chosen, the one of the highest reward |
| a folder of fuse runs (`--pairs`) | those of each run |
| any other folder | its pictures, in the order of their names, with a scores.json of yours where there is one |

The prompt is the run's (of a fusion `owl + snail`), in other folders the caption beside a picture, else its name.
Pictures of one prompt are matched in their order: the first of one system with the first of the other.
"""

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pixrl.data.pictures import list_pictures, read_picture
from pixrl.data.rows import caption_of
from pixrl.errors import InputError, RunError
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
from pixrl.runs.folder import SAMPLES, RunFolder
from pixrl.runs.place import CHILDREN, is_run
from pixrl.runs.reading import SCORES, STEP, evaluated_places, gallery_on_disk, sample_scores, step_of_place
from pixrl.text import comparable, parse_json, read_text, shown_name

REWARD = "reward"
SELECTION = "selection.json"


@dataclass(frozen=True)
class SystemPicture:
    """One picture of a system."""

    file: Path
    prompt: str
    scores: Mapping[str, float] = field(default_factory=dict)
    """Reward -> score; one that failed is left out."""
    reference: Path | None = None
    """What the model was shown with the prompt, such as a picture of the subject."""

    @property
    def key(self) -> str:
        """The prompt as it is matched: letter case, white space and the way of writing é do not count."""
        return " ".join(comparable(self.prompt).casefold().split())


def parse_systems(given: Sequence[str]) -> dict[str, Path]:
    """Return name -> folder for each `NAME=FOLDER` or `FOLDER`, which is called as the folder is.

    Raises:
        InputError: fewer than two, a folder is missing, or two have one name.
    """
    systems: dict[str, Path] = {}
    for text in given:
        name, is_named, place = text.partition("=")
        if not is_named or Path(text).exists():
            name, place = "", text
        path = Path(place)
        if not path.is_dir():
            raise InputError(f"There is no folder {place!r} (looked in {Path.cwd()}).")
        name = name.strip() or shown_name(path.resolve().name)
        if name in systems:
            raise InputError(f"Two systems are called {name!r}. Name them: one={systems[name]} other={path}")
        systems[name] = path
    if len(systems) < 2:
        raise InputError(
            f"A study compares at least two systems, and {len(systems)} is given. Type, for example: "
            "pixrl human-study make ours=RUN base=RUN/samples/step-000000 --out study"
        )
    return systems


def read_system(path: Path) -> list[SystemPicture]:
    """Return a system's pictures in order.

    Raises:
        InputError: the folder holds no pictures.
        RunError: a run has no pictures yet.
        CheckpointError: a run's logs are damaged.
    """
    evaluation = path.parent.parent if path.parent.name == SAMPLES and path.name.startswith(STEP) else None
    if evaluation is not None and is_run(evaluation):
        return _of_evaluation(RunFolder.at(evaluation), path)
    children = sorted(place for place in (path / CHILDREN).glob("*") if is_run(place))
    if children:
        return [source for place in children for source in _of_run(RunFolder.open(place))]
    if is_run(path):
        return _of_run(RunFolder.open(path))
    files = list_pictures(path)
    if not files:
        raise InputError(f"{path} holds no pictures. Give a run, or a folder of PNG, JPEG or WebP files.")
    scores: dict[str, dict[str, float]] = {}
    if (file := path / SCORES).is_file():
        like = 'It looks like {"0.png": {"clip_text": 0.31}}.'
        found = parse_json(read_text(file), str(file), like=like)
        rows: list[Any] = list(found.values()) if isinstance(found, dict) else [None]
        if not all(
            isinstance(row, dict) and all(type(x) in (int, float) for x in row.values()) for row in rows
        ):
            raise InputError(f"{file} is no table of scores. {like}")
        scores = {name: {reward: float(x) for reward, x in row.items()} for name, row in found.items()}
    pictures = []
    for file in files:
        beside = caption_of(file)
        said = read_text(beside) if beside else shown_name(file.stem).replace("_", " ")
        prompt = " ".join(said.split())
        if not prompt:
            raise InputError(f"{beside or file} says no prompt. Write the picture's prompt into it.")
        pictures.append(SystemPicture(file, prompt, scores.get(file.name, {})))
    return pictures


def _of_run(run: RunFolder) -> list[SystemPicture]:
    if run.kind == "fuse":
        return _of_fusion(run)
    places = [place for place in evaluated_places(run) if any(place.glob("[0-9]*.png"))]
    if not places:
        raise RunError(
            f"{run.path} has no evaluation with pictures. Let it run to one (pixrl resume {run.path}), or give a "
            "folder of pictures."
        )
    return _of_evaluation(run, places[-1])


def _of_evaluation(run: RunFolder, place: Path) -> list[SystemPicture]:
    gallery = gallery_on_disk(run)
    if gallery is None:
        raise RunError(
            f"{run.path} has no readable samples/gallery.json, which says the prompt of each picture. "
            f"Type: pixrl resume {run.path}, which writes it again."
        )
    scores = sample_scores(run, step_of_place(place))
    sources = []
    for row in gallery:
        number = row["number"]
        reference = run.samples_dir / "references" / f"{number:04d}.png"
        found = {name: values[number] for name, values in scores.items() if number < len(values)}
        sources.append(
            SystemPicture(
                place / f"{number:04d}.png",
                row["prompt"],
                {name: x for name, x in found.items() if x is not None},
                reference if reference.is_file() else None,
            )
        )
    return sources


def _of_fusion(run: RunFolder) -> list[SystemPicture]:
    rows = {row.index: row for row in run.manifest() if row.file is not None}
    file = run.path / SELECTION
    chosen: list[int] = []
    if file.is_file():
        chosen = [n for n in parse_json(read_text(file), str(file)).get("indices", []) if n in rows]
    if not chosen:
        scored = [row for row in rows.values() if row.scores.get(REWARD) is not None]
        if not scored:
            raise RunError(f"{run.path} has no picture with a score. Let it run on: pixrl resume {run.path}")
        chosen = [max(scored, key=lambda row: row.scores[REWARD] or 0.0).index]
    return [
        SystemPicture(
            run.path / str(rows[n].file),
            " + ".join(rows[n].concepts or ()),
            {name: x for name, x in rows[n].scores.items() if x is not None},
        )
        for n in chosen
    ]


Place = tuple[str, int]
"""A prompt's key, and which of its pictures."""


def match(
    systems: Mapping[str, Sequence[SystemPicture]], *, only_matched: bool
) -> dict[Place, dict[str, SystemPicture]]:
    """Return, in the first system's order, what every system drew of each prompt: item -> system -> picture.

    Args:
        systems: each one's pictures.
        only_matched: leave out prompts that not every system drew.

    Raises:
        InputError: a prompt has no picture of some system, and `only_matched` is false; or none is left.
    """
    drawn: dict[str, dict[Place, SystemPicture]] = {name: {} for name in systems}
    for name, sources in systems.items():
        seen = Counter[str]()
        for source in sources:
            drawn[name][source.key, seen[source.key]] = source
            seen[source.key] += 1
    every = list(dict.fromkeys(item for found in drawn.values() for item in found))
    for name, found in drawn.items():
        missing = [item for item in every if item not in found]
        if missing and not only_matched:
            have = next(other for other, theirs in drawn.items() if missing[0] in theirs)
            which = f", picture {missing[0][1] + 1}" if missing[0][1] else ""
            raise InputError(
                f"{name} lacks {len(missing)} of {len(every)} pictures that others have, the first of "
                f"{json.dumps(missing[0][0], ensure_ascii=False)}{which} ({have} has it). Add them, or add "
                "--only-matched to leave them out."
            )
    matched = [item for item in every if all(item in found for found in drawn.values())]
    if not matched:
        examples = "; ".join(f"{name}: {next(iter(found))[0]!r}" for name, found in drawn.items())
        raise InputError(
            f"No prompt has a picture of every system ({examples}). Write the prompt of owl.png into owl.txt beside it."
        )
    return {item: {name: found[item] for name, found in drawn.items()} for item in matched}


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
        systems: name -> folder, as `parse_systems` returns them.
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
    found = match({name: read_system(path) for name, path in systems.items()}, only_matched=only_matched)
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
    found: Mapping[Place, Mapping[str, SystemPicture]],
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
