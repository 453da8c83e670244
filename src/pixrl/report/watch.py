"""The report of a run of any kind: written once, or renewed while the run goes."""

import time
from collections.abc import Callable
from pathlib import Path

from pixrl.errors import CheckpointError
from pixrl.fusion.config import KIND as FUSE
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs import fuse_many
from pixrl.report.align import write_align_report
from pixrl.report.fuse import write_fuse_report, write_many_report
from pixrl.runs.config import KINDS
from pixrl.runs.folder import EVALUATIONS, MANIFEST, METRICS, RunFolder
from pixrl.runs.place import CHILDREN
from pixrl.runs.process import process_of
from pixrl.runs.reading import evaluations, read_shape

EVERY = 5.0
"""Seconds between two looks at a run."""
SHARE = 10
"""A page that takes long to make is made at most for one part in so many of the time: the run needs the processor."""
PATIENCE = 3
"""Looks in a row at which a run may be unreadable, since its process is writing."""


def write_report(run: Path, refresh: float | None = None) -> Path:
    """Write the report of a run as it stands, and return the page's path.

    Args:
        run: the folder of an alignment, a personalization, a fusion or a list of fusions.
        refresh: the page loads itself again after so many seconds; None: never.

    Raises:
        RunError: it is no run, or a fusion without pictures.
        CheckpointError: its logs or its recipe are damaged.
    """
    kind = RunFolder.at(run).kind
    if kind in KINDS:
        return write_align_report(run, refresh)
    if kind == FUSE:
        return write_fuse_report(fuse_job.as_it_stands(run), refresh)
    return write_many_report(fuse_many.finished_runs(run), refresh)


def watch(run: Path, say: Callable[[str], None], every: float = EVERY) -> Path:
    """Renew a run's report until the run is finished, and return the page's path.

    The page loads itself again meanwhile; the last one does not, also where Ctrl-C ends the watching.

    Args:
        run: the run's folder.
        say: tells the user where the page is, and why nothing happens.
        every: seconds between two looks.
    """
    folder = RunFolder.at(run)
    seen, pause, failed, waits = -1, every, 0, False
    try:
        while not is_finished(folder):
            size = _size(folder.path)
            if size != seen and size:
                begun = time.monotonic()
                try:
                    page = write_report(folder.path, pause)
                    if seen == -1:
                        say(f"Watching: {page} (Ctrl-C ends it; the run goes on)")
                    seen, failed = size, 0
                except (OSError, CheckpointError):
                    failed += 1
                    if failed == PATIENCE:
                        raise
                pause = max(every, SHARE * (time.monotonic() - begun))
            if folder.kind in (*KINDS, FUSE) and process_of(folder.path) is None and not waits:
                say(f"No process trains {run} now. It goes on with: pixrl resume {run}")
                waits = True
            time.sleep(pause)
    finally:
        if _size(folder.path):
            write_report(folder.path)
    return folder.report_path


def is_finished(folder: RunFolder) -> bool:
    """Return whether a run has done all its steps and its process has ended."""
    if folder.kind not in (*KINDS, FUSE):
        _, config = fuse_many.open_many(folder.path)
        failed = fuse_many.read_failures(folder)
        places = {name: folder.path / CHILDREN / name for name, _ in config.children()}
        return all(name in failed or (at / fuse_job.SELECTION).is_file() for name, at in places.items())
    if process_of(folder.path) is not None:
        return False
    if folder.kind == FUSE:
        return (folder.path / fuse_job.SELECTION).is_file()
    steps = read_shape(folder).steps
    return len(folder.metrics()) >= steps and any(row["step"] == steps for row in evaluations(folder.path))


def _size(run: Path) -> int:
    """Return the size of all logs of a run, which grows as it goes; 0 where nothing is to be shown yet."""
    places = [run, *(run / CHILDREN).glob("*")]
    logs = [place / name for place in places for name in (METRICS, EVALUATIONS, MANIFEST, fuse_job.SELECTION)]
    return sum(log.stat().st_size for log in logs if log.is_file())
