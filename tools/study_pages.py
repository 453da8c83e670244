#!/usr/bin/env python3
"""Makes the pictures of docs/human_study.md: a study over fusion runs, with simulated voters, as a browser shows it.

    .venv/bin/python tools/study_pages.py RMLer=RUN mean=RUN random=RUN

The runs are folders of `pixrl fuse --pairs`. The voters are no people: they choose by the fusion reward, say anything
one time in five, and one of 24 always does. It needs chromium.
"""

import random
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from pixrl.human_study import report
from pixrl.human_study.make import make, parse_systems
from pixrl.human_study.results import compute
from pixrl.human_study.server import StudyServer
from pixrl.human_study.study import PRESETS, Comparison, Folder, StudySettings
from pixrl.human_study.votes import Vote, Votes

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
VOTERS, ERROR = 24, 0.2


def main(systems: list[str]) -> None:
    """Makes the study, lets the voters vote, and takes the pictures."""
    settings = StudySettings(title="Which creature works best?", criteria=PRESETS["rmler"].criteria)
    with tempfile.TemporaryDirectory() as place:
        folder = make(
            parse_systems(systems),
            settings,
            Path(place) / "study",
            participants=VOTERS + 1,
            only_matched=True,
        )
        with Votes(folder.votes) as votes:
            people = votes.participants()
            for who in people[:VOTERS]:
                choices = [_choice(folder, who.number, task) for task in who.tasks]
                votes.save(who.number, [Vote(k, "harmony", name, 3.0) for k, name in enumerate(choices)])
        results = compute(folder)
        report.write(folder, results, Path(place) / "out")
        print("\n".join(report.lines(results)))
        server = StudyServer(folder, port=0)
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            _photograph(f"{server.url}/s/{people[-1].token}", (Path(place) / "out" / report.PAGE).as_uri())
        finally:
            server.stop()
            thread.join()


def _choice(folder: Folder, number: int, task: Comparison) -> str:
    draw = random.Random(f"{number} {task}")
    if number == VOTERS - 1 or (task.check is None and draw.random() < ERROR):
        return draw.choice(task.pictures)
    if task.check is not None:
        return task.check
    return max(task.pictures, key=lambda name: folder.study.pictures[name].scores["reward"])


def _photograph(vote: str, results: str) -> None:
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width, height in (("human_study_vote", 1100, 720), ("human_study_phone", 390, 844)):
            tab = chromium.new_page(viewport={"width": width, "height": height})
            tab.goto(vote)
            tab.click("#start")
            tab.mouse.move(0, 0)
            tab.wait_for_load_state("networkidle")
            tab.wait_for_timeout(300)
            tab.screenshot(path=IMAGES / f"{name}.png")
        tab = chromium.new_page(viewport={"width": 1100, "height": 800})
        tab.goto(results)
        tab.screenshot(path=IMAGES / "human_study_results.png", full_page=True)
        chromium.close()


if __name__ == "__main__":
    main(sys.argv[1:])
