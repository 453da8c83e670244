"""What every study shares: a folder of records that a broken-off study goes on with, and processes that fill it."""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

from pixrl import config as recipes
from pixrl.config import Settings
from pixrl.errors import ConfigError, PixrlError, did_you_mean
from pixrl.runs.check import RECORDS
from pixrl.runs.environment import describe
from pixrl.runs.files import sha256, write_atomic
from pixrl.runs.folder import JsonLines

RECIPE, ENVIRONMENT = "recipe.yaml", "environment.json"
Record = dict[str, Any]
TaskT = TypeVar("TaskT", bound=Hashable)
StudyT = TypeVar("StudyT", bound=Settings)


def check_differences(differences: Sequence[tuple[str, str]], variants: Collection[str]) -> None:
    """ConfigError for a difference of what is no variant."""
    for names in differences:
        for name in names:
            if name not in variants:
                raise ConfigError(
                    f"differences names {name!r}, which is no variant.{did_you_mean(name, variants)}"
                )


def open_records(study: Settings, kind: str, out: Path) -> JsonLines:
    """The study's records. ConfigError for the folder of another study."""
    out.mkdir(parents=True, exist_ok=True)
    text = f"kind: {kind}\n{recipes.dump(study)}"
    path = out / RECIPE
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{out} holds another study (its {path.name} differs). Choose another --out.")
    if not path.is_file():  # the recipe comes last: where it is, all is
        write_atomic(out / ENVIRONMENT, describe(None, sha256(text.encode())))
        write_atomic(path, text.encode())
    return JsonLines(out / RECORDS, out, repair="pixrl check {run} --repair")


def run_tasks(
    log: JsonLines,
    tasks: Sequence[TaskT],
    task_of: Callable[[Mapping[str, Any]], TaskT],
    work: Callable[[TaskT], Record],
    *,
    workers: int,
    quiet: bool,
    say_every: int = 10,
) -> list[Record]:
    """Does the tasks that are not yet recorded; returns all records.

    Args:
        log: the records so far.
        tasks: all of the study.
        task_of: which task a record is of.
        work: one task to its record; with more than one worker it must be picklable.
        workers: processes, one thread each; with one, everything happens in this process.
        quiet: say nothing on standard error.
        say_every: tasks between two lines.
    """
    done = {task_of(row) for row in log.read()}
    todo = [task for task in tasks if task not in done]
    begun = time.monotonic()
    for number, record in enumerate(_records(todo, work, workers), 1):
        log.append([record])
        if not quiet and (number % say_every == 0 or number == len(todo)):
            left = (time.monotonic() - begun) / number * (len(todo) - number)
            print(
                f"{len(done) + number}/{len(done) + len(todo)} runs, {left / 60:.1f} min left",
                file=sys.stderr,
            )
    return log.read()


def _records(todo: Sequence[TaskT], work: Callable[[TaskT], Record], workers: int) -> Iterator[Record]:
    if workers <= 1:
        for task in todo:
            yield work(task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(work, task) for task in todo]
        for future in as_completed(futures):
            yield future.result()


def study_command(
    module: str,
    description: str | None,
    kind: str,
    model: type[StudyT],
    run: Callable[[StudyT, Path, int], list[Record]],
    tables: Callable[[StudyT, list[Record], Path], str],
    arguments: Sequence[str] | None,
) -> int:
    """The command line of a study; the exit code.

    Args:
        module: as in `python -m MODULE`.
        description: what `--help` begins with.
        kind: of the recipe.
        model: its settings.
        run: study, folder, workers -> all records.
        tables: study, records, folder -> the Markdown that is printed; writes its files.
        arguments: of the command; None: the process's.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, or a name under recipes/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--table", action="store_true", help="only write the tables of the records so far")
    given = parser.parse_args(arguments)
    try:
        study = recipes.load(model, given.recipe, given.set, kind=kind)
        records = (
            open_records(study, kind, given.out).read()
            if given.table
            else run(study, given.out, given.workers)
        )
        print(tables(study, records, given.out))
    except PixrlError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0
