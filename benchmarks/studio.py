"""How long the studio's page of a large run takes, to open and to bring up to date, and what watching costs a training.

    .venv/bin/python -m benchmarks.studio [ROWS]
    .venv/bin/python -m benchmarks.studio watch

A synthetic alignment of ROWS manifest rows (10,000) is opened by the functions of the page, in seconds of the
processor, and by chromium where there is one, in seconds by the clock beside those of an empty page of Gradio. With
`watch`, toy trainings take turns with and without a studio that shows them in chromium, which it needs.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from tests.align.synthetic import run_folder, settings

from pixrl.runs.folder import MANIFEST, RunFolder
from pixrl.studio.app import Studio, launch
from pixrl.studio.folders import RunData, Runs
from pixrl.studio.pages import AT_ONCE, RunPage, orders_of, run_list

GROUPS, SIZE = 2, 12
"""Groups of a step and pictures of a group in the synthetic run."""


def seconds(call: Callable[[], object]) -> float:
    """Return the processor's seconds of a call."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def show(page: RunPage, data: RunData) -> None:
    """Make all parts of a page."""
    run_list([data], data.name)
    for part in (page.head, page.rewards, page.group, page.learning):
        part(data)
    page.pairs(data, orders_of(data)[0], AT_ONCE)


def in_browser(root: Path) -> tuple[float, float] | None:
    """Return the seconds from asking for the address until the last part stands, of an empty page and of the run's.

    None without chromium.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    with gr.Blocks() as empty:
        gr.HTML('<p class="last">empty</p>')
    _, nothing, _ = empty.launch(prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    found: dict[str, list[float]] = {}
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(5):
            studio = Studio(root)  # which has seen nothing yet
            url = launch(studio, "127.0.0.1", 0, None)
            for address, last in ((nothing, ".last"), (url, ".pairs figure")):
                tab = browser.new_page()
                begun = time.perf_counter()
                tab.goto(address)
                tab.locator(last).first.wait_for()
                found.setdefault(last, []).append(time.perf_counter() - begun)
                tab.close()
            studio.page.close(verbose=False)
        browser.close()
    empty.close(verbose=False)
    return statistics.median(found[".last"]), statistics.median(found[".pairs figure"])


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
        print(f"a look after another step: {1000 * update:.0f} ms")
        if (found := in_browser(root)) is not None:
            print(
                f"in chromium, from the address to the last picture: {found[1]:.2f} s; an empty page {found[0]:.2f} s"
            )


def steps_of(run: Path, steps: int, *, begun: Callable[[], object] = lambda: None) -> list[float]:
    """Train for some steps in a process of its own; return the seconds of each but the first two.

    `begun` is called once the run has a folder, in the first step, which also loads.
    """
    settings = ["prompts.per_step=1", "evaluation.every=null", "evaluation.prompts=4"]
    words = ["align", "toy/diffusion-nft", "--steps", str(steps), "--out", str(run)]
    words += [part for setting in settings for part in ("--set", setting)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "pixrl", *words], env=environment, **quiet) as training:
        while not (run / MANIFEST).exists() and training.poll() is None:
            time.sleep(0.1)
        begun()
    rows = RunFolder.open(run).metrics()[2:]
    return [sum(x for name, x in row.items() if name.startswith("seconds/")) for row in rows]


def watch(turns: int = 2, steps: int = 20) -> None:
    """Print the median seconds of a training step without the studio and with it, and their ratio."""
    from playwright.sync_api import sync_playwright

    found: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as place, sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        root = Path(place)
        for turn in range(turns):
            found[False] += steps_of(root / f"alone-{turn}", steps)
            studio, tab = Studio(root), browser.new_page()
            url = launch(studio, "127.0.0.1", 0, None)
            name = f"watched-{turn}"
            found[True] += steps_of(root / name, steps, begun=partial(tab.goto, f"{url}?run={name}"))
            tab.locator("h1", has_text=name).wait_for()
            tab.close()
            studio.page.close(verbose=False)
        browser.close()
    alone, watched = (statistics.median(found[way]) for way in (False, True))
    print(
        f"a step alone {alone:.3f} s, watched {watched:.3f} s: {watched / alone - 1:+.1%} "
        f"({len(found[True])} steps each)"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["watch"]:
        watch()
    else:
        main(*map(int, sys.argv[1:]))
