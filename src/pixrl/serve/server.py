"""The server behind `pixrl serve-rewards`: rewards of this environment for runs in another one.

    GET  /health      is it there? Without a token; says nothing else.
    GET  /describe    its rewards with provenance and licence, and its limits.
    POST /score       `wire.Request` -> `wire.Answer`.

One batch is scored at a time; a few requests may wait, and further ones get 503 with Retry-After, as those do that have
waited too long. Who has no token learns and costs nothing: it is checked before a body is read, and a body's length
before its bytes. A reward that raises, hangs or gives nonsense answers with failed scores and the reason, as it would
in a run's own process (`RewardSet`).

Connections that have not shown the token have places of their own and a few seconds in all; where those are taken, the
oldest of them gives way to a new one, so that strangers who send a byte now and then keep nobody out. In memory are at
most `queue` + 1 bodies and the one batch that is scored, whose size `wire` bounds before it is unfolded.
"""

import hmac
import io
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from pixrl.config import Settings
from pixrl.errors import InputError, PixrlError, did_you_mean
from pixrl.rewards import wire
from pixrl.rewards.http import LONGEST_WAIT, is_loopback
from pixrl.rewards.set import RewardSet
from pixrl.rewards.settings import RewardSetting, check_rewards
from pixrl.types import RewardBatch
from pixrl.untrusted import plain

LEAST_TOKEN = 16
"""Characters."""
PROBE_SIDE = 64
DRAINED = 2**25
"""Bytes of a refused body that are read all the same, so that its sender hears why."""
STRANGERS = 256
"""Connections at once that have not shown the token yet."""
ANSWER_WAIT = 30.0
"""Seconds that a client may take to receive its answer."""
_log = logging.getLogger("pixrl")


class ServedReward(Settings):
    """One reward that a server offers."""

    name: str = Field(min_length=1)
    """What clients call it; also which reward it is, unless `kind` says so."""
    kind: str | None = None
    """Which reward of the table, where the name is another one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The options of the reward's class, such as `model: toy:clip`."""

    @property
    def setting(self) -> RewardSetting:
        """As a run has it."""
        return RewardSetting(name=self.name, kind=self.kind, options=self.options)


class ServeSettings(Settings):
    """A reward server."""

    rewards: tuple[ServedReward, ...]
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs a token of your own. Nothing is encrypted."""
    port: int = Field(8765, ge=0, le=65535)
    """0: any free one."""
    max_body_mb: float = Field(64.0, gt=0, le=1024)
    """Largest request, in MiB."""
    queue: int = Field(8, ge=0)
    """Requests that may wait for the one that is scored."""
    queue_wait: float = Field(60.0, gt=0, le=LONGEST_WAIT / 4)
    """Seconds after which a waiting request is sent away to come again."""
    time_limit: float = Field(300.0, gt=0, le=LONGEST_WAIT / 4)
    """Seconds that one batch may take."""
    head_wait: float = Field(10.0, gt=0, le=LONGEST_WAIT)
    """Seconds that a request's head, with the token, may take to arrive, however it comes."""
    body_wait: float = Field(60.0, gt=0, le=LONGEST_WAIT / 4)
    """Seconds that a request's body may take to arrive, however it comes."""
    connections: int = Field(64, ge=1, le=4096)
    """Open at once that have shown the token, waiting ones included."""

    @field_validator("host")
    @classmethod
    def _is_named(cls, host: str) -> str:
        if not host:
            raise ValueError("an empty host would listen everywhere: say 0.0.0.0 if that is meant")
        return host

    @model_validator(mode="after")
    def _parts_fit(self) -> "ServeSettings":
        check_rewards([reward.setting for reward in self.rewards], ())
        if self.connections <= self.queue:
            raise ValueError(
                f"connections ({self.connections}) must be above queue ({self.queue}), whose requests keep theirs open"
            )
        return self


def check_token(token: str) -> str:
    """The token, if it can be one.

    Raises:
        InputError: it is short, or holds what no HTTP header can.
    """
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"A server's token has at least {LEAST_TOKEN} characters, printable and without a blank; this one has "
            f"{len(token)}. Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


