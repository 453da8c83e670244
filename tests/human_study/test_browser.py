"""The page in a real browser: Debian's chromium, driven by playwright; skipped where one of them is missing."""

import json
import threading
from pathlib import Path
from typing import Any

from pixrl.human_study.server import StudyServer, import_votes, write_bundle
from pixrl.human_study.study import TIE, Folder
from pixrl.human_study.votes import Participant, Vote, Votes
from tests.human_study.conftest import SYSTEMS, Make


def people(folder: Folder) -> list[Participant]:
    with Votes(folder.votes) as votes:
        return votes.participants()


def votes_of(folder: Folder) -> list[Vote]:
    with Votes(folder.votes) as votes:
        return votes.of(0)


def at_question(tab: Any, number: int) -> None:
    tab.locator("#count", has_text=f"{number} /").wait_for()


def wait_until_sent(tab: Any) -> None:
    while tab.evaluate("localStorage.getItem(kept)") != "{}":
        tab.wait_for_timeout(20)


def test_a_participant_votes_by_keys_and_clicks_undoes_and_goes_on(browser: Any, made: Make) -> None:
    folder = made(("customized-grpo",), comparisons=2, checks=0)
    tasks = people(folder)[0].tasks
    server = StudyServer(folder, port=0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        page = browser.new_context()
        tab = page.new_page()
        link = f"{server.url}/s/{people(folder)[0].token}"
        tab.goto(link)
        tab.click("#start")
        at_question(tab, 1)
        assert not any(name in tab.content() for name in SYSTEMS)
        tab.keyboard.press("2")
        at_question(tab, 2)
        tab.keyboard.press("ArrowLeft")
        at_question(tab, 3)
        tab.keyboard.press("z")
        at_question(tab, 2)
        tab.click("#tie")
        at_question(tab, 3)
        wait_until_sent(tab)
        page.close()  # and with it all that this browser kept
        tab = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        tab.goto(link)
        tab.wait_for_selector("#start")
        assert "answered 2 of 4" in tab.inner_text("#welcome")
        tab.click("#start")
        at_question(tab, 3)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.click(".option:nth-child(1) .pick")
        at_question(tab, 4)
        tab.click(".option:nth-child(2) .pick")
        tab.wait_for_selector("#end:not([hidden])")
        tab.locator("#thanks", has_text="All your votes are saved").wait_for()
    finally:
        server.stop()
        thread.join()
    found = {(vote.task, vote.criterion): vote.choice for vote in votes_of(folder)}
    assert found == {
        (0, "identity"): tasks[0].pictures[1],
        (0, "prompt"): TIE,
        (1, "identity"): tasks[1].pictures[0],
        (1, "prompt"): tasks[1].pictures[1],
    }


def test_votes_wait_in_the_browser_while_the_server_is_away(browser: Any, made: Make) -> None:
    folder = made(comparisons=2, checks=0)
    server = StudyServer(folder, port=0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        tab = browser.new_context().new_page()
        tab.goto(f"{server.url}/s/{people(folder)[0].token}")
        tab.click("#start")
        tab.context.set_offline(True)
        tab.keyboard.press("1")
        tab.wait_for_selector("#notice:not([hidden])")
        at_question(tab, 2)
        assert votes_of(folder) == []
        tab.context.set_offline(False)
        tab.wait_for_selector("#notice", state="hidden")
    finally:
        server.stop()
        thread.join()
    assert [vote.choice for vote in votes_of(folder)] == [people(folder)[0].tasks[0].pictures[0]]


def test_a_bundle_works_from_its_files_alone_and_its_votes_come_in(
    browser: Any, made: Make, tmp_path: Path
) -> None:
    folder = made(design="best", comparisons=2, checks=0)
    write_bundle(folder, tmp_path / "bundle")
    who = people(folder)[0]
    tab = browser.new_context(accept_downloads=True).new_page()
    tab.goto(f"{(tmp_path / 'bundle' / 'index.html').as_uri()}#{who.token}")
    tab.click("#start")
    at_question(tab, 1)
    tab.evaluate("document.activeElement.blur()")
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        tab.keyboard.press(key)
    at_question(tab, 2)
    tab.keyboard.press("3")
    tab.wait_for_selector("#save")
    with tab.expect_download() as saved:
        tab.click("#save")
    saved.value.save_as(tmp_path / "votes.json")
    assert json.loads((tmp_path / "votes.json").read_text())["token"] == who.token
    assert import_votes(folder, [tmp_path / "votes.json"]) == 2
    assert [vote.choice for vote in votes_of(folder)] == [who.tasks[0].pictures[1], who.tasks[1].pictures[2]]
