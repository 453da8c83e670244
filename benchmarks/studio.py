"""How long the studio's page of a large run takes: to open, and to bring up to date after another step.

    .venv/bin/python -m benchmarks.studio [ROWS]

A synthetic alignment of ROWS manifest rows (10,000) is opened by the functions of the page, and by chromium where there
is one. What watching costs a run that trains on the same core is the share of a look in the time between two looks.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.align.synthetic import run_folder, settings

from pixrl.runs.folder import RunFolder
from pixrl.studio.app import EVERY, Studio, launch
from pixrl.studio.folders import RunData, Runs
from pixrl.studio.pages import AT_ONCE, RunPage, orders_of, run_list

GROUPS, SIZE = 2, 12
"""Groups of a step and pictures of a group in the synthetic run."""


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def show(page: RunPage, data: RunData) -> None:
    """Make all parts of a page."""
    run_list([data], data.name)
    for part in (page.head, page.rewards, page.group, page.learning):
        part(data)
    page.pairs(data, orders_of(data)[0], AT_ONCE)


def in_browser(root: Path) -> float | None:
    """Return the seconds from asking for the address until the last part stands; None without chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    studio = Studio(root)
    url = launch(studio, "127.0.0.1", 0, None)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def open_page() -> None:
            tab.goto(url)
            tab.locator(".pairs figure").first.wait_for()

        found = []
        for _ in range(3):
            studio.runs = Runs(root)  # as if it were started anew
            studio.__dict__["_pages"].clear()
            tab = browser.new_page()
            found.append(seconds(open_page))
            tab.close()
        browser.close()
    studio.page.close()
    return statistics.median(found)


def main(rows: int = 10_000) -> None:
    """Print the seconds."""
    steps = -(-rows // (GROUPS * SIZE))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folder = run_folder(root / "run", settings(steps=steps + 40), done=steps, evaluated=(0, steps))
        runs, page = Runs(root), RunPage()
        first = seconds(lambda: show(page, runs.look("run")))
        print(f"{len(runs.look('run').manifest)} rows, {steps} steps")
        print(f"opened by the page's functions: {first:.2f} s")
        looks = [seconds(lambda: show(page, runs.look("run"))) for _ in range(20)]
        print(f"a look at an unchanged run: {1000 * statistics.median(looks):.1f} ms")
        updates = []
        for step in range(steps, steps + 20):
            RunFolder(folder.path, "align").log(step, {"reward/geneval/mean": 0.5, "group_std": 0.1})
            updates.append(seconds(lambda: show(page, runs.look("run"))))
        update = statistics.median(updates)
        print(f"a look after another step: {1000 * update:.0f} ms, {100 * update / EVERY:.1f} % of one core")
        if (whole := in_browser(root)) is not None:
            print(f"in chromium, from the address to the last picture: {whole:.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
