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
from typing import Any

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
REPLACED = ".replaced"
CHILDREN = "runs"
"""Of a folder of fusions: the runs in it."""
RUN_KINDS = ("fuse", "fuse-compare", "fuse-pairs", "align", "personalize")
OWN_NAMES = {
    *(MARKER, RECIPE, ENVIRONMENT, REPLACED, CHILDREN, "metrics.jsonl", "evaluations.jsonl", "rollouts", "samples"),
    *("checkpoints", "report.html", "start.json", "world.json", "selection.json", "failures.json", "exemplars"),
    *("tensorboard", "export"),
}  # fmt: skip
"""All that pixrl makes at the top of a run."""
_OF_SYSTEMS = {".DS_Store", "Thumbs.db", "desktop.ini", ".directory"}
"""What file managers leave."""


def make(
    path: Path, kind: str, files: Mapping[str, bytes], folders: Sequence[str], *, force: bool = False
) -> None:
    """Makes the folder of a new run with `files` and empty `folders` in it.

    A run that is there is refused, or with `force` set aside in the new one. Links are followed.

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


def require_free(path: Path, force: bool = False) -> None:
    """RunError where no run can begin at `path`: something is there that is not an old run, or one without `force`."""
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
    """Whether pixrl made this folder as a run: by its marker, or, of before there was one, its recipe and environment.

    A study's folder is none, though it has both, nor is one with a recipe of the user's own.
    """
    if _read_marker(path).get("made_by") == "pixrl":
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
    """Whether a folder is empty, or holds no more than a start that was killed at once leaves in it."""
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
    """What lies in a run and pixrl did not put there, at its top."""
    names = {entry.name for entry in path.iterdir() if not TEMPORARY.fullmatch(entry.name)}
    return sorted(names - OWN_NAMES - _OF_SYSTEMS)


def left_by_kills(path: Path) -> list[Path]:
    """What killed processes left in a run and beside it; never a run that was set aside."""
    beside = leftovers_beside(path.resolve())
    return [*leftovers(path), *(left for left in beside if not (left / REPLACED).exists())]


def has_saved(path: Path) -> bool:
    """Whether a run, or one of a folder of runs, has saved a step that can be gone on from."""
    places = (path, *(path / CHILDREN).glob("*"))
    return any(checkpoint.all_folders(place) for place in places)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[None]:
    """While a new run works: if it fails before its first saved step, the run that it replaced is put back."""
    try:
        yield
    except BaseException as error:
        if not (path / REPLACED).exists():
            raise
        if has_saved(path):
            drop_replaced(path)
            raise
        _put_back(path.resolve())
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(
                f"No step of the new run is saved, so {path} holds the run again that was there before."
            ) from error
        raise


def drop_replaced(path: Path) -> None:
    """Removes the run that `path` replaced, if there is one."""
    if (path / REPLACED).exists():
        discard(path / REPLACED)


def finish_replacing(path: Path) -> None:
    """Ends what a kill broke off between setting an old run aside and putting the new one in its place."""
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


def _put_back(path: Path) -> None:
    failed = temporary(path, "new")
    os.rename(path, failed)
    os.rename(failed / REPLACED, path)
    fsync_folder(path.parent)
    shutil.rmtree(failed)


def _read_marker(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
