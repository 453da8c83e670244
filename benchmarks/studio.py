"""How long the studio's page of a large run takes, to open and to bring up to date, and what watching costs a training.

    .venv/bin/python -m benchmarks.studio [ROWS]
    .venv/bin/python -m benchmarks.studio watch [TURNS]

A synthetic alignment of ROWS manifest rows (10,000) is opened by the functions of the page, in seconds of the
processor, and by chromium where there is one, in seconds by the clock beside those of an empty page of Gradio. With
`watch`, a toy training is watched in chromium, which it needs, for every other few of its steps.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
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


def training(run: Path, steps: int) -> "subprocess.Popen[bytes]":
    """Begin a toy training in a process of its own, with one thread, whose steps all do the same work.

    Its reward is one that no two pictures share, since a group of equal rewards has nothing to learn from and its
    update is left out.
    """
    settings = ["prompts.per_step=1", "evaluation.every=null", "evaluation.prompts=4"]
    settings += ["rewards=[{name: preference, options: {model: 'toy:preference'}}]"]
    words = ["align", "toy/diffusion-nft", "--steps", str(steps), "--out", str(run)]
    words += [part for setting in settings for part in ("--set", setting)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", "pixrl", *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet
    )


def spent() -> float:
    """Return the processor's seconds so far of this process and of chromium."""
    own = psutil.Process()
    watching = [own, *(one for one in own.children(recursive=True) if "chrom" in one.name())]
    return sum(sum(one.cpu_times()[:2]) for one in watching)


def watch(turns: int = 20, steps: int = 8) -> None:
    """Print what watching costs the steps of one training, of which every other turn is watched.

    A turn is a few steps, whose first two do not count: in them the page opens, or the last one closes. Each watched
    turn is compared with the mean of its two neighbours, so that a machine that grows faster or slower meanwhile does
    not count either.
    """
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as place, sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        root = Path(place)
        run, tab = root / "run", browser.new_page()
        with training(run, (turns + 1) * steps):
            while not (run / MANIFEST).exists():
                time.sleep(0.1)
            studio = Studio(root)
            url = launch(studio, "127.0.0.1", 0, None)
            folder = RunFolder.open(run)
            shares = []
            for turn in range(turns + 1):
                tab.goto(f"{url}?run=run" if turn % 2 else "about:blank")
                while len(folder.metrics()) < turn * steps + 2:
                    tab.wait_for_timeout(200)
                begun, taken = time.perf_counter(), spent()
                while len(folder.metrics()) < (turn + 1) * steps:
                    tab.wait_for_timeout(200)
                shares.append((spent() - taken) / (time.perf_counter() - begun))
        studio.page.close(verbose=False)
        browser.close()
        rows = RunFolder.open(run).metrics()
    if any(row["zero_std_share"] for row in rows):
        raise RuntimeError("Some steps left their update out, so that steps cannot be compared.")
    seconds = [sum(x for name, x in row.items() if name.startswith("seconds/")) for row in rows]
    means = [statistics.median(seconds[at + 2 : at + steps]) for at in range(0, len(seconds), steps)]
    costs = [
        2 * means[turn] / (means[turn - 1] + means[turn + 1]) - 1 for turn in range(1, len(means) - 1, 2)
    ]
    share = statistics.median(shares[1::2]) - statistics.median(shares[::2])
    print(f"the studio and chromium take {share:.1%} of a core while they watch")
    spread = statistics.stdev(costs) / len(costs) ** 0.5
    print(
        f"a step alone {statistics.median(means[::2]):.3f} s; watched {statistics.mean(costs):+.1%} with a standard "
        f"error of {spread:.1%} ({len(costs)} watched turns of {steps - 2} steps)"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        watch(*map(int, sys.argv[2:]))
    else:
        main(*map(int, sys.argv[1:]))
