"""Services that drip, lie, echo keys or send what unfolds: a result or one sentence, in bounded time and memory."""

import asyncio
import base64
import gzip
import io
import json
import logging
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.rewards.services import TOKEN, Asked, Process, Say, fake_service, free_port, reward_server
from tests.rewards.test_remote import PAIR, call, description, message, scored

from pixrl.errors import ConfigError, ServiceError
from pixrl.rewards import http, judge, wire
from pixrl.rewards.http import Reply, Service, Silence, seconds_of
from pixrl.rewards.judge import JudgeReward, RatingScale
from pixrl.rewards.remote import RemoteReward
from pixrl.serve import server as serving
from pixrl.serve.server import STRANGERS, RewardServer
from pixrl.types import RewardBatch

KEY = "sk-test/A+very=secret_Key.0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXRL_REWARD_TOKEN", TOKEN)
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text("def ones(images, prompts, metadata): return [1.0] * len(images)\n")
    return f"{tmp_path / 'mine.py'}:ones"


# ---------------------------------------------------------------------------------------------- the server


def line_to(server: RewardServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def is_closed(line: socket.socket) -> bool:
    """Whether the other side hung up."""
    line.settimeout(5)
    try:
        return line.recv(4096) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def head_of(length: int) -> bytes:
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode()


def wait_until(found: Callable[[], bool]) -> None:
    for _ in range(500):
        if found():
            return
        time.sleep(0.01)
    pytest.fail("it never came to be")


def test_strangers_keep_nobody_out(function: str) -> None:
    with reward_server(function, head_wait=60.0) as server:
        drips = [line_to(server) for _ in range(STRANGERS + 40)]
        for line in drips:
            with suppress(ConnectionError):
                line.sendall(b"POST /sco")
        assert call(f"{server.url}/health", token=None)[0] == 200
        assert call(f"{server.url}/describe")[0] == 200
        assert call(f"{server.url}/score", message())[0] == 200
        assert is_closed(drips[0])  # the oldest had to give way
        drips[-1].sendall(b"re HTTP/1.1\r\nHost: x\r\n\r\n")
        assert drips[-1].recv(4096).startswith(b"HTTP/1.1 401")
        for line in drips:
            line.close()


@pytest.mark.parametrize("start", [b"", b"GET /describe HTTP/1.1\r\n", b"GET /describe HTTP/1.1\r\nX: "])
def test_a_head_has_a_time_limit_in_all(function: str, start: bytes) -> None:
    with reward_server(function, head_wait=0.2) as server, line_to(server) as line:
        line.sendall(start)
        with pytest.raises(ConnectionError):  # without a limit in all, every byte would begin a new one
            for _ in range(200):
                line.sendall(b"a")
                time.sleep(0.02)


def test_a_body_has_a_time_limit_in_all(function: str) -> None:
    with reward_server(function, body_wait=0.2) as server, line_to(server) as line:
        line.sendall(head_of(9999))
        with suppress(ConnectionError):
            for _ in range(200):
                line.sendall(b"a")
                time.sleep(0.02)
                line.settimeout(0.001)
                with suppress(TimeoutError):
                    assert line.recv(4096).startswith(b"HTTP/1.1 408")
                    return
                line.settimeout(10)
        pytest.fail("the server never said that the body came too slowly")


def test_a_strangers_body_is_read_for_a_moment_only(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "DRAIN_WAIT", 0.2)
    with reward_server(function) as server, line_to(server) as line:
        line.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        begun = time.monotonic()
        line.sendall(b"a")
        assert line.recv(4096).startswith(b"HTTP/1.1 401")
        assert 0.1 < time.monotonic() - begun < 5.0


def test_a_client_that_does_not_take_its_answer_is_cut_off(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "ANSWER_WAIT", 0.2)
    with reward_server(function) as server, line_to(server) as line:
        (one,) = server.served
        server.served = (one.model_copy(update={"provenance": {"x": "y" * 2**25}}),)
        line.sendall(f"GET /describe HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        wait_until(lambda: bool(server.known))
        wait_until(lambda: not server.known)


def test_a_client_that_only_listens_gets_its_answer(function: str) -> None:
    """It has shut its half of the connection once all was sent; one that sent too little hears that at once."""
    body = message()
    for sent, status in ((body, b"200"), (body[:-1], b"408")):
        with reward_server(function) as server, line_to(server) as line:
            line.sendall(head_of(len(body)) + sent)
            line.shutdown(socket.SHUT_WR)
            assert line.recv(4096).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    "start", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"GET /health HTTP/1.1\r\nUpgrade: websocket\r\n"]
)
def test_strangers_fill_no_log(function: str, start: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with reward_server(function) as server, line_to(server) as line:
        line.sendall(start + b"Connection: upgrade\r\nHost: x\r\n\r\n")
        assert line.recv(4096).startswith(b"HTTP/1.1 ")
    assert not caplog.records


def test_ctrl_c_ends_the_server_though_a_reward_hangs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def slow(images, prompts, metadata):\n"
        "    time.sleep(0 if prompts == ['a photo'] else 60)\n"
        "    return [1.0] * len(images)\n"
    )
    server = Process(tmp_path, f"{tmp_path / 'mine.py'}:slow", free_port())
    server.start()
    assert server.process is not None and server.process.stdout is not None
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
            line.sendall(head_of(len(message())) + message())
            time.sleep(0.5)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert line.recv(4096).startswith(b"HTTP/1.1 503")  # so the client comes again
        assert server.wait(30) == 0
        assert time.monotonic() - begun < 20
        assert "Stopped. Runs that use it wait for it to come back." in server.process.stdout.read()
    finally:
        server.kill()