class RewardServer(ThreadingHTTPServer):
    """Listens from the start, so that a taken port shows before models are loaded; answers once `open` was called.

    Raises:
        InputError: the token is none, or the address cannot be listened at.
        ConfigError: an option of a reward is wrong.
        CheckpointError: a model that a reward needs is missing or half written.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, settings: ServeSettings, token: str) -> None:
        self.settings = settings
        self.token = check_token(token)
        self.max_body = int(settings.max_body_mb * 2**20)
        self.served: tuple[wire.Served, ...] = ()
        self._rewards: Mapping[str, RewardSet] = {}
        self._places = threading.BoundedSemaphore(settings.queue + 1)
        self._scoring = threading.Lock()
        self._connections = threading.Lock()
        self._strangers: dict[socket.socket, None] = {}  # in the order in which they came
        self._known: set[socket.socket] = set()
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        super().__init__((settings.host, settings.port), _Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise InputError(
                f"Cannot listen at {settings.host}, port {settings.port}: {error.strerror or error}. Is another server "
                "there? Give another one: --port 0 takes any that is free."
            ) from None

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the network for its own name
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)

    @property
    def url(self) -> str:
        """Where clients on this machine, or those that a tunnel brings here, find it."""
        host = self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def open(self) -> None:
        """Loads every reward, tries each on a grey picture, and lets clients in."""
        limit = self.settings.time_limit
        self._rewards = {
            one.name: RewardSet([one.setting], time_limit=limit, max_failed_share=1.0)
            for one in self.settings.rewards
        }
        self.served = tuple(_try(self._rewards[one.name], one) for one in self.settings.rewards)
        self.server_activate()

    def description(self) -> wire.Description:
        """What `/describe` answers."""
        return wire.Description(
            protocol=wire.PROTOCOL,
            rewards=list(self.served),
            max_body=self.max_body,
            max_pixels=wire.MOST_PIXELS,
            longest_answer=self.settings.queue_wait + self.settings.time_limit + self.settings.body_wait,
        )

    def score(self, body: bytes) -> bytes:
        """The answer to a request.

        Raises:
            WireError: it is no request.
            UnknownRewardError: it asks for a reward that is not here.
            BusyError: others are scored for longer than it may wait.
        """
        if not self._scoring.acquire(timeout=self.settings.queue_wait):
            raise BusyError("others are being scored")
        try:  # the pictures of one request at a time are unfolded
            begun = time.monotonic()
            name, batch = wire.read_request(body)
            if name not in self._rewards:
                raise UnknownRewardError(
                    f"there is no reward {plain(name)!r} here.{did_you_mean(name, self._rewards)} "
                    f"There are {', '.join(self._rewards)}."
                )
            scores = self._rewards[name].score(batch)[name]
        finally:
            self._scoring.release()
        failed = sum(reason is not None for reason in scores.reasons)
        seconds = time.monotonic() - begun
        _log.info("%s: %d pictures, %d failed, %.2f s", name, len(scores.reasons), failed, seconds)
        return wire.answer(scores)

    def take_place(self) -> bool:
        """A place in the queue, or at the counter; `leave_place` gives it back."""
        return self._places.acquire(blocking=False)

    def leave_place(self) -> None:
        self._places.release()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each connection; the stranger who came first gives way where there are too many."""
        with self._connections:
            self._strangers[request] = None
            if len(self._strangers) > STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread, which reads, then ends and closes it
        super().process_request(request, client_address)

    def let_in(self, request: socket.socket) -> bool:
        """A connection that has shown the token is no stranger any more. False: so many are open already."""
        with self._connections:
            if request not in self._strangers or len(self._known) >= self.settings.connections:
                return False
            del self._strangers[request]
            self._known.add(request)
            return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._connections:
                self._strangers.pop(request, None)
                self._known.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or a mistake of ours: the server goes on."""
        error = sys.exc_info()[1]
        mistake = not isinstance(error, OSError)
        _log.info("The connection of %s broke off: %s", client_address[0], error, exc_info=mistake)


class UnknownRewardError(PixrlError):
    """A request asks for a reward that the server has not."""


class BusyError(PixrlError):
    """Come again."""


class _Incoming(io.RawIOBase):
    """What a connection receives, up to a moment: a socket's own limit is one of silence, which every byte renews."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self.give(seconds)

    def give(self, seconds: float) -> None:
        """So much time from now on, in all."""
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it did not arrive in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = "pixrl"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()  # its limit is one of silence
        self._incoming = _Incoming(self.connection, self.server.settings.head_wait)
        self.rfile = io.BufferedReader(self._incoming)

    def do_GET(self) -> None:
        if self.path == "/health":
            self._say(HTTPStatus.OK, b'{"status": "ok"}')
        elif self._let_in():
            if self.path == "/describe":
                self._say(HTTPStatus.OK, self.server.description().model_dump_json().encode())
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there are /health, /describe and /score")

    def do_POST(self) -> None:
        if not self._let_in():
            return
        if self.path != "/score":
            self._refuse(HTTPStatus.NOT_FOUND, "there are /health, /describe and /score")
            return
        if not self.server.take_place():
            self._drain()
            self._come_again("the queue is full")
            return
        try:
            body = self._body()
            if body is not None:
                self._score(body)
        finally:
            self.server.leave_place()

    def _score(self, body: bytes) -> None:
        try:
            self._say(HTTPStatus.OK, self.server.score(body))
        except wire.WireError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except UnknownRewardError as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except BusyError as error:
            self._come_again(str(error))
        except PixrlError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _let_in(self) -> bool:
        """Whether the token is right; compared in a time that does not tell how much of it is."""
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or not hmac.compare_digest(given.encode(), self.server.token.encode()):
            self._drain()
            self._refuse(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong")
            return False
        if not self.server.let_in(self.connection):
            self._drain()
            self._come_again("too many connections are open")
            return False
        return True

    def _body(self) -> bytes | None:
        """The request's body; None where it was refused."""
        length = self._length()
        if length is None:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "a body comes with its Content-Length")
            return None
        if length > self.server.max_body:
            self._drain()
            limit = self.server.max_body
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes are above the limit of {limit}"
            )
            return None
        body = b"".join(self._pieces(length, self.server.settings.body_wait))
        if len(body) < length:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"{len(body)} of {length} bytes came in time")
            return None
        return body

    def _length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        chunked = "Transfer-Encoding" in self.headers
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 and not chunked else None

    def _pieces(self, length: int, seconds: float) -> Iterator[bytes]:
        """As much of the body as comes in time."""
        self._incoming.give(seconds)
        while length > 0:
            try:
                part = self.rfile.read1(min(length, 2**20))
            except TimeoutError:
                return
            if not part:
                return
            length -= len(part)
            yield part

    def _drain(self) -> None:
        """Reads on for a moment: a sender that is cut off while it sends never hears the answer."""
        for _ in self._pieces(min(self._length() or 0, DRAINED), 2.0):
            pass

    def _come_again(self, why: str) -> None:
        self._say(HTTPStatus.SERVICE_UNAVAILABLE, _error(why), {"Retry-After": "1"})

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._say(status, _error(why))

    def _say(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.close_connection = True
        self.connection.settimeout(ANSWER_WAIT)
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "Cache-Control": "no-store",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        _log.debug("%s %s", self.address_string(), plain(format % args))


def _error(why: str) -> bytes:
    return json.dumps({"error": why}).encode()


def _try(rewards: RewardSet, served: ServedReward) -> wire.Served:
    """A reward's first scores: warms it up, and shows what produces them."""
    grey = torch.full((1, 3, PROBE_SIDE, PROBE_SIDE), 0.5)
    scores = rewards.score(RewardBatch(grey, ["a photo"], [{}]))[served.name]
    provenance = dict(scores.provenance)
    problem = scores.reasons[0]
    if problem is not None:
        _log.warning("The reward %r gives a grey picture no score: %s", served.name, problem)
    return wire.Served(
        name=served.name,
        kind=served.setting.reward,
        licence=provenance.get("licence", "not stated"),
        provenance=provenance,
        problem=problem,
    )


def is_open_to_others(settings: ServeSettings) -> bool:
    """Whether other machines reach it."""
    return not is_loopback(settings.host)
