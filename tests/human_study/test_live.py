"""`pixrl vote`'s page by real requests: blind, each group counted once, nothing lost, a sentence for what is wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pixrl import cli
from pixrl.errors import InputError, RunError
from pixrl.human_study.live import VoteServer
from pixrl.rewards.votes.groups import FOLDER, VOTES, GroupVotes, VotedGroup, VotedPicture
from pixrl.rewards.votes.reward import Ask
from pixrl.runs.folder import RunFolder
from tests import tiny
from tests.align.parts import recipe


def groups_of(run: Path, count: int = 3, pictures: int = 3) -> Path:
    """A run that waits for votes: its groups and their pictures, without the run."""
    place = run / FOLDER
    place.mkdir(parents=True)
    drawn = {}
    for group in range(count):
        names = [f"{(group * 16 + n) * 7919 % 251:032x}" for n in range(pictures)]
        for n, name in enumerate(names):
            Image.new("RGB", (16, 16), (40 * n, 80 * group, 90)).save(place / f"{name}.png")
        drawn[group] = (
            f"prompt {group}",
            [VotedPicture(f"{name}.png", n, n) for n, name in enumerate(names)],
        )
    with GroupVotes(place / VOTES, make=True) as ballots:
        ballots.add(0, drawn)
    return run


def all_votes(run: Path) -> list[VotedGroup]:
    with GroupVotes(run / FOLDER / VOTES) as ballots:
        return ballots.all()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[VoteServer]:
    server = VoteServer(groups_of(tmp_path / "secret-run"), Ask.BEST, 5, port=0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.stop()
    thread.join()


def put(server: VoteServer, group: int, best: list[str]) -> httpx.Response:
    return httpx.put(f"{server.link}/vote", json={"group": group, "best": best})


def undo(server: VoteServer, group: int) -> httpx.Response:
    return httpx.request("DELETE", f"{server.link}/vote", json={"group": group})


def test_it_is_blind_and_the_link_is_needed(live: VoteServer) -> None:
    text = httpx.get(f"{live.link}/state").text
    state = json.loads(text)
    assert [len(group["pictures"]) for group in state["groups"]] == [3, 3, 3] and state["steps"] == 5
    assert not any(word in text for word in ("secret-run", "seed", "variant", ".png", "/"))
    name = state["groups"][0]["pictures"][0]
    assert httpx.get(f"{live.link}/picture/{name}.png").headers["content-type"] == "image/png"
    for path in ("/", "/v/x", "/v/x/state", f"/v/x/picture/{name}.png"):
        answer = httpx.get(live.url + path)
        assert answer.status_code == 404 and name not in answer.text
    assert httpx.put(f"{live.url}/v/x/vote", json={"group": 1, "best": [name]}).status_code == 404
    assert httpx.get(f"{live.link}/picture/votes.sqlite").status_code == 404
    assert httpx.get(f"{live.link}/picture/..%2Fvotes.png").status_code == 404
    assert live.host == "127.0.0.1"


def test_votes_from_many_tabs_at_once_count_each_group_once(live: VoteServer, tmp_path: Path) -> None:
    groups = httpx.get(f"{live.link}/state").json()["groups"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda n: put(live, 1 + n % 3, [groups[n % 3]["pictures"][n // 3]]), range(9))
        )
    assert [answer.status_code for answer in answers] == [200] * 9
    assert sum(answer.json()["counted"] for answer in answers) == 3
    first = {n % 3: n // 3 for n, answer in enumerate(answers) if answer.json()["counted"]}
    for group, ballot in enumerate(all_votes(tmp_path / "secret-run")):
        assert ballot.ranks is not None
        best = ballot.pictures[ballot.ranks.index(0)].file
        assert best == f"{groups[group]['pictures'][first[group]]}.png" and sorted(ballot.ranks) == [0, 1, 1]


def test_undo_until_training_has_learned_from_it(live: VoteServer, tmp_path: Path) -> None:
    assert put(live, 1, []).json() == {"counted": True}
    assert undo(live, 1).status_code == 200
    assert all_votes(tmp_path / "secret-run")[0].ranks is None
    assert put(live, 1, []).json() == {"counted": True}
    with GroupVotes(tmp_path / "secret-run" / FOLDER / VOTES) as ballots:
        ballots.learn(0, [0], 0)
    answer = undo(live, 1)
    assert answer.status_code == 409 and "learned from that vote already" in answer.json()["error"]
    assert all_votes(tmp_path / "secret-run")[0].ranks == (0, 0, 0)
    assert [group["group"] for group in httpx.get(f"{live.link}/state").json()["groups"]] == [2, 3]


def test_a_picture_that_is_gone_and_other_votes_that_are_refused(live: VoteServer, tmp_path: Path) -> None:
    first, second = (group["pictures"] for group in httpx.get(f"{live.link}/state").json()["groups"][:2])
    (tmp_path / "secret-run" / FOLDER / f"{first[0]}.png").unlink()
    cases: list[tuple[Any, Any, str]] = [
        (1, [first[0]], "That picture is gone"),
        (1, [second[0]], "not one of this group"),
        (1, first, "one picture, or none"),
        (9, [first[1]], "not one of this run"),
        (1, "x", "names the best pictures"),
        ("1", [first[1]], "which group"),
    ]
    for group, best, said in cases:
        answer = put(live, group, best)
        assert answer.status_code in (400, 409) and said in answer.json()["error"]
        assert str(tmp_path) not in answer.text
    assert httpx.put(f"{live.link}/vote", content="x" * 5000).status_code == 413
    assert all(ballot.ranks is None for ballot in all_votes(tmp_path / "secret-run"))


def test_a_full_disk_is_a_sentence_and_loses_nothing(
    live: VoteServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert put(live, 1, []).json() == {"counted": True}

    def full(*_: object) -> bool:
        raise RunError(f"{tmp_path}/votes.sqlite cannot be written (database or disk is full)")

    with monkeypatch.context() as patched:
        patched.setattr(GroupVotes, "vote", full)
        answer = put(live, 2, [])
    assert answer.status_code == 503 and "sent again" in answer.json()["error"]
    assert str(tmp_path) not in answer.text
    assert put(live, 2, []).json() == {"counted": True}
    assert [ballot.ranks is not None for ballot in all_votes(tmp_path / "secret-run")] == [True, True, False]


def test_a_port_in_use_and_a_recipe_without_votes(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="--port 0 takes any that is free"):
            VoteServer(tmp_path, Ask.BEST, 1, port=taken.getsockname()[1])
        at = ["--port", str(taken.getsockname()[1]), "--out", str(tmp_path / "run")]
        found = CliRunner().invoke(cli.app, ["vote", "toy/vote", *at])
        assert found.exit_code == 2 and "Is another server there?" in found.output
    for arguments, said in [
        (["toy/sft"], "has no reward that people vote on"),
        (["toy/vote", "--wrong", "0.2"], "give --simulate"),
        (["toy/vote", "--page-only"], "Give a run's folder"),
        (["toy/vote", "--host", ""], "would listen everywhere"),
        (["toy/vote", "--simulate", "preferense", "--port", "0"], "Did you mean 'preference'"),
    ]:
        found = CliRunner().invoke(cli.app, ["vote", *arguments, "--out", str(tmp_path / "run")])
        assert found.exit_code == 2 and said in " ".join(found.output.split()), found.output
    assert not (tmp_path / "run").exists()


def begin(*arguments: str) -> "tuple[subprocess.Popen[str], str]":
    """`pixrl vote` as a process of its own, and the link that it prints."""
    command = [sys.executable, "-m", "pixrl", "vote", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"Vote at (http://127\.0\.0\.1:\d+/v/\S+)", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process, found[1]
    raise AssertionError("no link was printed")


def answer_until(link: str, count: int) -> list[int]:
    """Vote for the first picture of every group, until `count` votes are answered or the run ends."""
    done: list[int] = []
    while len(done) < count:
        time.sleep(0.05)
        state = httpx.get(f"{link}/state").json()
        if state["ended"]:
            break
        for group in state["groups"]:
            if not group["voted"] and len(done) < count:
                best = [group["pictures"][0]]
                answer = httpx.put(f"{link}/vote", json={"group": group["group"], "best": best})
                done += [group["group"]] * answer.json()["counted"]
    return done


def test_a_killed_command_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    """Real processes: SIGKILL amid a step, then the same run by its folder."""
    model = tiny.sd3(tmp_path / "sd3", card=tiny.SD3_CARD)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red owl\ntwo blue snails\na cat\n")
    rewards = [{"name": "votes", "options": {"undo_seconds": 0.0}}]
    (tmp_path / "vote.yaml").write_text(yaml.safe_dump(recipe(model, prompts, rewards=rewards, steps=2)))
    run = tmp_path / "run"
    process, link = begin(str(tmp_path / "vote.yaml"), "--out", str(run))
    try:
        assert answer_until(link, 3) == [1, 2, 3]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    process, link = begin(str(run))
    try:
        assert answer_until(link, 1) == [4]
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    assert [ballot.ranks is not None and ballot.learned for ballot in all_votes(run)] == [True] * 4
    assert len(RunFolder.open(run).manifest()) == 12 and (run / "report.html").is_file()
    assert len((run / FOLDER / "pairs.jsonl").read_text().splitlines()) == 8


def test_a_person_votes_by_keys_and_clicks_undoes_and_sees_another_tab(
    browser: Any, live: VoteServer, tmp_path: Path
) -> None:
    run = tmp_path / "secret-run"
    tab, other = browser.new_context().new_page(), browser.new_context().new_page()
    shown = [group["pictures"] for group in httpx.get(f"{live.link}/state").json()["groups"]]
    for one in (tab, other):
        one.goto(live.link)
        one.locator("#count", has_text="group 1 / 3").wait_for()
    assert "prompt 0" in tab.inner_text("#prompt") and "secret-run" not in tab.content()
    tab.keyboard.press("2")
    tab.locator("#count", has_text="group 2 / 3").wait_for()
    other.locator(".pick").nth(0).dblclick()  # the other tab is late, if it has not looked since
    other.locator("#count", has_text=re.compile("group [23] / 3")).wait_for()
    tab.keyboard.press("u")
    tab.locator("#count", has_text="group 1 / 3").wait_for()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "Enter"):
        tab.keyboard.press(key)
    tab.locator("#count", has_text=re.compile("group [23] / 3")).wait_for()
    ballots = all_votes(run)
    assert ballots[0].ranks is not None
    assert ballots[0].pictures[ballots[0].ranks.index(0)].file == f"{shown[0][2]}.png"
    while any(ballot.ranks is None for ballot in all_votes(run)):
        tab.click("#tie")
        tab.wait_for_timeout(400)
    tab.locator("#wait-text", has_text="3 votes so far").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_order_is_clicked_from_the_best_on(browser: Any, tmp_path: Path) -> None:
    run = groups_of(tmp_path / "run", count=1)
    server = VoteServer(run, Ask.ORDER, 5, port=0)
    with server.serving():
        (group,) = httpx.get(f"{server.link}/state").json()["groups"]
        tab = browser.new_context().new_page()
        tab.goto(server.link)
        tab.locator("#question", has_text="From the best to the worst?").wait_for()
        tab.keyboard.press("1")
        tab.keyboard.press("u")
        tab.keyboard.press("3")
        tab.locator(".pick").nth(0).click()
        tab.wait_for_selector("#wait:not([hidden])")
        (ballot,) = all_votes(run)
        assert ballot.ranks is not None
        order = [ballot.pictures[ballot.ranks.index(rank)].file for rank in range(3)]
        assert order == [f"{group['pictures'][n]}.png" for n in (2, 0, 1)]
    tab.locator("#wait-text", has_text="The run is finished").wait_for()