def test_a_stranger_that_breaks_off_while_it_sends_stops_nobody(function: str) -> None:
    with reward_server(function) as server:
        with line_to(server) as line:
            line.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\nabc")
            time.sleep(0.1)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: not server.strangers)
        assert call(f"{server.url}/score", message())[0] == 200


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def bodies_that_unfold() -> Iterator[tuple[str, bytes, str]]:
    small = png(8, 8)
    many = 100_000
    yield (
        "wide",
        message(pictures={"png": [png(20_000, 1)] * 2}),
        "20000 x 1 pixels; one side may be at most 16",
    )
    yield "high", message(pictures={"png": [png(1, 100_000)] * 2}), "1 x 100000 pixels"
    yield (
        "repeated images",
        message(prompts=["a"] * many, images=[0] * many, metadata=[], pictures={"png": [small]}),
        "uses 100000 pictures, and at most 256",
    )
    yield (
        "repeated references",
        message(metadata=[{}, {"reference": {"$pictures": [0] * many}}]),
        "uses 100002 pictures",
    )
    nested: list[Any] = [{"$picture": 0}] * 300
    yield "references in lists", message(metadata=[{}, {"a": {"b": nested}}]), "uses 302 pictures"
    yield (
        "large ones repeated",
        message(pictures={"png": [png(8, 8), png(2048, 2048)]}, images=[0, 0])[:-1]
        + b',"metadata":[{},{"r":{"$pictures":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]}}]}',
        "more than 67108864 pixels in all",
    )
    yield "unused ones", message(pictures={"png": [small] * 300}), "300 pictures were sent, and at most 256"
    yield "values", message(metadata=[{}, {"a": [[]] * 2**20}]), "values, and at most 1048576 are read"
    yield (
        "depth",
        message()[:-1] + b', "metadata": [{}, {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}]}",
        "no request",
    )
    header = base64.b64encode((2**40).to_bytes(8, "little") + b"{}").decode()
    yield "header", message(pictures={"safetensors": header}), "header of at most 65536 bytes"
    yield "name", message(reward="x" * 10**6), "reward: String should have at most 256 characters"


