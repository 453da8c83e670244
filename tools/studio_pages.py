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
from playwright.sync_api import sync_playwright

from pixrl.studio.app import Studio, launch

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def main(runs: str, first: str, second: str) -> None:
    """Serves the studio and takes the pictures."""
    studio = Studio(Path(runs))
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
            with Image.open(io.BytesIO(tab.screenshot())) as shot:
                shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
                    IMAGES / f"{name}.png", optimize=True
                )
        chromium.close()
    studio.page.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
