#!/usr/bin/env python3
"""Makes the pictures of docs/vote.md: the page of `pixrl vote toy/vote`, on a desk and on a phone. It needs chromium.

.venv/bin/python tools/vote_page.py
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def main() -> None:
    """Begins a run, votes once, and takes the pictures."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pixrl", "vote", "toy/vote", "--port", "0", "--out", f"{place}/run"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert process.stdout is not None
            lines = (re.search(r"http://\S+/v/\S+", line) for line in process.stdout)
            _photograph(next(found[0] for found in lines if found))
        finally:
            process.kill()
            process.wait()


def _photograph(link: str) -> None:
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width, height, group in (("vote", 1100, 560, 2), ("vote_phone", 390, 660, 3)):
            tab = chromium.new_page(viewport={"width": width, "height": height})
            tab.goto(link)
            tab.locator(".pick").nth(0).wait_for(timeout=300_000)
            tab.keyboard.press("1")
            tab.locator("#count", has_text=f"group {group} /").wait_for()
            tab.mouse.move(0, 0)
            tab.wait_for_load_state("networkidle")
            tab.wait_for_timeout(300)
            tab.screenshot(path=IMAGES / f"{name}.png")
        chromium.close()


if __name__ == "__main__":
    main()
