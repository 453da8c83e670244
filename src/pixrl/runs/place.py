"""Where a run lies: how its folder appears, what a `--force` may replace, and how that comes back.

A folder appears under its name with its marker, recipe and environment in it, so that there is no moment in which it
exists and cannot be gone on with. A run that is replaced is set aside inside the new one (`.replaced`) until the new
one has saved a step; if that one fails before, the old one is put back.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pixrl import config
from pixrl.errors import ConfigError, RunError
from pixrl.runs import checkpoint
from pixrl.runs.environment import version_of
from pixrl.runs.files import (
    TEMPORARY,
    discard,
    disk_guard,
    fsync_folder,
    leftovers,
    leftovers_beside,
    remove,
    temporary,
    write_atomic,
)

MARKER = "pixrl-run.json"
RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
PROCESS, STOP = "process.json", "stop.json"
"""What `process.py` writes while a run trains."""
REPLACED = ".replaced"
CHILDREN = "runs"
"""The folder of a comparison, or of a list of pairs, in which its fusions lie."""
RUN_KINDS = ("fuse", "fuse-compare", "fuse-pairs", "align", "personalize")
OWN_NAMES = {
    *(MARKER, RECIPE, ENVIRONMENT, REPLACED, CHILDREN, "metrics.jsonl", "evaluations.jsonl", "rollouts", "samples"),
    *("checkpoints", "report.html", "start.json", "world.json", "selection.json", "failures.json", "exemplars"),
    *("tensorboard", "wandb", "trackers.json", "export", PROCESS, STOP),
}  # fmt: skip
"""The names of all that pixrl makes at the top of a run's folder."""
_OF_SYSTEMS = {".DS_Store", "Thumbs.db", "desktop.ini", ".directory"}
"""The names of files that file managers leave in folders."""


def make(
    path: Path, kind: str, files: Mapping[str, bytes], folders: Sequence[str], *, force: bool = False
) -> None:
    """Make the folder of a new run with `files` and empty `folders` in it. Links are followed.

    An existing run is refused, or with `force` set aside inside the new one.

    Raises:
        RunError: the place is taken, or the disk is full; nothing has changed.
    """
    require_free(path, force)
    path = path.resolve()
    with disk_guard(path, sum(map(len, files.values()))):
        if path.is_dir() and is_blank(path):
            for left in _begun(path):
                remove(left)
            _fill(path, kind, files, folders)
            return
        new = temporary(path, "new")
        try:
            new.mkdir(parents=True)
            _fill(new, kind, files, folders)
            _swap(new, path)
        finally:
            if not (new / REPLACED).exists():
                shutil.rmtree(new, ignore_errors=True)


def free_place(below: Path, name: str) -> Path:
    """Return the place of this name below a folder, with a number behind it where it is taken."""
    number, place = 1, below / name
    while place.exists():
        number += 1
        place = below / f"{name}-{number}"
    return place


def require_free(path: Path, force: bool = False) -> None:
    """Check that a run can begin at `path`.

    Raises:
        RunError: something is there that is no run, or a run without `force` or with files in it that are not pixrl's.
    """
    path = Path(path).absolute()
    finish_replacing(path)
    if not path.exists() or (path.is_dir() and is_blank(path)):
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file; --out names the run's folder. Choose another.")
    if not is_run(path):
        raise RunError(
            f"{path} exists and is no run of pixrl, so nothing in it is replaced. Choose another --out."
        )
    if not force:
        raise RunError(
            f"{path} already holds a run. Go on with it: pixrl resume {path}. Replace it: add --force. "
            f"Or choose another --out."
        )
    others = foreign(path)
    if others:
        raise RunError(
            f"{path} also holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, which pixrl did not "
            "make, so it is not replaced. Move that away, or choose another --out."
        )


def is_run(path: Path) -> bool:
    """Return whether pixrl made this folder as a run, by its marker or, in older runs, its recipe and environment.

    A study's folder is no run, though it has both, nor is a folder with a recipe of the user's own.
    """
    with contextlib.suppress(OSError, ValueError):
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        if isinstance(marker, dict) and marker.get("made_by") == "pixrl":
            return True
    try:
        recipe = config.parse_yaml((path / RECIPE).read_text(encoding="utf-8"), RECIPE)
        environment = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError):
        return False
    return (
        isinstance(recipe, dict)
        and recipe.get("kind") in RUN_KINDS
        and isinstance(environment, dict)
        and "recipe_sha256" in environment
    )


