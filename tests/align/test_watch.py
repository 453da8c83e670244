"""`pixrl report RUN --watch`: renewed while a run goes, at rest at its end; and what a page does in a browser."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pixrl import cli
from pixrl.errors import CheckpointError, RunError
from pixrl.fusion.config import FuseConfig
from pixrl.jobs import fuse as fuse_job
from pixrl.report import watch as reports
from pixrl.report.align import write_align_report
from pixrl.runs.folder import RunFolder
from pixrl.runs.process import attending
from tests.align.synthetic import run_folder, settings
from tests.fuse.world import fake_world


def parts(whole: Path, run: Path, steps: int) -> None:
    """Let a run's folder be as it was after some steps of the whole run."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    folder = RunFolder.open(run)
    folder.truncate_metrics(steps)
    folder.truncate_manifest(sum(row.step < steps for row in folder.manifest()))
    if steps < 4:
        lines = (run / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
        (run / "evaluations.jsonl").write_bytes(lines[0])


def stepping(monkeypatch: pytest.MonkeyPatch, steps: list[Callable[[], None]]) -> list[float]:
    """Instead of sleeping, let the run go on by one of `steps`; returns the pauses."""
    left, pauses = iter(steps), list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        next(left)()

    monkeypatch.setattr(reports.time, "sleep", sleep)
    return pauses


def test_the_page_is_renewed_until_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_folder(tmp_path / "whole", settings(steps=4), done=4, evaluated=(0, 4)).path
    run, said, seen = tmp_path / "run", list[str](), list[str]()

    def after(steps: int) -> Callable[[], None]:
        def go_on() -> None:
            seen.append((run / "report.html").read_text(encoding="utf-8"))
            parts(whole, run, steps)

        return go_on

    parts(whole, run, 1)
    pauses = stepping(monkeypatch, [after(2), after(3), after(4)])
    page = reports.watch(run, said.append, every=0.5)
    assert [f"in {steps} of 4 steps" in one for steps, one in zip((1, 2, 3), seen, strict=True)] == [True] * 3
    assert all('<body data-refresh="' in one and "running" in one for one in seen)
    last = page.read_text(encoding="utf-8")
    assert "data-refresh" not in last and "http-equiv" not in last and 'badge good">finished' in last
    assert min(pauses) >= 0.5
    assert said[0].startswith(f"Watching: {run}/report.html")
    assert said[1:] == [f"No process trains {run} now. It goes on with: pixrl resume {run}"]


def test_a_page_that_takes_long_is_made_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run", settings(steps=4), done=1, evaluated=(0,)).path
    clock = iter([0.0, 3.0])

    def stop() -> None:
        raise KeyboardInterrupt

    pauses = stepping(monkeypatch, [stop])
    monkeypatch.setattr(reports.time, "monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):
        reports.watch(run, lambda text: None, every=0.5)
    assert pauses == [3.0 * reports.SHARE]


def test_ctrl_c_ends_the_watching_with_a_page_at_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path / "run", settings(steps=4), done=2, evaluated=(0,)).path

    def stop() -> None:
        assert "data-refresh" in (run / "report.html").read_text(encoding="utf-8")
        raise KeyboardInterrupt

    stepping(monkeypatch, [stop])
    with attending(run):
        done = CliRunner().invoke(cli.app, ["report", str(run), "--watch"])
    assert done.exit_code == 0, done.output
    assert f"Report: {run}/report.html" in done.output and "No process" not in done.output
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "data-refresh" not in page and "not finished" in page


def test_a_log_that_is_being_written_is_read_again_and_a_damaged_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_folder(tmp_path / "whole", settings(steps=4), done=4, evaluated=(0, 4)).path
    run = tmp_path / "run"
    parts(whole, run, 2)
    log = run / "metrics.jsonl"
    good = log.read_bytes()
    log.write_bytes(good.replace(b'"step": 0', b'"step": 9'))
    stepping(monkeypatch, [lambda: None, lambda: parts(whole, run, 4)])
    monkeypatch.setattr(reports, "is_finished", lambda folder: log.stat().st_size > len(good))
    assert "finished" in reports.watch(run, lambda text: None).read_text(encoding="utf-8")
    log.write_bytes(good.replace(b'"step": 0', b'"step": 9'))
    stepping(monkeypatch, [lambda: None] * reports.PATIENCE)
    with pytest.raises(CheckpointError, match="line 1: does not match its checksum"):
        reports.watch(run, lambda text: None)


def test_a_fusion_has_a_page_before_it_is_finished(tmp_path: Path) -> None:
    config = FuseConfig(concepts=("owl", "snail"), budget=24, batch=8, exemplars=2)
    run = fuse_job.start(config, tmp_path / "run", world=fake_world()).folder
    assert reports.is_finished(run)
    (run.path / fuse_job.SELECTION).unlink()
    run.truncate_manifest(8)
    assert not reports.is_finished(run)
    page = reports.write_report(run.path, 5.0).read_text(encoding="utf-8")
    assert "8 of 24 pictures" in page and "running" in page and '<body data-refresh="5.0">' in page
    assert page.count('class="tile ') >= 8 and not (run.path / fuse_job.SELECTION).exists()
    assert "not finished" in reports.write_report(run.path).read_text(encoding="utf-8")
    run.truncate_manifest(0)
    with pytest.raises(RunError, match=r"has no pictures yet\. Type: pixrl resume"):
        reports.write_report(run.path)


def large(prompt: str, seed: int) -> Tensor:
    colour = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return colour.expand(3, 300, 300)


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    tab.set_default_timeout(60_000)
    yield tab
    tab.close()


def shown_width(tab: Any) -> int:
    return int(tab.evaluate("document.querySelector('dialog img').naturalWidth"))


def test_a_click_shows_a_picture_large_and_in_full_where_it_lies_beside_the_page(
    tmp_path: Path, tab: Any
) -> None:
    folder = run_folder(tmp_path / "a run", settings(steps=4), done=4, evaluated=(0, 4), draw=large)
    page = write_align_report(folder.path)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.locator(".pair img").first.click()
    tab.wait_for_selector("dialog[open] img")
    tab.wait_for_function("document.querySelector('dialog img').naturalWidth === 300")
    assert tab.locator("dialog img").count() == 2  # the pair
    text = tab.inner_text("dialog p")
    for _ in range(2):
        tab.keyboard.press("ArrowRight")
    tab.wait_for_function("text => document.querySelector('dialog p').textContent !== text", arg=text)
    tab.keyboard.press("Escape")
    tab.wait_for_selector("dialog", state="hidden")
    tab.locator(".strip img").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("dialog[open] img")
    assert tab.locator("dialog img").count() == 1
    assert all(url.startswith(("file:", "data:")) for url in asked)
    alone = tmp_path / "alone.html"
    shutil.copy(page, alone)
    tab.goto(alone.as_uri())
    tab.locator(".pair img").first.click()
    tab.wait_for_selector("dialog[open] img")
    assert shown_width(tab) == 256


def test_no_picture_stands_alone_in_the_last_row(tmp_path: Path, tab: Any) -> None:
    run = fuse_job.start(
        FuseConfig(concepts=("owl", "snail"), budget=27, batch=9, exemplars=2),
        tmp_path / "run",
        world=fake_world(),
    )
    tab.goto(reports.write_report(run.folder.path).as_uri())
    rows = """() => [...document.querySelectorAll("main div.grid")].map((grid) => {
        const tops = [...grid.children].map((tile) => Math.round(tile.getBoundingClientRect().top));
        return [tops.length, new Set(tops).size, tops.filter((top) => top === tops.at(-1)).length];
    })"""
    settled = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    seen = set()
    for width in range(420, 1300, 80):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.evaluate(settled)
        for tiles, count, last in tab.evaluate(rows):
            assert count in (1, tiles) or last > 1, width  # one row, or one column
            seen.add((tiles, count))
    assert len({count for tiles, count in seen if tiles == 27}) > 3


def test_a_page_of_a_run_that_goes_loads_itself_again_unless_a_picture_is_open(
    tmp_path: Path, tab: Any
) -> None:
    folder = run_folder(tmp_path / "run", settings(steps=4), done=2, evaluated=(0, 2))
    tab.goto(write_align_report(folder.path, refresh=0.5).as_uri())
    tab.evaluate("window.first = true")
    tab.wait_for_function("window.first === undefined")  # another page
    open_one = "(document.querySelector('.pair img').click(), window.first = true, dialog.open)"
    assert tab.evaluate(open_one) is True
    tab.wait_for_timeout(1500)
    assert tab.evaluate("window.first") is True
    write_align_report(folder.path)
    tab.keyboard.press("Escape")
    tab.wait_for_function("window.first === undefined && !document.body.dataset.refresh")
    tab.evaluate("window.first = true")
    tab.wait_for_timeout(1500)
    assert tab.evaluate("window.first") is True
