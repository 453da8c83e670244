"""A study is a folder: what is compared (study.json), the pictures under names that tell nothing, and the votes.

    study.json      settings, systems, prompts, pictures with their systems, files, scores: never shown to participants
    pictures/ID.png every picture written anew, without name, metadata or colour profile
    votes.sqlite    participants with their links' tokens and their plans, and every vote

The design: a *set* is what is compared with each other (two systems, or all of them), a *unit* is one set on one item
(a prompt, or one of several pictures of it). Units stand in a circle whose neighbours differ in prompt and set; each
participant takes the next stretch of it. So after any number of participants no unit was asked more than once more
often than another, and the same rule rotates the positions.

The questions that participants answer are those of the three papers, and any of your own:

| preset | from | as published |
|---|---|---|
| `e2po` | E²PO, appendix C.1 | best of five, four criteria, no tie |
| `rmler` | RMLer, "User Study" | best of five, the most harmonious fusion, no tie |
| `customized-grpo` | Customized-GRPO, appendix A.3 | pairs, identity and prompt following, ties allowed |

Numbered deviations: (1) The questions are in our words; Customized-GRPO alone prints its own. (2) Of E²PO's four
criteria its text names two, image-text alignment and overall quality; the others stand in a figure alone, so detail and
aesthetics are ours.
"""

import itertools
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field, ValidationError

from pixrl.config import Settings
from pixrl.errors import CheckpointError, InputError, RunError, did_you_mean
from pixrl.text import parse_json, read_text, require_text

STUDY, PICTURES, VOTES = "study.json", "pictures", "votes.sqlite"
TIE = "tie"
"""The choice of a participant for whom none is better."""
SPOILT_SIDE = 8
"""Into how many pieces a side of a picture is cut, which are shuffled, for an attention check."""


class Criterion(Settings):
    """One question about the pictures of a comparison."""

    name: str
    """How tables call it."""
    question: str
    """What participants read."""


class Questionnaire(Settings):
    """The criteria of one published study."""

    criteria: tuple[Criterion, ...]
    ties: bool
    """Whether participants may say that none is better."""


def _criteria(**questions: str) -> tuple[Criterion, ...]:
    return tuple(Criterion(name=name, question=question) for name, question in questions.items())


PRESETS = {
    "e2po": Questionnaire(
        criteria=_criteria(
            alignment="Which picture shows best what the text says?",
            detail="Which picture has the cleanest details, with the fewest errors?",
            aesthetics="Which picture is the most beautiful?",
            overall="Which picture is the best overall?",
        ),
        ties=False,
    ),
    "rmler": Questionnaire(
        criteria=_criteria(harmony="Which picture joins the concepts most harmoniously into one new object?"),
        ties=False,
    ),
    "customized-grpo": Questionnaire(
        criteria=_criteria(
            identity="Which picture keeps the look of the subject in the reference better?",
            prompt="Which picture follows the text better, and looks better?",
        ),
        ties=True,
    ),
}


def parse_criteria(given: Sequence[str]) -> Questionnaire:
    """Return the criteria that were asked for: names of presets, and questions of one's own as `name=question`.

    Ties are allowed where any of the named presets allows them.

    Raises:
        InputError: a name is no preset, a question is empty, or a criterion is named twice.
    """
    criteria: list[Criterion] = []
    ties = False
    for text in given:
        name, is_own, question = (part.strip() for part in text.partition("="))
        if is_own:
            if not name or not question:
                raise InputError(
                    f"{text!r} is no criterion: write its name and its question, such as "
                    "--criteria 'humour=Which picture is funnier?'"
                )
            criteria.append(Criterion(name=name, question=require_text(question, f"the criterion {name!r}")))
            continue
        if name not in PRESETS:
            raise InputError(
                f"There are no criteria {name!r}.{did_you_mean(name, PRESETS)} There are {', '.join(PRESETS)}; "
                "one of your own is written name=question."
            )
        criteria += PRESETS[name].criteria
        ties = ties or PRESETS[name].ties
    names = [one.name for one in criteria]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"The criterion {twice!r} is given twice. Give each one another name.")
    if not criteria:
        raise InputError(f"A study asks something. Type: --criteria {' or --criteria '.join(PRESETS)}")
    return Questionnaire(criteria=tuple(criteria), ties=ties)


