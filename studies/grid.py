"""The grid runner of all studies: recipe x variant x seed, with records that a broken-off study goes on from."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import field_validator

from pixrl import config as recipes
from pixrl.config import Settings
from pixrl.errors import ConfigError, did_you_mean
from pixrl.jobs.check import RECORDS
from pixrl.runs.environment import describe
from pixrl.runs.files import sha256, write_atomic
from pixrl.runs.folder import JsonLines
from pixrl.workers import HERE, Workers

RECIPE, ENVIRONMENT = "recipe.yaml", "environment.json"
Record = dict[str, Any]
Task = tuple[Any, ...]
"""The name of a cell: variant and seed, and the pair before them where concepts are fused."""


class Study(Settings, ABC):
    """The settings of a study: variants over seeds, and over what else its kind has."""

    kind: ClassVar[str]
    differences: tuple[tuple[str, str], ...] = ()
    """Pairs of variants (or the base) whose paired difference is reported."""

    @field_validator("differences")
    @classmethod
    def _no_repeats(cls, differences: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys(differences))

    @abstractmethod
    def tasks(self) -> Iterator[Task]:
        """Yield every cell, in the order in which they are run."""

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError for what cannot be, or would be no fair comparison."""


StudyT = TypeVar("StudyT", bound=Study)


def check_differences(differences: Sequence[tuple[str, str]], variants: Collection[str]) -> None:
    """Raise ConfigError for a difference of what is no variant."""
    for names in differences:
        for name in names:
            if name not in variants:
                raise ConfigError(
                    f"differences names {name!r}, which is no variant.{did_you_mean(name, variants)}"
                )


def open_records(study: Settings, kind: str, out: Path) -> JsonLines:
    """Open the study's records; raise ConfigError for the folder of another study."""
    out.mkdir(parents=True, exist_ok=True)
    text = f"kind: {kind}\n{recipes.dump(study)}"
    path = out / RECIPE
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{out} holds another study (its {path.name} differs). Choose another --out.")
    if not path.is_file():  # the recipe comes last: where it is, all is
        write_atomic(out / ENVIRONMENT, describe(None, sha256(text.encode())))
        write_atomic(path, text.encode())
    return JsonLines(out / RECORDS, out, repair="pixrl check {run} --repair")


@dataclass(frozen=True)
class Kind(Generic[StudyT]):
    """A kind of study: all that differs between them but their tables' layouts."""

    model: type[StudyT]
    """The class of its settings."""
    key: tuple[str, ...]
    """The fields of a record that name its cell."""
    cell: Callable[[StudyT, Task, Path], Record]
    """Runs and measures one cell; must be picklable."""
    finish: Callable[[StudyT, list[Record], Path], None]
    """Draws what the whole study shows once all of its cells are there."""
    tables: Callable[[StudyT, list[Record], Path], str]
    """Writes table.md, summary.json and charts of the records so far; returns the Markdown."""
    say_every: int = 1
    """The number of cells between two lines on standard error."""


def run_grid(
    kind: Kind[StudyT], study: StudyT, out: Path, *, workers: Workers = HERE, quiet: bool = False
) -> list[Record]:
    """Run the cells that are not yet recorded in `out`; return all records.

    Args:
        kind: of the study.
        study: its settings.
        out: its folder.
        workers: where the cells are run.
        quiet: say nothing on standard error.

    Raises:
        ConfigError: the variants cannot be compared, or `out` holds another study.
        RunError: a run had to stop, or there is no such cluster.
    """
    study.check()
    log = open_records(study, study.kind, out)
    done = {tuple(row[name] for name in kind.key) for row in log.read()}
    todo = [task for task in study.tasks() if task not in done]
    begun = time.monotonic()
    work = partial(_work, kind.cell, kind.model, study.model_dump_json(), out)
    for number, record in enumerate(workers.each(work, todo), 1):
        log.append([record])
        if not quiet and (number % kind.say_every == 0 or number == len(todo)):
            left = (time.monotonic() - begun) / number * (len(todo) - number)
            print(
                f"{len(done) + number}/{len(done) + len(todo)} runs, {left / 60:.1f} min left",
                file=sys.stderr,
            )
    records = log.read()
    kind.finish(study, records, out)
    return records


def _work(
    cell: Callable[[StudyT, Task, Path], Record], model: type[StudyT], study_json: str, out: Path, task: Task
) -> Record:
    return cell(_parse(model, study_json), task, out)


@cache
def _parse(model: type[StudyT], study_json: str) -> StudyT:
    return model.model_validate_json(study_json)
