"""Votes over HTTP: none is lost or doubled, whatever dies in between, and strangers learn nothing."""

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixrl import cli
from pixrl.errors import CheckpointError, InputError
from pixrl.human_study.server import StudyServer, import_votes, write_bundle, write_links
from pixrl.human_study.study import TIE, Folder
from pixrl.human_study.votes import Vote, Votes
from tests.human_study.conftest import Make, free_port, served

VOTERS, PROCESSES = 50, 5
VOTER = """
import http.client, json, sys, threading, time
port, threads = int(sys.argv[1]), []
lock = threading.Lock()

def ask(method, path, body=None):
    for _ in range(2000):  # as the page does: again, until it is answered
        try:
            line = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            line.request(method, path, body)
            answer = line.getresponse()
            content = answer.read()
            if answer.status < 500:
                return answer.status, content
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.02)
    raise SystemExit("no answer")

def vote(token):
    state = json.loads(ask("GET", f"/s/{token}/state")[1])
    for number, task in enumerate(state["tasks"]):
        for criterion in state["criteria"]:
            choice = task["pictures"][(number + len(token) + ord(token[0])) % len(task["pictures"])]
            body = json.dumps({"task": number, "criterion": criterion["name"], "choice": choice, "seconds": 1})
            for _ in range(1 + number % 2):  # every other one twice, as after a lost answer
                assert ask("PUT", f"/s/{token}/vote", body)[0] == 200
            with lock:
                print(token, number, criterion["name"], choice, flush=True)

for token in sys.argv[2:]:
    threads.append(threading.Thread(target=vote, args=(token,)))
    threads[-1].start()
for thread in threads:
    thread.join()
"""


def test_fifty_voters_and_a_kill_in_the_middle(made: Make) -> None:
    folder = made(("customized-grpo",), people=VOTERS, comparisons=4, checks=1)
    with Votes(folder.votes) as votes:
        tokens = [who.token for who in votes.participants()]
    port, share = free_port(), VOTERS // PROCESSES
    told: list[str] = []
    many = threading.Event()

    def listen(voter: "subprocess.Popen[str]") -> None:
        assert voter.stdout is not None
        for line in voter.stdout:
            told.append(line)
            if len(told) > VOTERS:
                many.set()

    with served(folder.path, port) as first:
        voters = [
            subprocess.Popen(
                [sys.executable, "-c", VOTER, str(port), *tokens[n * share : (n + 1) * share]],
                stdout=subprocess.PIPE,
                text=True,
            )
            for n in range(PROCESSES)
        ]
        ears = [threading.Thread(target=listen, args=(voter,)) for voter in voters]
        for ear in ears:
            ear.start()
        assert many.wait(120)
        first.kill()
        first.wait()
        at_kill = len(told)
    with served(folder.path, port):
        for ear in ears:
            ear.join(200)
        assert [voter.wait(10) for voter in voters] == [0] * PROCESSES
    expected = VOTERS * 5 * 2
    assert VOTERS < at_kill < expected == len(told)
    with Votes(folder.votes) as votes:
        kept = [
            f"{who.token} {vote.task} {vote.criterion} {vote.choice}\n"
            for who in votes.participants()
            for vote in votes.of(who.number)
        ]
    assert sorted(kept) == sorted(told)


@pytest.fixture
def folder(made: Make) -> Folder:
    return made(("customized-grpo",))


@pytest.fixture
def server(folder: Folder) -> Iterator[StudyServer]:
    running = StudyServer(folder, port=0)
    thread = threading.Thread(target=running.serve)
    thread.start()
    yield running
    running.stop()
    thread.join(20)
    assert not thread.is_alive()


def ask(server: StudyServer, method: str, path: str, body: object = None) -> tuple[int, Any]:
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    line.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body))
    answer = line.getresponse()
    content = answer.read()
    kind = answer.headers["Content-Type"]
    line.close()
    return answer.status, json.loads(content) if kind == "application/json" else content


def token_of(folder: Folder, number: int = 0) -> str:
    with Votes(folder.votes) as votes:
        return votes.participants()[number].token


def test_a_participant_goes_on_where_they_were_and_takes_back(folder: Folder, server: StudyServer) -> None:
    path = f"/s/{token_of(folder)}"
    state = ask(server, "GET", f"{path}/state")[1]
    first, second = state["tasks"][0]["pictures"]
    vote = {"task": 0, "criterion": "identity", "choice": first, "seconds": 2.5}
    assert ask(server, "PUT", f"{path}/vote", vote) == (200, {"kept": True})
    assert ask(server, "PUT", f"{path}/vote", {**vote, "choice": second})[0] == 200
    assert ask(server, "PUT", f"{path}/vote", {**vote, "criterion": "prompt", "choice": TIE})[0] == 200
    kept = ask(server, "GET", f"{path}/state")[1]["answers"]
    assert [(one["criterion"], one["choice"]) for one in kept] == [("identity", second), ("prompt", TIE)]
    assert ask(server, "DELETE", f"{path}/vote", {"task": 0, "criterion": "identity"})[0] == 200
    assert [one["criterion"] for one in ask(server, "GET", f"{path}/state")[1]["answers"]] == ["prompt"]
    other = ask(server, "GET", f"/s/{token_of(folder, 1)}/state")[1]
    assert other["answers"] == []