class Design(StrEnum):
    """What is shown side by side."""

    PAIRS = "pairs"
    BEST = "best"
    """One picture of every system: the best of n."""


class StudySettings(Settings):
    """How a study asks."""

    title: str = Field("Which picture is better?", min_length=1, max_length=200)
    """What participants read first."""
    design: Design = Design.PAIRS
    criteria: tuple[Criterion, ...] = Field(min_length=1)
    ties: bool = False
    """Whether `none is better` is an answer."""
    comparisons: int = Field(30, ge=1, le=1000)
    """For each participant, besides the attention checks; fewer where the study has fewer."""
    checks: int = Field(6, ge=0, le=100)
    """Attention checks for each participant: comparisons with a picture of shuffled pieces."""
    prompts: int | None = Field(None, ge=1)
    """So many prompts, chosen by the seed; None: all."""
    seed: int = Field(0, ge=0, lt=2**63)


class Item(Settings):
    """A prompt with one picture of each system."""

    prompt: str
    number: int = 0
    """Which of the prompt's pictures, where systems drew several."""
    reference: str | None = None
    """The picture that the models were shown with the prompt."""


class Picture(Settings):
    """A picture that is compared."""

    item: int
    system: str
    source: str
    """The file that it was made from."""
    scores: dict[str, float] = Field(default_factory=dict)


class Study(Settings):
    """What study.json holds."""

    format: Literal[1] = 1
    settings: StudySettings
    systems: tuple[str, ...]
    items: tuple[Item, ...]
    pictures: dict[str, Picture]
    """Opaque name -> the picture."""
    spoilt: dict[str, str]
    """Opaque name of a picture of shuffled pieces -> the picture that it was made from."""

    @property
    def sets(self) -> list[tuple[str, ...]]:
        """The sets of systems that are compared."""
        if self.settings.design is Design.BEST:
            return [self.systems]
        return list(itertools.combinations(self.systems, 2))

    @property
    def names(self) -> list[str]:
        """The names of all picture files."""
        references = {item.reference for item in self.items if item.reference is not None}
        return [*self.pictures, *self.spoilt, *sorted(references)]

    def picture_of(self) -> dict[tuple[int, str], str]:
        """Return (item, system) -> the picture's name."""
        return {(one.item, one.system): name for name, one in self.pictures.items()}


class Comparison(Settings):
    """One comparison of one participant."""

    item: int
    pictures: tuple[str, ...]
    """In the order in which they are shown."""
    check: str | None = None
    """Of an attention check, the picture that is whole."""


@dataclass(frozen=True)
class Folder:
    """A study on the disk."""

    path: Path
    study: Study

    def file_of(self, name: str) -> Path:
        """Return the file of a picture by its opaque name."""
        return self.path / PICTURES / f"{name}.png"

    @property
    def votes(self) -> Path:
        """The file of the votes."""
        return self.path / VOTES


def open_study(path: Path) -> Folder:
    """Read a study's folder.

    Raises:
        InputError: there is no study.
        CheckpointError: study.json is damaged, or its votes are gone.
    """
    if not (path / STUDY).is_file():
        raise InputError(
            f"There is no study in {str(path)!r} ({STUDY} is missing). Type: pixrl human-study make A B --out {path}"
        )
    try:
        study = Study.model_validate(parse_json(read_text(path / STUDY), str(path / STUDY)))
    except (ValidationError, InputError) as error:
        raise CheckpointError(
            f"{path / STUDY} is damaged, or of another version of pixrl: {' '.join(str(error).split())[:200]}. "
            "Put it back; the votes beside it are kept."
        ) from None
    if not (path / VOTES).is_file():
        raise CheckpointError(f"{path / VOTES} is gone, and with it the participants' links. Put it back.")
    return Folder(path, study)


