"""The studio's address, its token, and the command: what is refused, and with which exit code."""

import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixrl.cli import app as cli
from pixrl.errors import InputError, RunError
from pixrl.runs.process import attending
from pixrl.studio.app import Fresh, Studio, launch
from pixrl.studio.folders import State
from pixrl.studio.processes import Processes

TOKEN = "a-token-of-sixteen-characters"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{tmp}/nowhere"], "There is no folder"),
        (["{tmp}", "--port", "{taken}"], "Cannot listen at 127.0.0.1"),
        (["{tmp}", "--host", "0.0.0.0"], "asks for a token"),
        (["{tmp}", "--host", ""], "asks for a token"),
        (["{tmp}", "--host", "no-such-host.invalid"], "asks for a token"),
        (["{tmp}", "--port", "70000"], "65535"),
    ],
)
def test_what_cannot_be_served_is_a_sentence_and_exit_code_2(
    tmp_path: Path, taken: int, given: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIXRL_STUDIO_TOKEN", raising=False)
    arguments = [one.format(tmp=tmp_path, taken=taken) for one in given]
    result = CliRunner().invoke(cli, ["studio", *arguments])
    assert result.exit_code == 2 and said in result.output


def test_a_short_token_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match="at least 16 characters; this one has 5"):
        launch(Studio(root), "127.0.0.1", 0, "short")


def test_without_the_token_nothing_of_a_run_is_told(root: Path) -> None:
    studio = Studio(root)
    url = launch(studio, "127.0.0.1", 0, TOKEN)
    try:
        for place in ("config", "gradio_api/info"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{url}{place}", timeout=20)
            assert refused.value.code == 401
        ask = urllib.request.Request(
            f"{url}gradio_api/component_server/",
            data=b'{"data": {"run": "done", "file": "samples/step-000000/0000.png"}, "component_id": 1, '
            b'"fn_name": "picture", "session_hash": "x"}',
            headers={"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(ask, timeout=20)
        assert refused.value.code == 401
    finally:
        studio.page.close()


def test_pictures_that_are_gone_or_damaged_are_empty(root: Path) -> None:
    studio = Studio(root)
    assert studio.picture("done", "samples/step-000000/0000.png").startswith("data:image/webp;base64,")
    (root / "done/samples/step-000000/0001.png").write_bytes(b"x")
    for run, file in (("done", "samples/step-000000/0001.png"), ("done", "recipe.yaml"), ("gone", "x")):
        assert studio.picture(run, file) == ""


def test_only_what_changed_is_sent() -> None:
    fresh = Fresh({})
    assert fresh("head", "one") == "one"
    again = Fresh(fresh.known)
    assert again("head", "one") != "one" and again("head", "two") == "two"


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("print('Error: ' + sys.argv[2] + '/x is damaged'); sys.exit(1)", "resume failed: half/x is damaged"),
        ("print('first'); print(sys.argv[1] + ' of ' + sys.argv[2])", "resume of half"),
        ("print('Interrupted.', file=sys.stderr); sys.exit(130)", "Interrupted."),
    ],
)
def test_a_run_that_is_resumed_here_is_starting_until_its_process_writes(
    root: Path, ending: str, said: str
) -> None:
    studio, run = Studio(root), root / "half"
    gate = root / "gate"
    code = f"import sys, time, pathlib\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.01)\n{ending}"
    studio.processes = processes = Processes((sys.executable, "-c", code))
    processes.begin("resume", run)
    assert studio.look("half").state is State.STARTING and processes.outcome(run) == ""
    for command in ("resume", "export"):
        with pytest.raises(RunError, match="was started here"):
            processes.begin(command, run)
    gate.touch()
    while processes.busy_with(run):
        time.sleep(0.01)
    assert studio.look("half").state is State.STOPPED
    assert processes.outcome(run) == said


def test_a_run_that_trains_is_not_resumed(root: Path) -> None:
    with attending(root / "half"), pytest.raises(RunError, match="is running already"):
        Processes().begin("resume", root / "half")
