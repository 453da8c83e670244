"""Durable files: what was written before a crash or on a full disk is either whole or not there at all."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from pixrl.errors import RunError

FULL = {errno.ENOSPC, errno.EDQUOT}
KEPT = "Nothing saved before it is lost"
RESUME = "go on with `pixrl resume` and the run's folder."
LACKS = {
    errno.EFBIG: "no file may be so big here (ulimit -f, or the file system)",
    errno.EMFILE: "this process may open no more files (ulimit -n)",
    errno.ENFILE: "this machine can open no more files",
    errno.ENOMEM: "there is no memory left",
}
"""What a machine can run out of besides room on its disk, in words, by error number."""
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
"""How torch words that memory ran out, in a RuntimeError."""
TEMPORARY = re.compile(r"\..+\.\d+\.(tmp|new|old)")
"""Names of files and folders that are not yet, or no longer, in place; the number is the process id."""


@contextlib.contextmanager
def disk_guard(path: Path, needed: int) -> Iterator[None]:
    """Turn a full disk, or anything else of `LACKS` that runs out while `path` is written, into a RunError.

    `needed`: the size of what is written, in bytes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(path, needed) from None
        if error.errno not in LACKS:
            raise
        raise RunError(
            f"{path} ({megabytes(needed)}) cannot be written: {LACKS[error.errno]}. {KEPT}; raise the limit, then "
            f"{RESUME}"
        ) from None


@contextlib.contextmanager
def resource_guard(path: Path) -> Iterator[None]:
    """Turn a lack of memory, file handles or disk anywhere in a job of the run at `path` into a RunError."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        lack = what_lacks(error)
        if lack is None:
            raise
        raise RunError(
            f"{path} had to stop: {lack}. Nothing saved before is lost; make room, or take smaller batches, then type: "
            f"pixrl resume {path}"
        ) from error


def what_lacks(error: BaseException) -> str | None:
    """Say what of the machine ran out, according to an error; None for any other error."""
    if isinstance(error, OSError):
        return "the disk is full" if error.errno in FULL else LACKS.get(error.errno or 0)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return LACKS[errno.ENOMEM]
    return None


def disk_full(path: Path, needed: int) -> RunError:
    """Make the RunError for a disk without room for the `needed` bytes of `path`."""
    free = free_bytes(path)
    return RunError(
        f"The disk is full: {path} needs {megabytes(needed)}, {megabytes(free)} are free. {KEPT}; make room, then "
        f"{RESUME}"
    )


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds, or will hold, `path`."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(place).free


def megabytes(count: int) -> str:
    """Format a number of bytes as kB or MB."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def write_durable(path: Path, content: bytes) -> None:
    """Write a file and wait until its content is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of `content`, of which one `os.write` may take only a part."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomic(path: Path, content: bytes, *, sync_folder: bool = True) -> None:
    """Write a file beside `path`, sync it and rename it: `path` holds the old content or the new, never a part."""
    write_all_atomic({path: content})
    if sync_folder:
        fsync_folder(path.parent)


def write_all_atomic(contents: Mapping[Path, bytes]) -> None:
    """Write several files as `write_atomic` does. Their names are durable only after `fsync_folder`."""
    beside = {path: temporary(path, "tmp") for path in contents}
    try:
        for path, content in contents.items():
            with disk_guard(path, len(content)):
                write_durable(beside[path], content)
        for path in contents:
            os.replace(beside[path], path)
    finally:
        for written in beside.values():
            written.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder (new files, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`, and delete what `path` held."""
    old = temporary(path, "old")
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    fsync_folder(path.parent)
    if old.exists():
        shutil.rmtree(old)


def temporary(path: Path, suffix: str) -> Path:
    """Return the name that this process gives `path` while it is made (tmp, new) or removed (old)."""
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def discard(path: Path) -> None:
    """Remove a folder: rename it first, so that it is gone at once; a kill in between leaves only a leftover."""
    gone = temporary(path, "old")
    os.rename(path, gone)
    shutil.rmtree(gone)


def leftovers(folder: Path) -> list[Path]:
    """List what killed processes left below a folder: half-written files, and folders half removed."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        left = [name for name in (*folders, *files) if TEMPORARY.fullmatch(name)]
        found += [Path(place, name) for name in left]
        folders[:] = [name for name in folders if name not in left]
    return sorted(found)


def leftovers_beside(path: Path) -> list[Path]:
    """List what processes that were killed while they made or replaced `path` left beside it."""
    own = re.compile(rf"\.{re.escape(path.name)}\.\d+\.(tmp|new|old)")
    if not path.parent.is_dir():
        return []
    return sorted(entry for entry in path.parent.iterdir() if own.fullmatch(entry.name))


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of some bytes as hex digits."""
    return hashlib.sha256(content).hexdigest()
