#!/usr/bin/env python3
"""Makes the pictures of docs/studio.md: the studio over a folder of runs, as a browser shows it.

    .venv/bin/python tools/studio_pages.py RUNS FIRST SECOND

RUNS is a folder of alignments, FIRST and SECOND are two of them. It needs chromium.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from pixrl.studio.app import Studio, launch
from pixrl.toy.vocabulary import KINDS

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def main(runs: str, first: str, second: str) -> None:
    """Serves the studio and takes the pictures."""
    studio = Studio(Path(runs), KINDS)
    url = launch(studio, "127.0.0.1", 0, None)
    with sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, query, size in (
            ("studio_run", f"run={first}", (1440, 2150)),
            ("studio_two", f"run={first}&beside={second}", (1440, 1010)),
        ):
            tab = chromium.new_page(viewport={"width": size[0], "height": size[1]})
            tab.goto(f"{url}?{query}")
            tab.locator(".pairs figure").first.wait_for()
            tab.wait_for_timeout(2500)
            _save(tab, name)
        tab = chromium.new_page(viewport={"width": 1440, "height": 820})
        tab.set_default_timeout(120_000)
        _fuse(tab, url)
        _save(tab, "studio_fuse")
        chromium.close()
    studio.page.close()


def _fuse(tab: Page, url: str) -> None:
    """Mixes three concepts, keeps one mixture, and asks for more like it."""
    tab.goto(url)
    tab.get_by_role("tab", name="Fuse").click()
    for concept in ("owl", "snail", "mushroom"):
        tab.get_by_label("Concepts, two to four").fill(concept)
        tab.get_by_role("option", name=concept, exact=True).click()
    tab.locator("h1, .shares", has_text="mushroom 33 %").wait_for()
    tab.keyboard.press("Escape")
    area = tab.locator(".pad .area").bounding_box()
    assert area is not None
    tab.mouse.click(area["x"] + 0.42 * area["width"], area["y"] + 0.6 * area["height"])
    tab.locator(".shares", has_text="owl 40 %").wait_for()
    tab.get_by_role("button", name="Keep").click()
    tab.locator("[data-list=kept]").wait_for()
    tab.get_by_role("button", name="More like this").click()
    tab.locator("[data-list=similar]").first.wait_for()


def _save(tab: Page, name: str) -> None:
    with Image.open(io.BytesIO(tab.screenshot())) as shot:
        shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            IMAGES / f"{name}.png", optimize=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
