"""A reward served elsewhere: the same scores as here, and everything that can go wrong on the way."""

import json
import math
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rewards.services import TOKEN, Asked, Say, fake_service, free_port, reward_server
from torch import Tensor
from typer.testing import CliRunner

from pixrl import cli, rewards
from pixrl.conformance import check_reward
from pixrl.errors import ConfigError, InputError, ServiceError
from pixrl.rewards import http, wire
from pixrl.rewards.remote import RemoteReward
from pixrl.rewards.set import RewardSet, RewardSetting
from pixrl.serve.server import RewardServer, ServeSettings
from pixrl.types import RewardBatch, Scores

FUNCTIONS = '''
import time
from PIL import ImageStat

def blue(images, prompts, metadata):
    """No score for "none"; a reference's brightness is taken off."""
    values = []
    for image, prompt, entry in zip(images, prompts, metadata):
        base = sum(float(one.mean()) for one in entry.get("reference", []))
        values.append(None if prompt == "none" else ImageStat.Stat(image).mean[2] / 255 - base)
    return values

def raises(images, prompts, metadata):
    raise KeyError("tag")

def hangs(images, prompts, metadata):
    if prompts != ["a photo"]:
        time.sleep(1.0)
    return [0.5] * len(images)

def counts(images, prompts, metadata):
    return [float(len(images))] * len(images)
'''


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXRL_REWARD_TOKEN", TOKEN)
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.02)


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    return file


@pytest.fixture
def server(functions: Path) -> Iterator[RewardServer]:
    with reward_server(f"{functions}:blue") as found:
        yield found


@pytest.fixture
def batch(images: Tensor) -> RewardBatch:
    several = torch.stack([images[1], images[2]])
    metadata: list[dict[str, object]] = [
        {},
        {"reference": images[[4]]},
        {"reference": [images[0], images[3]], "tag": "colors", "include": [{"class": "owl", "count": 1}]},
        {"reference": several, "nested": {"also": images[0]}},
        {"n": 1.5, "flag": True, "nothing": None},
    ]
    return RewardBatch(images, ["a", "b", "none", "d", "e"], metadata)


def remote(server: RewardServer, **options: Any) -> RemoteReward:
    return RemoteReward(server.url, "mine", **{"patience": 2.0, **options})


@pytest.mark.parametrize("exact", [False, True], ids=["png", "exact"])
def test_scores_are_those_of_this_process(
    server: RewardServer, functions: Path, batch: RewardBatch, exact: bool
) -> None:
    here = rewards.load("python", function=f"{functions}:blue").score(batch)
    there = remote(server, exact=exact, batch=2).score(batch)
    tolerance = 1e-6 if exact else 2 / 255  # references are rounded to 8 bits on the way
    assert torch.allclose(here.values_B, there.values_B, atol=tolerance, equal_nan=True)
    assert there.reasons == here.reasons == (None, None, "the function gave None", None, None)
    assert there.provenance["model"] == here.provenance["model"]
    assert there.provenance["served_by"] == server.url
    assert there.provenance["sent_as"] == ("float32" if exact else "PNG of 8 bits")
    check_reward(remote(server, exact=exact), batch)


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_sent_arrives(batch: RewardBatch, exact: bool) -> None:
    body = wire.request("mine", batch, exact=exact)
    pictures = json.loads(body)["pictures"]
    if not exact:  # five pictures, three copies of some, and two that are shown twice
        assert len(pictures["png"]) == 8
    name, found = wire.read_request(body)
    assert (name, found.prompts) == ("mine", batch.prompts)
    tolerance = 0.0 if exact else 0.5 / 255 + 1e-6
    assert torch.allclose(found.images_BCHW, batch.images_BCHW, rtol=0, atol=tolerance)
    assert found.metadata[2]["include"] == [{"class": "owl", "count": 1}]
    assert found.metadata[4] == {"n": 1.5, "flag": True, "nothing": None}
    stacked = found.metadata[3]["reference"]
    assert isinstance(stacked, Tensor) and stacked.shape == (2, 3, 32, 32)
    assert torch.allclose(stacked, batch.images_BCHW[1:3], rtol=0, atol=tolerance)