def is_blank(path: Path) -> bool:
    """Return whether a folder is empty, or holds no more than a start that was killed at once leaves in it."""
    left = set(_begun(path))
    names = {entry.name for entry in path.iterdir() if entry not in left} - _OF_SYSTEMS
    begun = {MARKER, RECIPE, ENVIRONMENT}
    if not names or names >= begun or MARKER not in names:
        return not names
    files = (file for file in path.rglob("*") if not file.is_dir() and file not in left)
    return all(str(file.relative_to(path)) in begun for file in files)


def _begun(path: Path) -> list[Path]:
    """Halves of the first files of a run."""
    begins = tuple(f".{name}." for name in (MARKER, RECIPE, ENVIRONMENT))
    return [e for e in path.iterdir() if TEMPORARY.fullmatch(e.name) and e.name.startswith(begins)]


def foreign(path: Path) -> list[str]:
    """List the names at the top of a run's folder that pixrl did not make."""
    names = {entry.name for entry in path.iterdir() if not TEMPORARY.fullmatch(entry.name)}
    return sorted(names - OWN_NAMES - _OF_SYSTEMS)


def left_by_kills(path: Path) -> list[Path]:
    """List what killed processes left in a run and beside it; never a run that was set aside."""
    beside = leftovers_beside(path.resolve())
    return [*leftovers(path), *(left for left in beside if not (left / REPLACED).exists())]


def has_saved(path: Path) -> bool:
    """Return whether a run, or one of a folder of runs, has a checkpoint to go on from."""
    places = (path, *(path / CHILDREN).glob("*"))
    return any(checkpoint.all_folders(place) for place in places)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[None]:
    """Put the replaced run back where the new one fails in the `with` block before its first saved step."""
    try:
        yield
    except BaseException as error:
        if not (path / REPLACED).exists():
            raise
        if has_saved(path):
            drop_replaced(path)
            raise
        place = path.resolve()
        failed = temporary(place, "new")
        os.rename(place, failed)
        os.rename(failed / REPLACED, place)
        fsync_folder(place.parent)
        shutil.rmtree(failed)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(
                f"No step of the new run is saved, so {path} holds the run again that was there before."
            ) from error
        raise


def drop_replaced(path: Path) -> None:
    """Delete the run that `path` replaced, if there is one."""
    if (path / REPLACED).exists():
        discard(path / REPLACED)


def finish_replacing(path: Path) -> None:
    """Put the new folder in place where a kill came between setting the old run aside and doing so."""
    path = path.resolve()
    if os.path.lexists(path):
        return
    for half in leftovers_beside(path):
        if (half / REPLACED).is_dir():
            os.rename(half, path)
            fsync_folder(path.parent)
            return


def _fill(place: Path, kind: str, files: Mapping[str, bytes], folders: Sequence[str]) -> None:
    marker = {"made_by": "pixrl", "version": version_of("pixrl"), "kind": kind}
    write_atomic(place / MARKER, (json.dumps(marker) + "\n").encode())
    for name in folders:
        (place / name).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(place / name, content)


def _swap(new: Path, path: Path) -> None:
    """Puts the folder `new` in the place of `path`, which is set aside in it.

    At each moment either `path` is there, or a folder beside it that holds what was set aside (`finish_replacing`).
    """
    if has_saved(path):
        drop_replaced(path)
    if (path / REPLACED).exists():  # a new run that saved nothing is dropped; what it replaced waits on
        old = temporary(path, "old")
        os.rename(path, old)
        os.rename(old / REPLACED, new / REPLACED)
        os.rename(new, path)
        shutil.rmtree(old)
    elif path.exists():
        try:
            os.rename(path, new / REPLACED)
        except OSError as error:
            raise RunError(f"{path} cannot be replaced ({error.strerror}). Choose another --out.") from None
        os.rename(new, path)
    else:
        os.rename(new, path)
    fsync_folder(path.parent)
    for left in left_by_kills(path):
        remove(left)