def test_pictures_come_by_their_opaque_names_alone(folder: Folder, server: StudyServer) -> None:
    name = next(iter(folder.study.pictures))
    assert ask(server, "GET", f"/picture/{name}.png") == (200, folder.file_of(name).read_bytes())
    for path in ("/picture/..%2fstudy.png", "/study.json", "/picture/" + "0" * 32 + ".png", "/votes.sqlite"):
        status, said = ask(server, "GET", path)
        assert status == 404
        assert str(folder.path) not in str(said)


def test_a_foreign_link_is_told_so_and_leaves_nothing(folder: Folder, server: StudyServer) -> None:
    status, page = ask(server, "GET", "/s/nobody")
    assert status == 404 and b"not one of this study" in page
    assert ask(server, "GET", "/s/nobody/state")[0] == 404
    assert ask(server, "PUT", "/s/nobody/vote", {"task": 0, "criterion": "prompt", "choice": TIE})[0] == 404
    with Votes(folder.votes) as votes:
        assert all(not votes.of(n) for n in range(3))


def test_a_vote_that_answers_nothing_is_refused_and_others_stay(folder: Folder, server: StudyServer) -> None:
    path = f"/s/{token_of(folder)}"
    state = ask(server, "GET", f"{path}/state")[1]
    first, second = state["tasks"][0]["pictures"]
    good = {"task": 0, "criterion": "identity", "choice": first, "seconds": float("1e99")}
    assert ask(server, "PUT", f"{path}/vote", good)[0] == 200
    folder.file_of(second).unlink()
    foreign = next(name for name in folder.study.pictures if name not in (first, second))
    for bad, status, words in (
        ({**good, "choice": second}, 409, "is gone"),
        ({**good, "choice": foreign}, 409, "not one of this comparison"),
        ({**good, "task": 999}, 409, "no comparison 1000"),
        ({**good, "task": -1}, 409, "no comparison"),
        ({**good, "task": True}, 400, "no vote"),
        ({**good, "criterion": "taste"}, 409, "does not ask"),
        ({"task": 0, "criterion": "identity"}, 400, "names the picture"),
        (b"{", 400, "no vote"),
        (b"[" * 3000, 400, "no vote"),
        (b'"' + b"x" * 9000 + b'"', 413, "too long"),
    ):
        found, said = ask(server, "PUT", f"{path}/vote", bad)
        assert (found, words in said["error"]) == (status, True), said
    assert ask(server, "GET", f"/picture/{second}.png")[0] == 404
    with Votes(folder.votes) as votes:
        (kept,) = votes.of(0)
    assert (kept.choice, kept.seconds) == (first, None)


def test_a_port_in_use_and_a_lost_file_of_votes_are_told(folder: Folder, server: StudyServer) -> None:
    with pytest.raises(InputError, match="--port 0"):
        StudyServer(folder, port=server.port)
    done = CliRunner().invoke(cli.app, ["human-study", "serve", str(folder.path), "--port", str(server.port)])
    assert done.exit_code == 2 and "Cannot listen" in done.output
    folder.votes.rename(folder.path / "away")
    done = CliRunner().invoke(cli.app, ["human-study", "serve", str(folder.path)])
    assert done.exit_code == 1 and "votes.sqlite is gone" in " ".join(done.output.split())
    folder.votes.write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match="no file of votes"):
        Votes(folder.votes)


def test_links_are_for_their_owner_and_further_people_keep_the_first_ones(folder: Folder) -> None:
    file = write_links(folder, "https://study.example/")
    assert file.stat().st_mode & 0o077 == 0
    before = file.read_text().splitlines()
    assert before[0] == "participant,link"
    assert before[1] == f"1,https://study.example/s/{token_of(folder)}"
    with Votes(folder.votes) as votes:
        assert votes.add_participants(folder.study, 5) == 2
        assert votes.add_participants(folder.study, 4) == 0
    after = write_links(folder, "https://study.example/").read_text().splitlines()
    assert len(after) == 6 and after[:4] == before


def test_files_of_a_bundle_come_in_whole_or_not_at_all(folder: Folder, tmp_path: Path) -> None:
    write_bundle(folder, tmp_path / "bundle")
    with Votes(folder.votes) as votes:
        who = votes.participants()[0]
    rows = [
        {"task": n, "criterion": "prompt", "choice": task.pictures[0], "seconds": 1.0, "at": 10.0 + n}
        for n, task in enumerate(who.tasks)
    ]
    good, bad, foreign = (tmp_path / f"{name}.json" for name in ("good", "bad", "foreign"))
    good.write_text(json.dumps({"token": who.token, "votes": rows}))
    bad.write_text(json.dumps({"token": who.token, "votes": [{**rows[0], "choice": "x"}]}))
    foreign.write_text(json.dumps({"token": "nobody", "votes": rows}))
    for file, words in (
        (bad, "not one of this comparison"),
        (foreign, "another study"),
        (tmp_path / "no", "no file"),
    ):
        with pytest.raises(InputError, match=words):
            import_votes(folder, [good, file])
    with Votes(folder.votes) as votes:
        assert votes.of(0) == []
        assert import_votes(folder, [good]) == import_votes(folder, [good]) == len(rows)
        assert len(votes.of(0)) == len(rows)
        votes.save(0, [Vote(0, "prompt", TIE, 1.0, at=5.0)])  # older than what is there
        assert votes.of(0)[0].choice == rows[0]["choice"]