def test_turned_pictures_are_not_taken_for_each_other() -> None:
    one = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = RewardBatch(one[None], ["a"], [{"reference": one.transpose(1, 2), "other": one}])
    found = wire.read_request(wire.request("mine", batch, exact=True))[1]
    assert torch.equal(found.metadata[0]["reference"], one.transpose(1, 2))  # type: ignore[arg-type]
    assert torch.equal(found.metadata[0]["other"], one)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"bytes", "neither JSON nor a picture"),
        (math.nan, "neither JSON nor a picture"),
        (Path("x"), "neither JSON nor a picture"),
        ({1: 2}, "has the key 1"),
        ({"$picture": 0}, r"has the key '\$picture'"),
        (torch.zeros(4, 4), "is no picture"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "is no picture"),
    ],
)
def test_metadata_that_cannot_be_sent(server: RewardServer, value: object, message: str) -> None:
    scores = remote(server).score(RewardBatch(torch.rand(1, 3, 4, 4), ["a"], [{"key": value}]))
    assert scores.values_B.isnan().all()
    with pytest.raises(ValueError, match=message):
        raise ValueError(scores.reasons[0])


def test_details_and_failures_survive_the_way() -> None:
    given = Scores(
        torch.tensor([1.5, torch.nan]),
        (None, "why"),
        {"parts": torch.tensor([2.0, torch.nan])},
        {"model": "m"},
    )
    found = wire.read_answer(wire.answer(given), 2)
    assert torch.equal(found.values_B.nan_to_num(9), given.values_B.nan_to_num(9))
    assert torch.equal(found.detail["parts"].nan_to_num(9), given.detail["parts"].nan_to_num(9))
    assert (found.reasons, found.provenance) == (given.reasons, {"model": "m"})


def test_one_reward_of_many_pictures_is_asked_in_pieces(functions: Path) -> None:
    images = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with reward_server(f"{functions}:counts", max_body_mb=0.004) as server:
        asked = remote(server, batch=4).score(RewardBatch(images, ["a"] * 7)).values_B
        assert set(asked.tolist()) <= {1.0, 2.0, 3.0}
        large = remote(server).score(RewardBatch(torch.rand(1, 3, 64, 64), ["a"]))
    assert (
        large.reasons[0] is not None and "above the server's limit of 4194 (its max_body)" in large.reasons[0]
    )


def test_a_function_that_raises_or_hangs_fails_its_scores(functions: Path, batch: RewardBatch) -> None:
    with reward_server(f"{functions}:raises") as server:
        assert server.served[0].problem == "KeyError: 'tag' (mine.py:14)"
        scores = remote(server).score(batch)
        assert all(reason is not None and "KeyError: 'tag'" in reason for reason in scores.reasons)
        assert "model" in scores.provenance
    with reward_server(f"{functions}:hangs", time_limit=0.1) as server:
        assert remote(server).score(batch).reasons == ("no answer within 0.1 s",) * 5


# ---------------------------------------------------------------------------------------------- the server by itself


def call(url: str, body: bytes | None = None, token: str | None = TOKEN, **headers: str) -> tuple[int, Any]:
    own = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data=body, headers={**own, **headers})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_health_and_description(server: RewardServer) -> None:
    assert call(f"{server.url}/health", token=None) == (200, {"status": "ok"})
    status, found = call(f"{server.url}/describe")
    assert (status, found["protocol"], found["max_body"]) == (200, 1, 64 * 2**20)
    (one,) = found["rewards"]
    assert (one["name"], one["kind"], one["licence"], one["problem"]) == (
        "mine",
        "python",
        "its own",
        None,
    )
    assert "mine.py:blue" in one["provenance"]["model"]


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], f"{TOKEN}x", "ünïcödé"])
@pytest.mark.parametrize(("path", "body"), [("/describe", None), ("/score", b"{}"), ("/nowhere", None)])
def test_nothing_without_the_token(
    server: RewardServer, token: str | None, path: str, body: bytes | None
) -> None:
    status, said = call(f"{server.url}{path}", body, token)
    assert (status, said) == (401, {"error": "the token is missing or wrong"})