def units(study: Study) -> list[tuple[int, int]]:
    """Return the circle of units, each an item's and a set's number: neighbours differ in both where they can."""
    order = list(range(len(study.items)))
    random.Random(f"{study.settings.seed} units").shuffle(order)
    count = len(study.sets)
    return [(item, (lap + place) % count) for lap in range(count) for place, item in enumerate(order)]


def plan(study: Study, number: int) -> list[Comparison]:
    """Return what participant `number` (0, 1, 2 ...) is shown, in order."""
    circle = units(study)
    length = min(study.settings.comparisons, len(circle))
    draw = random.Random(f"{study.settings.seed} participant {number}")
    names = study.picture_of()
    tasks = []
    for visit in range(number * length, (number + 1) * length):
        lap, place = divmod(visit, len(circle))
        item, chosen = circle[place]
        # blocks of n visits of a set of n systems show a random circle of them, turned by one each time: every system
        # stands once at every place; a later lap turns on by one
        before = sum(unit[1] == chosen for unit in circle[:place])
        systems = list(study.sets[chosen])
        block, turn = divmod(before, len(systems))
        random.Random(f"{study.settings.seed} order {chosen} {block}").shuffle(systems)
        turn = (turn + lap) % len(systems)
        shown = (*systems[turn:], *systems[:turn])
        tasks.append(Comparison(item=item, pictures=tuple(names[item, system] for system in shown)))
    draw.shuffle(tasks)
    # the attention checks: one whole picture among spoilt ones of the same prompt
    spoilt: dict[int, list[str]] = {}
    for name, original in study.spoilt.items():
        spoilt.setdefault(study.pictures[original].item, []).append(name)
    items = sorted(spoilt)
    for k in range(study.settings.checks if items else 0):
        item = items[(number * study.settings.checks + k) % len(items)]
        good = draw.choice([name for name, one in study.pictures.items() if one.item == item])
        among = [good, *draw.sample(sorted(spoilt[item]), len(study.sets[0]) - 1)]
        draw.shuffle(among)
        check = Comparison(item=item, pictures=tuple(among), check=good)
        tasks.insert(draw.randrange(len(tasks) + 1), check)
    return tasks


def spoil(picture: Image.Image, seed: str) -> Image.Image:
    """Return a picture of the same size and colours whose 64 pieces are shuffled: worse by every criterion."""
    side = SPOILT_SIDE * max(1, min(picture.size) // SPOILT_SIDE)
    squared = picture.resize((side, side), Image.Resampling.LANCZOS)
    step = side // SPOILT_SIDE
    corners = [(x, y) for x in range(0, side, step) for y in range(0, side, step)]
    moved = list(corners)
    random.Random(seed).shuffle(moved)
    made = Image.new("RGB", (side, side))
    for (x, y), place in zip(corners, moved, strict=True):
        made.paste(squared.crop((x, y, x + step, y + step)), place)
    return made.resize(picture.size, Image.Resampling.LANCZOS)


def opaque() -> str:
    """Return a name that nobody can guess and that tells nothing: 128 random bits."""
    return secrets.token_hex(16)


def require_new(path: Path) -> None:
    """Raise RunError where something is in the way of a new study."""
    if (path / STUDY).exists():
        raise RunError(
            f"{path} is a study already, and its votes are not replaced. Ask more people with "
            f"pixrl human-study serve {path} --participants N, or give another --out."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} is not empty, so no study is written there. Give another --out.")


def scores_by_reward(study: Study) -> Mapping[str, dict[str, float]]:
    """Return reward -> picture -> score."""
    found: dict[str, dict[str, float]] = {}
    for name, picture in study.pictures.items():
        for reward, score in picture.scores.items():
            found.setdefault(reward, {})[name] = score
    return found
