"""Durable files: what was written before a crash or on a full disk is either whole or not there at all."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from pixrl.errors import RunError

FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def disk_guard(path: Path, needed: int) -> Iterator[None]:
    """Turns a full disk into a RunError that says how much `path` needed and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_full(path, needed) from None


def disk_full(path: Path, needed: int) -> RunError:
    """The error for a full disk."""
    free = free_bytes(path)
    return RunError(
        f"The disk is full: {path} needs {megabytes(needed)}, {megabytes(free)} are free. Nothing saved before it "
        f"is lost; make room, then go on with `pixrl resume` and the run's folder."
    )


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds (or will hold) `path`."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(place).free


def megabytes(count: int) -> str:
    """A size for people."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def write_durable(path: Path, content: bytes) -> None:
    """Writes a new file and waits until the disk has it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """`os.write` until nothing is left."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomic(path: Path, content: bytes, *, sync_folder: bool = True) -> None:
    """Writes beside, syncs, renames: `path` holds the old content or the new one, never a part."""
    write_all_atomic({path: content})
    if sync_folder:
        fsync_folder(path.parent)


def write_all_atomic(contents: Mapping[Path, bytes]) -> None:
    """`write_atomic` for several files at a time. Their names are durable after `fsync_folder`."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with disk_guard(path, len(content)):
                write_durable(beside[path], content)
        for path in contents:
            os.replace(beside[path], path)
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Makes names in a folder (new files, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, path: Path) -> None:
    """Puts the folder `new` in the place of `path`, whose old content goes."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    fsync_folder(path.parent)
    if old.exists():
        shutil.rmtree(old)


def sha256(content: bytes) -> str:
    """The hex digest that checksums are kept as."""
    return hashlib.sha256(content).hexdigest()