def message(**changes: Any) -> bytes:
    body = json.loads(wire.request("mine", RewardBatch(torch.rand(2, 3, 8, 8), ["a", "b"]), exact=False))
    return json.dumps(body | changes).encode()


def huge_png() -> str:
    """A few kilobytes that unfold to 200 million pixels."""
    import base64
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 8_000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(png).decode()


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "no request of protocol 1"),
        (b"<html>", 400, "no request of protocol 1"),
        (b"[" * 5000, 400, "no request of protocol 1"),
        (b'{"protocol": 1}', 400, "reward: Field required"),
        (message(protocol=2), 400, "protocol: Input should be 1"),
        (message(function="os:system"), 400, "function: Extra inputs are not permitted"),
        (message(reward="min"), 404, "there is no reward 'min' here. Did you mean 'mine'? There are mine."),
        (message(prompts=["a"]), 400, "1 prompts need 1 images"),
        (message(prompts=[]), 400, "prompts"),
        (message(images=[0, 7]), 400, "there is no picture 7; 2 were sent"),
        (message(images=[0, -1]), 400, "there is no picture -1"),
        (message(metadata=[{}, {"reference": {"$picture": "0"}}]), 400, "there is no picture '0'"),
        (message(metadata=[{}, {"reference": {"$pictures": []}}]), 400, "must name one or more pictures"),
        (message(pictures={"png": ["%%%", "%%%"]}), 400, "is no base64"),
        (message(pictures={"png": ["AAAA", "AAAA"]}), 400, "cannot be read as PNG"),
        (message(pictures={"png": [huge_png()] * 2}), 400, "more than 67108864 pixels in all"),
        (message(pictures={"safetensors": "AAAA"}), 400, "no safetensors file"),
        (message(pictures={"pickle": "gASV"}), 400, "pictures"),
    ],
)
def test_requests_that_are_refused(server: RewardServer, body: bytes, status: int, reason: str) -> None:
    found, said = call(f"{server.url}/score", body)
    assert (found, reason in said["error"]) == (status, True), said
    assert call(f"{server.url}/score", message())[0] == 200


def test_a_large_body_is_refused_by_its_length(functions: Path) -> None:
    with reward_server(f"{functions}:blue", max_body_mb=0.01) as server:
        status, said = call(f"{server.url}/score", b"x" * 200_000)
        assert (status, said["error"]) == (413, "200000 bytes are above the limit of 10485")
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as line:
            head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            line.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
            line.shutdown(socket.SHUT_WR)
            assert line.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("X: y", "411"),
        ("Transfer-Encoding: chunked", "411"),
        ("Content-Length: -5", "400"),
        ("Content-Length: 1e3", "400"),
        ("Content-Length: 50", "408"),
    ],
)
def test_bodies_of_no_known_length_or_that_never_come(functions: Path, headers: str, status: str) -> None:
    with (
        reward_server(f"{functions}:blue") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=5) as line,
    ):
        line.sendall(
            f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{headers}\r\n\r\nabc".encode()
        )
        line.shutdown(socket.SHUT_WR)
        assert line.recv(4096).startswith(f"HTTP/1.1 {status}".encode())