@pytest.mark.parametrize(
    ("body", "reason"), [pytest.param(body, why, id=name) for name, body, why in bodies_that_unfold()]
)
def test_what_unfolds_is_refused_before_it_does(
    function: str, body: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfolds(*given: object) -> None:
        raise AssertionError("it was unfolded")

    monkeypatch.setattr(wire.np, "array", unfolds)
    monkeypatch.setattr(wire.torch, "stack", unfolds)
    with pytest.raises(wire.WireError, match=re.escape(reason)):
        wire.read_request(body)


def test_a_pictures_cost_is_that_of_the_enlarged_one() -> None:
    assert wire.cost(1024, 1024) == 1024**2
    assert wire.cost(8, 8) == 512**2
    assert wire.cost(16, 256) == 512 * 8192
    assert wire.cost(2048, 1024) == 2048 * 1024
    for size in ((0, 8), (8, 129), (129, 8)):
        with pytest.raises(wire.WireError, match="one side may be at most 16 times the other"):
            wire.cost(*size)


def test_a_client_sends_no_more_than_the_server_takes(function: str) -> None:
    """Group samples share their references, which count for each of them."""
    references = torch.rand(40, 3, 16, 16)
    batch = RewardBatch(torch.rand(12, 3, 16, 16), ["a"] * 12, [{"reference": references}] * 12)
    with reward_server(function) as server:
        found = RemoteReward(server.url, "mine").score(batch)
    assert found.reasons == (None,) * 12 and bool((found.values_B == 1).all())


@pytest.mark.parametrize("entry", [{"note": "half \ud83d"}, {"half \ud83d": 1}, {"a": [{"b": "\ud83d"}]}])
def test_a_text_that_is_no_unicode_fails_its_picture_alone(function: str, entry: dict[str, object]) -> None:
    with reward_server(function) as server:
        found = RemoteReward(server.url, "mine").score(
            RewardBatch(torch.rand(3, 3, 8, 8), ["a", "b", "c"], [{}, entry, {}])
        )
    assert found.values_B[[0, 2]].tolist() == [1.0, 1.0] and found.values_B[1].isnan()
    assert found.reasons[1] is not None and "is half a character" in found.reasons[1]


def test_a_client_that_hangs_up_is_one_line_in_the_log(
    function: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with reward_server(function) as server:
        with line_to(server) as line:
            line.sendall(head_of(9))
            wait_until(lambda: bool(server.known))
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # so closing resets
        wait_until(lambda: not server.known)
    assert "The connection of 127.0.0.1 broke off: [Errno 104]" in caplog.text
    assert "Traceback" not in caplog.text and not any(one.exc_info for one in caplog.records)


# ---------------------------------------------------------------------------------------------- the client


Speak = Callable[[socket.socket], None]


@contextmanager
def raw_service(speak: Speak, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """What answers each connection by itself; a drip ends when the client hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            with suppress(OSError):
                if context is not None:
                    line = context.wrap_socket(line, server_side=True)
                line.recv(2**16)
                speak(line)
            line.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"{'http' if context is None else 'https'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)
        assert not thread.is_alive()


def drip(start: bytes, drop: bytes, end: bytes) -> Speak:
    """A whole answer, in drops that take ten times as long as the client waits."""

    def speak(line: socket.socket) -> None:
        line.sendall(start)
        for _ in range(60):
            line.sendall(drop)
            time.sleep(0.05)
        line.sendall(end)

    return speak


OK = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "status line": drip(b"HTTP/1.1 200 ", b"O", b"\r\nContent-Length: 2\r\n\r\n{}"),
    "headers": drip(OK, b"X-A: b\r\n", b"Content-Length: 2\r\n\r\n{}"),
    "one header": drip(OK + b"X-A: ", b"b", b"\r\nContent-Length: 2\r\n\r\n{}"),
    "continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"Content-Length: 2\r\n\r\n{}"),
    "body": drip(OK + b"Content-Length: 61\r\n\r\n", b" ", b"1"),
    "body to the end": drip(OK + b"\r\n", b" ", b"1"),
    "chunks": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", b"0\r\n\r\n"),
    "trailer": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n", b"\r\n"),
    "error": drip(b"HTTP/1.1 500 Oh\r\n", b"X-A: b\r\n", b"Content-Length: 2\r\n\r\n{}"),
}
SLOW = Silence("no answer within 0.3 s", slow=True)


@pytest.mark.parametrize("where", DRIPS)
def test_no_drip_outlasts_the_time_limit(where: str) -> None:
    """A limit of silence alone would wait for the whole answer, which is a good one."""
    with raw_service(DRIPS[where]) as url:
        assert Service(url, name="It", key_env=None).ask("/x", None, 0.3) == SLOW


def test_nor_does_a_service_that_never_reads() -> None:
    """More is sent than the system holds for a connection."""
    over = threading.Event()
    with raw_service(lambda line: assert_true(over.wait(20))) as url:
        found = Service(url, name="It", key_env=None).ask("/x", b"x" * 2**26, 0.3)
        over.set()
    assert found == SLOW


def assert_true(value: bool) -> None:
    assert value


def test_nor_does_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, which makes the certificate")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    with raw_service(lambda line: line.sendall(OK + b"Content-Length: 2\r\n\r\n{}"), context) as url:
        assert Service(url, name="It", key_env=None).ask("/x", None, 20.0) == Reply(200, b"{}")
    with raw_service(DRIPS["headers"], context) as url:
        assert Service(url, name="It", key_env=None).ask("/x", None, 0.3) == SLOW


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("-5", None),
        ("+5", None),
        ("1e9", None),
        ("inf", None),
        ("nan", None),
        ("²", None),
        ("٣", None),
        ("9" * 15, 1e15 - 1),
        ("9" * 400, None),
        ("9" * 100_000, None),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None),
        ("Wed, 21 Oct 99999 07:28:00 GMT", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
        ("Wed, 21 Oct 2015 07:28:00 +9999999999999999999", None),
        ("Mon, 01 Jan 0001 00:00:00 +2359", None),
    ],
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000", "+0200"])
def test_retry_after_as_a_date(zone: str) -> None:
    shift = timedelta(hours=2) if zone == "+0200" else timedelta()
    moment = format_datetime(datetime.now(UTC) + timedelta(hours=1) + shift).replace("+0000", zone)
    found = seconds_of(moment)
    assert found is not None and 3000 < found <= 3600


@pytest.mark.parametrize("asked", ["-1", "9" * 400, "²", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_a_bad_retry_after_loses_nothing(asked: str) -> None:
    def answer(request: Asked, number: int) -> Say:
        if request.path == "/describe":
            return Say(body=description())
        return Say(503, b"{}", {"Retry-After": asked}) if number == 0 else Say(body=scored([0.5, 0.25]))

    with fake_service(answer) as (url, _):
        assert RemoteReward(url, "mine", patience=5.0).score(PAIR).values_B.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\n{}",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}",
    ],
)
def test_no_answer_is_a_traceback(head: bytes) -> None:
    with raw_service(lambda line: line.sendall(head)) as url:
        found = Service(url, name="It", key_env=None).ask("/x", None, 10.0)
    assert isinstance(found, Reply | Silence)
    said = found.reason if isinstance(found, Silence) else found.text
    assert said.isprintable() and len(said) < 400


def test_an_answer_is_counted_as_it_comes_and_never_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(bytes(2**20))
    head = OK + f"Content-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
    with raw_service(lambda line: line.sendall(head + packed)) as url:
        assert Service(url, name="It", key_env=None).ask("/x", None, 5.0) == Reply(200, packed)
        monkeypatch.setattr(http, "MOST_BYTES", len(packed) - 1)
        found = Service(url, name="It", key_env=None).ask("/x", None, 5.0)
    assert found == Silence(f"an answer of more than {len(packed) - 1} bytes")


def test_a_service_is_asked_where_an_event_loop_runs_already() -> None:
    """As in a notebook."""

    async def ask(service: Service) -> Reply | Silence:
        return service.ask("/x", None, 5.0)

    with raw_service(lambda line: line.sendall(OK + b"Content-Length: 2\r\n\r\n{}")) as url:
        assert asyncio.run(ask(Service(url, name="It", key_env=None))) == Reply(200, b"{}")


def test_the_proxy_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service("http://nowhere.invalid/v1", name="It", key_env=None)
    with raw_service(lambda line: line.sendall(OK + b"Content-Length: 2\r\n\r\n{}")) as url:
        for proxy in (url, url.removeprefix("http://")):
            monkeypatch.setenv("http_proxy", proxy)
            assert service.ask("/x", None, 5.0) == Reply(200, b"{}")
        monkeypatch.setenv("no_proxy", "nowhere.invalid")
        assert isinstance(service.ask("/x", None, 5.0), Silence)
        monkeypatch.delenv("no_proxy")
    for proxy in ("ftp://127.0.0.1:9", "http://127.0.0.1:x", "http://[::1"):
        monkeypatch.setenv("http_proxy", proxy)
        found = service.ask("/x", None, 5.0)
        assert isinstance(found, Silence) and found.hopeless, found
        assert "the proxy that the environment names is of no use" in found.reason


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://127.0.0.1:x",
        "http://a..b/",
        f"http://{'a' * 70}.org",
        "http://exämple.org/ü",
        "http://host/with blank",
        "http://host/\x1b[2J",
        "http://host\n/x",
        "http://",
        "http://host/v1?key=SECRET",
        "http://host/v1#SECRET",
        "http://me:SECRET@[::1",
        "ftp://me:SECRET@host",
        "http://me:SECRET@host",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        Service(url, name="It", key_env=None)
    assert "SECRET" not in str(error.value) and str(error.value).isprintable()


# ---------------------------------------------------------------------------------------------- keys and texts


def spellings() -> dict[str, str]:
    return {
        "as it is": KEY,
        "in JSON": json.dumps(KEY).strip('"'),
        "as PHP writes it": KEY.replace("/", "\\/"),
        "as .NET writes it": KEY.replace("+", "\\u002B"),
        "in an address": KEY.replace("/", "%2F").replace("+", "%2b").replace("=", "%3D"),
        "in small letters": KEY.lower(),
        "cut": f"{KEY[:20]}...",
        "every sign escaped": "".join(f"\\u{ord(sign):04x}" for sign in KEY),
    }


def holds_key(text: str) -> bool:
    """Whether a text shows eight signs of the key in a row."""
    plain = text.lower().replace("\\/", "/").replace("%2f", "/")
    plain = re.sub(r"\\u00([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), plain)
    return KEY[:8].lower() in plain or KEY[8:16].lower() in plain


@pytest.mark.parametrize("way", spellings())
@pytest.mark.parametrize("status", [200, 400, 401, 404, 500, 503])
def test_a_key_that_a_service_echoes_is_nowhere(
    way: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    echo = spellings()[way]
    assert holds_key(echo)

    def answer(asked: Asked, number: int) -> Say:
        if asked.path == "/describe":
            return Say(body=description())
        assert asked.headers["Authorization"] == f"Bearer {KEY}"
        if status == 200:
            entry = {"scores": [0.5, None], "reasons": [None, f"KEY {echo}"], "protocol": 1}
            body = json.dumps(entry | {"provenance": {"model": "mine (abc)", "licence": "MIT", "x": "KEY"}})
            return Say(body=body.replace("KEY", f"Bearer {echo}").encode())
        return Say(status, f"wrong key: {echo}".encode(), {"Retry-After": "0"})

    caplog.set_level(logging.DEBUG, "pixrl")
    said = ""
    with fake_service(answer) as (url, asked):
        reward = RemoteReward(url, "mine", token_env="MY_KEY", patience=0.05)
        try:
            scores = reward.score(PAIR)
            said = repr((scores, reward.provenance))
        except ServiceError as error:
            said = str(error)
    assert asked and said
    assert not holds_key(said) and not holds_key(caplog.text)
    assert "[secret]" in said


def test_a_key_in_what_is_no_http_is_nowhere() -> None:
    with raw_service(lambda line: line.sendall(f"BAD {KEY}\r\n\r\n".encode())) as url:
        found = Service(url, name="It", key_env="MY_KEY").ask("/x", None, 5.0)
    assert isinstance(found, Silence) and "[secret]" in found.reason and not holds_key(found.reason)


def test_a_word_in_place_of_a_key_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "EMPTY")
    with raw_service(lambda line: line.sendall(OK + b"Content-Length: 5\r\n\r\nEMPTY")) as url:
        assert Service(url, name="It", key_env="MY_KEY").ask("/x", None, 5.0) == Reply(200, b"EMPTY")


def test_what_a_server_says_is_one_line_that_moves_no_cursor() -> None:
    nasty = "\x1b[2J\x1b[1;31mall is well\r\n\u202efake\x00" + "x" * 10**6

    def answer(asked: Asked, number: int) -> Say:
        if asked.path == "/describe":
            return Say(body=description())
        return Say(body=scored([None, 0.5], reasons=[nasty, None], detail={"a\nb": [1.0, 2.0]}))

    with fake_service(answer) as (url, _):
        scores = RemoteReward(url, "mine").score(PAIR)
    reason = scores.reasons[0]
    assert reason is not None and reason.isprintable() and len(reason) < 400 and "all is well" in reason
    assert list(scores.detail) == ["a b"]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_body": 0},
        {"max_body": -5},
        {"max_pixels": 0},
        {"longest_answer": -1.0},
        {"longest_answer": 1e300},
        {"longest_answer": float("inf")},
        {"longest_answer": float("nan")},
    ],
)
def test_limits_that_cannot_be_are_no_description(changes: dict[str, Any]) -> None:
    with (
        fake_service(lambda asked, number: Say(body=description(**changes))) as (url, _),
        pytest.raises(ConfigError, match="is no reward server of this version"),
    ):
        RemoteReward(url, "mine")


def test_an_address_holds_no_key() -> None:
    with pytest.raises(ConfigError, match="holds the key itself") as error:
        Service(f"http://127.0.0.1/{KEY}/v1", name="It", key_env="MY_KEY")
    assert not holds_key(str(error.value))


# ---------------------------------------------------------------------------------------------- the judge


def test_thoughts_are_left_out_as_ever() -> None:
    """Against the pattern that says it in one line, and takes quadratic time."""
    pattern = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
    for words in product(["<think>", "</THINK>", "<thinking>", "a\n"], repeat=5):
        text = "".join(words)
        assert judge._without_thoughts(text) == pattern.sub(" ", text)


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 300_000,
        "</think>" * 300_000,
        "<think>" * 300_000 + "</think>" * 300_000,
        "{" * 10**6,
        "{ " * 10**6,
        '{"score":' * 200_000,
        "score " * 300_000,
        "score" + " " * 10**6,
        "score: " + "1" * 10**6 + "x",
        "1" * 10**6,
        "* " * 10**6,
        "score is " * 200_000,
        "score: 1/" * 200_000,
        "9" * 10**6 + ".",
    ],
    ids=lambda text: text[:12],
)
def test_a_judges_text_is_read_in_one_pass(text: str) -> None:
    """Millions of signs: in quadratic time (53 s for 16,000 thoughts) this would take hours."""
    RatingScale(1, 10).read(text)


@pytest.mark.parametrize(
    "request_", [{"api_key": "abc"}, {"extra": {"Authorization": "Bearer abc"}}, {"user_token": "abc"}]
)
def test_a_recipe_holds_no_key(request_: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="name that as key_env") as error:
        JudgeReward("http://127.0.0.1:9/v1", "m", request=request_, patience=0.0)
    assert "abc" not in str(error.value)


@pytest.mark.parametrize("time_limit", [float("inf"), 1e300, float("nan"), 0.0, -1.0])
def test_a_judges_time_limit_is_a_time(time_limit: float) -> None:
    with pytest.raises(ConfigError, match="at most a day"):
        JudgeReward("http://127.0.0.1:9/v1", "m", time_limit=time_limit, patience=0.0)
