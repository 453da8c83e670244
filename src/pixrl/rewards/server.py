"""The server behind `pixrl serve-rewards`: rewards of this environment for runs in another one.

    GET  /health      is it there? Without a token; says nothing else.
    GET  /describe    its rewards with provenance and licence, and its limits.
    POST /score       `wire.Request` -> `wire.Answer`.

One batch is scored at a time; a few requests may wait, and further ones get 503 with Retry-After, as those do that have
waited too long. Who has no token learns and costs nothing: it is checked before a body is read, and a body's length
before its bytes. A reward that raises, hangs or gives nonsense answers with failed scores and the reason, as it would
in a run's own process (`RewardSet`).
"""

import hmac
import json
import logging
import socket
import socketserver
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
from pixrl.rewards.http import is_loopback
from pixrl.rewards.multi import RewardSet
from pixrl.rewards.settings import RewardSetting, check_rewards
from pixrl.types import RewardBatch

LEAST_TOKEN = 16
"""Characters."""
PROBE_SIDE = 64
DRAINED = 2**25
"""Bytes of a refused body that are read all the same, so that its sender hears why."""
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)
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
    queue_wait: float = Field(60.0, gt=0)
    """Seconds after which a waiting request is sent away to come again."""
    time_limit: float = Field(300.0, gt=0)
    """Seconds that one batch may take."""
    body_wait: float = Field(60.0, gt=0)
    """Seconds that a request's body may take to arrive."""
    connections: int = Field(64, ge=1)
    """Open at once, waiting ones included."""

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
        self._open = threading.BoundedSemaphore(settings.connections)
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
            longest_answer=self.settings.queue_wait + self.settings.time_limit + self.settings.body_wait,
        )

    def score(self, body: bytes) -> bytes:
        """The answer to a request.

        Raises:
            WireError: it is no request.
            UnknownRewardError: it asks for a reward that is not here.
            BusyError: others are scored for longer than it may wait.
        """
        name, batch = wire.read_request(body)
        if name not in self._rewards:
            raise UnknownRewardError(
                f"there is no reward {name!r} here.{did_you_mean(name, self._rewards)} "
                f"There are {', '.join(self._rewards)}."
            )
        if not self._scoring.acquire(timeout=self.settings.queue_wait):
            raise BusyError("others are being scored")
        try:
            begun = time.monotonic()
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
        """A thread for each connection, up to the limit; beyond it the sender is told to come again."""
        if self._open.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        request.setblocking(False)
        with suppress(OSError):
            request.send(REFUSAL)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or a mistake of ours: the server goes on."""
        _log.info("The connection of %s broke off.", client_address, exc_info=True)


class UnknownRewardError(PixrlError):
    """A request asks for a reward that the server has not."""


class BusyError(PixrlError):
    """Come again."""


class _Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = "pixrl"
    sys_version = ""
    timeout = 30.0
    """Seconds that the socket may be silent."""

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
        if kind == "Bearer" and hmac.compare_digest(given.encode(), self.server.token.encode()):
            return True
        self._drain()
        self._refuse(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong")
        return False

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
        deadline = time.monotonic() + seconds
        while length > 0 and time.monotonic() < deadline:
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
        _log.debug("%s " + format, self.address_string(), *args)


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