def test_a_full_queue_sends_away_and_the_client_comes_again(functions: Path, batch: RewardBatch) -> None:
    with reward_server(f"{functions}:hangs", queue=0, queue_wait=0.05) as server:
        clients = [remote(server, patience=20.0) for _ in range(3)]
        found: list[Scores] = []
        threads = [threading.Thread(target=lambda c=c: found.append(c.score(batch))) for c in clients]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        status, said = call(f"{server.url}/score", message())
        assert (status, said) == (503, {"error": "the queue is full"})
        for thread in threads:
            thread.join()
        assert time.monotonic() - begun >= 3.0  # one at a time
    assert [scores.values_B.tolist() for scores in found] == [[0.5] * 5] * 3


def test_too_many_connections_are_sent_away(functions: Path, batch: RewardBatch) -> None:
    with reward_server(f"{functions}:hangs", queue=0, connections=1) as server:
        client = remote(server, patience=20.0)
        scoring = threading.Thread(target=client.score, args=(batch,))
        scoring.start()
        said: dict[str, Any] = {}
        while scoring.is_alive() and not said:
            status, found = call(f"{server.url}/describe")
            said = found if status == 503 else {}
        assert said == {"error": "too many connections are open"}
        scoring.join()
        for _ in range(100):  # the connection is given back once its thread has ended
            if call(f"{server.url}/describe")[0] == 200:
                return
            time.sleep(0.02)
        pytest.fail("the connection was never given back")


def test_a_taken_port_and_a_bad_token(server: RewardServer, functions: Path) -> None:
    rewards = [{"name": "mine", "kind": "python", "options": {"function": f"{functions}:blue"}}]
    taken = ServeSettings.model_validate({"port": server.port, "rewards": rewards})
    with pytest.raises(InputError, match=r"Cannot listen at 127\.0\.0\.1, port"):
        RewardServer(taken, TOKEN)
    for token in ("", "short", "with a blank in the middle", "nöt-ascii-characters"):
        with pytest.raises(InputError, match="at least 16 characters"):
            RewardServer(taken, token)


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "content", "error"),
    [
        (["--host", "0.0.0.0"], None, "needs a token of yours, and PIXRL_REWARD_TOKEN is not set"),
        (["--port", "70000"], None, "port"),
        (["--set", "qeue=3"], None, "Did you mean 'queue'"),
        ([], {"rewards": []}, "No reward is given"),
        ([], {"rewards": [{"name": "clip_txt"}]}, "Did you mean 'clip_text'"),
        ([], {"rewards": [{"name": "python", "weight": 2}]}, "weight"),
        ([], {"kind": "align"}, "not for 'serve-rewards'"),
        (["--set", "connections=3"], None, "must be above queue (8)"),
    ],
)
def test_commands_that_are_refused(
    tmp_path: Path,
    functions: Path,
    words: list[str],
    content: dict[str, Any] | None,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import yaml

    monkeypatch.delenv("PIXRL_REWARD_TOKEN")
    served = {"rewards": [{"name": "mine", "kind": "python", "options": {"function": f"{functions}:blue"}}]}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"kind": "serve-rewards", **(served if content is None else content)}))
    done = CliRunner().invoke(cli.app, ["serve-rewards", str(file), *words])
    assert done.exit_code == 2, done.output
    assert error in " ".join(done.stderr.replace("│", " ").split())


def test_without_its_libraries_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "pixrl.serve.server")
    done = CliRunner().invoke(cli.app, ["serve-rewards", "toy/serve-rewards"])
    said = " ".join(done.stderr.replace("│", " ").split())
    assert (
        done.exit_code == 2 and "serve-rewards needs uvicorn" in said and "pip install 'pixrl[serve]'" in said
    )


def test_the_shipped_recipe_loads() -> None:
    from pixrl import config

    found = config.load(ServeSettings, "toy/serve-rewards", kind="serve-rewards")
    assert [one.name for one in found.rewards] == ["geneval", "preference"]


# ---------------------------------------------------------------------------------------------- a client in trouble

PROVENANCE = {"model": "mine (abc)", "licence": "MIT"}


