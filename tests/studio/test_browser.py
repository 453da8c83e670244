"""The page in a real browser: Debian's chromium, driven by playwright; skipped where one of them is missing."""

from pathlib import Path
from typing import Any

from PIL import Image

from pixrl.runs.folder import ManifestRow, RunFolder
from pixrl.runs.process import attending
from pixrl.studio.app import Studio, launch


def test_runs_are_seen_live_side_by_side_enlarged_and_stopped(browser: Any, root: Path) -> None:
    studio = Studio(root)
    url = launch(studio, "127.0.0.1", 0, None)
    try:
        tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        tab.set_default_timeout(60_000)
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{url}?run=done")
        tab.locator("h1", has_text="done").wait_for()
        tab.locator(".badge.finished").wait_for()
        assert tab.locator(".run").count() == 2 and tab.locator(".pairs figure").count() == 6

        tab.locator(".pairs figure").first.click()
        tab.wait_for_selector("dialog[open] img")
        assert tab.locator("dialog img").count() == 2
        first = tab.inner_text("dialog .text")
        tab.keyboard.press("ArrowRight")
        tab.wait_for_function(
            "text => document.querySelector('dialog .text').textContent !== text", arg=first
        )
        tab.keyboard.press("Escape")
        tab.wait_for_selector("dialog", state="hidden")

        with attending(root / "half") as attendance:
            tab.click("[data-run=half]")
            tab.locator("h1", has_text="half").wait_for()
            tab.locator(".badge.running").wait_for()
            tab.evaluate("window.stays = true")
            folder = RunFolder.open(root / "half")
            folder.append_manifest([ManifestRow(index=288, step=12, prompt="a red owl", seed=1, file=None)])
            folder.log(12, {"reward/geneval/mean": 0.875, "seconds/collect": 1.0})
            tab.locator(".figures b", has_text="0.875").wait_for()
            tab.get_by_text("13 of 40 steps").first.wait_for()
            assert tab.evaluate("window.stays")  # updated without reloading
            tab.get_by_role("button", name="Stop").first.click()
            tab.locator(".badge.stopping").wait_for()
            assert attendance.stop_is_wanted()
        tab.locator(".badge.stopped").wait_for()
        tab.get_by_role("button", name="Resume", disabled=False).wait_for()

        (root / "half" / "environment.json").unlink()
        tab.locator(".card.warn", has_text="environment.json missing").wait_for()
        tab.goto(f"{url}?run=done&beside=half")
        tab.locator("h1", has_text="half").wait_for()
        assert tab.locator("h1", has_text="done").is_visible()
        assert str(root) not in tab.content() and str(root) not in " ".join(asked)
        assert all(
            one.startswith((url, "data:", "blob:")) for one in asked
        )  # nothing is asked of anybody else
    finally:
        studio.page.close()


def test_frames_are_few_while_nobody_touches_the_page(browser: Any, root: Path) -> None:
    """And all of them again once somebody does; either way each is drawn, unless it is taken back."""
    studio = Studio(root)
    url = launch(studio, "127.0.0.1", 0, None)
    try:
        tab = browser.new_page()
        tab.set_default_timeout(60_000)
        page = tab.goto(f"{url}?run=done").text()
        assert 0 < page.find("Gradio's page asks for sixty frames") < page.find('<script type="module"')
        tab.locator("h1", has_text="done").wait_for()
        is_slow = "requestAnimationFrame(() => {}) < 0"
        tab.wait_for_function(is_slow)
        assert tab.evaluate("new Promise((done) => requestAnimationFrame(() => done(true)))")
        assert (
            tab.evaluate(
                "new Promise((done) => { let n = 0; cancelAnimationFrame(requestAnimationFrame(() => n++));"
                "requestAnimationFrame(() => requestAnimationFrame(() => done(n))); })"
            )
            == 0
        )
        tab.mouse.move(100, 100)
        assert not tab.evaluate(is_slow)
        assert tab.evaluate("new Promise((done) => requestAnimationFrame(() => done(true)))")
    finally:
        studio.page.close()


def test_a_mixture_follows_the_pad_and_is_kept(browser: Any, root: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), "orange").save(photo)
    studio = Studio(root, ("owl", "snail", "mushroom"), "toy:flux")  # which draws at any size
    url = launch(studio, "127.0.0.1", 0, None)
    try:
        tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        tab.set_default_timeout(60_000)
        tab.goto(url)
        tab.get_by_role("tab", name="Fuse").click()
        for concept in ("owl", "snail"):
            tab.get_by_label("Concepts, two to four").fill(concept)
            tab.get_by_role("option", name=concept, exact=True).click()
        tab.locator(".shares", has_text="snail 50 %").wait_for()
        tab.keyboard.press("Escape")
        tab.locator(".pad.n2").press("ArrowRight")
        tab.locator(".shares", has_text="snail 55 %").wait_for()
        area = tab.locator(".pad .area").bounding_box()
        tab.mouse.click(area["x"] + 0.8 * area["width"], area["y"] + 4)
        tab.locator(".shares", has_text="snail 80 %").wait_for()
        tab.get_by_role("button", name="Keep").click()
        tab.locator("[data-list=kept]").wait_for()
        tab.get_by_role("button", name="Other noise").click()
        tab.locator(".mixture", has_text="noise 1").wait_for()
        tab.locator("[data-list=kept]").click()
        tab.locator(".mixture", has_text="noise 0").wait_for()
        with tab.expect_download() as saved:
            tab.locator(".mixture a").first.click()
        assert saved.value.suggested_filename == "owl-snail-0.png"
        width = "document.querySelector('.mixture img').naturalWidth"
        side = tab.evaluate(width)
        tab.get_by_role("button", name="Draw larger").click()
        tab.get_by_text(f"{2 * side} × {2 * side} pixels").wait_for()
        assert tab.evaluate(width) == 2 * side
        tab.get_by_role("button", name="For ComfyUI").click()
        with tab.expect_download() as saved:
            tab.get_by_role("link", name="Download the coefficients").click()
        assert saved.value.suggested_filename == "owl-snail-0.safetensors"
        tab.locator(".add input[type=file], input[type=file]").first.set_input_files(str(photo))
        tab.locator(".shares", has_text="photo.png 33 %").wait_for()
        assert str(root) not in tab.content() and str(photo.parent) not in tab.content()
    finally:
        studio.page.close()