def description(**changes: Any) -> bytes:
    served = {"name": "mine", "kind": "python", "licence": "MIT", "provenance": PROVENANCE}
    whole = {"protocol": 1, "rewards": [served], "max_body": 10**6, "longest_answer": 5.0}
    return json.dumps(whole | changes).encode()


def scored(values: list[Any], **changes: Any) -> bytes:
    reasons = [None if value is not None else "why" for value in values]
    whole = {"protocol": 1, "scores": values, "reasons": reasons, "provenance": PROVENANCE}
    return json.dumps(whole | changes).encode()


PAGE = b"<!doctype html><html><body>Please log in</body></html>"
PAIR = RewardBatch(torch.full((2, 3, 4, 4), 0.5), ["a", "b"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (PAGE, "no answer of protocol 1: Invalid JSON"),
        (b"", "no answer of protocol 1"),
        (scored([0.5]), "1 scores and 1 reasons for 2 pictures"),
        (scored([0.5] * 3), "3 scores and 3 reasons for 2 pictures"),
        (scored([0.5, "0.5"]), "no answer of protocol 1: scores.1"),
        (scored([0.5, True]), "no answer of protocol 1: scores.1"),
        (scored([0.5, 0.5], protocol=2), "no answer of protocol 1: protocol"),
        (scored([0.5, 0.5], provenance={}), "no answer of protocol 1: provenance"),
        (scored([0.5, 0.5], detail={"x": [1.0]}), "details that are not one number"),
    ],
)
def test_an_answer_that_is_none_fails_its_scores(body: bytes, reason: str) -> None:
    def answer(asked: Asked, number: int) -> Say:
        return Say(body=description() if asked.path == "/describe" else body)

    with fake_service(answer) as (url, _):
        scores = RemoteReward(url, "mine").score(PAIR)
    assert scores.values_B.isnan().all()
    assert all(one is not None and reason in one for one in scores.reasons), scores.reasons


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "the server gave nan"),
        (math.inf, "the server gave inf"),
        (None, "why"),
        (1e300, "not finite"),
    ],
)
def test_one_bad_number_fails_its_picture_alone(value: float | None, reason: str) -> None:
    def answer(asked: Asked, number: int) -> Say:
        return Say(body=description() if asked.path == "/describe" else scored([0.5, value]))

    with fake_service(answer) as (url, _):
        scores = RemoteReward(url, "mine").score(PAIR)
    assert scores.values_B[0] == 0.5 and scores.values_B[1].isnan()
    assert scores.reasons[0] is None and scores.reasons[1] is not None and reason in scores.reasons[1]


TROUBLE = {
    "busy": Say(503, b"{}", {"Retry-After": "0"}),
    "gateway": Say(502, PAGE),
    "cut off": Say(200, scored([0.5, 0.25]), cut=True),
    "failing": Say(500, b"oops"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_passing_trouble_loses_nothing(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    def answer(asked: Asked, number: int) -> Say:
        if asked.path == "/describe":
            return Say(body=description())
        return TROUBLE[trouble] if number < 2 else Say(body=scored([0.5, 0.25]))

    with fake_service(answer) as (url, asked):
        scores = RemoteReward(url, "mine", patience=5.0).score(PAIR)
    assert scores.values_B.tolist() == [0.5, 0.25]
    assert len(asked) == 3
    assert len({one.body for one in asked}) == 1
    assert ("is back" in caplog.text) is (trouble != "failing")


def test_lasting_failure_fails_the_scores() -> None:
    def answer(asked: Asked, number: int) -> Say:
        return Say(body=description()) if asked.path == "/describe" else TROUBLE["failing"]

    with fake_service(answer) as (url, asked):
        assert RemoteReward(url, "mine").score(PAIR).reasons == ("HTTP 500: oops",) * 2
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("say", "message"),
    [
        (TROUBLE["busy"], r"stayed away for 0\.3\d* s \(HTTP 503.*longer than its option `patience` allows"),
        (
            Say(401, b"no"),
            "does not let us in .*Is what the environment variable PIXRL_REWARD_TOKEN holds its key",
        ),
        (Say(404, b"nothing"), "no longer has it"),
        (
            Say(body=scored([0.5, 0.5], provenance={"model": "mine (def)"})),
            r"another one now: its model was 'mine \(abc\)' when the run began and is 'mine \(def\)'",
        ),
        (
            Say(body=scored([0.5, 0.5], provenance={**PROVENANCE, "segmenter": "s (123)"})),
            r"another one now: its segmenter was None when the run began and is 's \(123\)'",
        ),
        (Say(body=scored([0.5] * 2), after=0.4), "no answer within"),
    ],
)
def test_what_ends_a_run(say: Say, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixrl.rewards import remote as module

    monkeypatch.setattr(module, "TRANSFER", 0.1)

    def answer(asked: Asked, number: int) -> Say:
        return Say(body=description(longest_answer=0.1)) if asked.path == "/describe" else say

    with fake_service(answer) as (url, _):
        setting = RewardSetting(
            name="mine", kind="remote", options={"url": url, "reward": "mine", "patience": 0.3}
        )
        run = RewardSet([setting], time_limit=0.05, max_failed_share=1.0)
        with pytest.raises(ServiceError, match=message):
            run.score(PAIR)


def test_a_score_that_is_waited_for_is_not_cut_off_by_the_run() -> None:
    def answer(asked: Asked, number: int) -> Say:
        return Say(body=description() if asked.path == "/describe" else scored([0.5, 0.25]), after=0.2)

    with fake_service(answer) as (url, _):
        setting = RewardSetting(name="mine", kind="remote", options={"url": url, "reward": "mine"})
        found = RewardSet([setting], time_limit=0.05, max_failed_share=0.0).score(PAIR)
    assert found["mine"].values_B.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("say", "options", "message"),
    [
        (Say(body=PAGE), {}, "is no reward server of this version"),
        (
            Say(301, PAGE, {"Location": "http://example.org"}),
            {},
            "is no reward server of this version .HTTP 301",
        ),
        (Say(body=description(protocol=9)), {}, "is no reward server of this version"),
        (Say(body=description()), {"reward": "min"}, "has no reward 'min'. Did you mean 'mine'"),
        (Say(401, b"no"), {}, "does not let us in"),
        (Say(body=description()), {"batch": 0}, "batch is at least 1"),
        (Say(body=description()), {"url": "127.0.0.1:8765"}, "is no address of a service"),
        (Say(body=description()), {"url": "http://me:secret@127.0.0.1"}, "keys come from the environment"),
        (Say(body=description()), {"token_env": "PIXRL_NO_SUCH"}, "export PIXRL_NO_SUCH="),
    ],
)
def test_what_cannot_begin(say: Say, options: dict[str, Any], message: str) -> None:
    with (
        fake_service(lambda asked, number: say) as (url, _),
        pytest.raises((ConfigError, ServiceError), match=message),
    ):
        rewards.load("remote", **{"url": url, "reward": "mine", **options})


def test_nobody_there() -> None:
    begun = time.monotonic()
    with pytest.raises(ServiceError, match=r"stayed away.*refused.*pixrl serve-rewards FILE"):
        RemoteReward(f"http://127.0.0.1:{free_port()}", "mine", patience=0.3)
    assert time.monotonic() - begun < 2


def test_pauses_grow() -> None:
    found = [pause for pause, _ in zip(http.pauses(), range(20), strict=False)]
    assert found[:3] == [0.02, 0.04, 0.08]
    assert found[-1] == http.LONGEST_PAUSE


def test_nothing_is_asked_of_a_proxy_on_this_machine(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert remote(server).score(PAIR).values_B.isfinite().all()
