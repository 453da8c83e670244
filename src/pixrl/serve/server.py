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
most `queue` + 1 bodies, some 300 KiB of what each other connection sends, and the one batch that is scored, whose size
`wire` bounds before it is unfolded.
"""

import asyncio
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import anyio
import torch
import uvicorn
from pydantic import Field, field_validator, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pixrl.config import Settings
from pixrl.errors import InputError, PixrlError, did_you_mean
from pixrl.rewards import wire
from pixrl.rewards.http import LONGEST_WAIT
from pixrl.rewards.set import RewardSet
from pixrl.rewards.settings import RewardSetting, check_rewards
from pixrl.types import RewardBatch
from pixrl.untrusted import plain

LEAST_TOKEN = 16
"""Characters of a token, at least."""
PROBE_SIDE = 64
"""Pixels a side of the grey picture that each reward is tried on."""
DRAINED, DRAIN_WAIT = 2**25, 2.0
"""Bytes of a refused body that are read all the same, and seconds for it, so that its sender hears why."""
STRANGERS = 256
"""Connections at once that have not shown the token yet."""
ANSWER_WAIT = 30.0
"""Seconds that a client may take to receive its answer."""
_log = logging.getLogger("pixrl")
T = TypeVar("T")


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


class RewardServer:
    """Takes its port from the start, so that a taken one shows before models are loaded; `open` lets clients in.

    Raises:
        InputError: the token is none, or the address cannot be listened at.
        ConfigError: an option of a reward is wrong.
        CheckpointError: a model that a reward needs is missing or half written.
    """

    def __init__(self, settings: ServeSettings, token: str) -> None:
        self.settings = settings
        self.served: tuple[wire.Served, ...] = ()
        self.strangers: dict[_Connection, None] = {}  # in the order in which they came
        self.known: set[_Connection] = set()
        self._token = check_token(token).encode()
        self._max_body = int(settings.max_body_mb * 2**20)
        self._rewards: Mapping[str, RewardSet] = {}
        self._places = asyncio.Semaphore(settings.queue + 1)
        self._scoring = asyncio.Lock()
        self._socket = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((settings.host, settings.port))
        except OSError as error:
            self._socket.close()
            raise InputError(
                f"Cannot listen at {settings.host}, port {settings.port}: {error.strerror or error}. Is another server "
                "there? Give another one: --port 0 takes any that is free."
            ) from None
        self.port: int = self._socket.getsockname()[1]
        connection: Any = partial(_Connection, self)
        off: Any = {"ws": "none", "lifespan": "off", "proxy_headers": False}
        quiet: Any = {"log_config": None, "log_level": "error"}  # so that strangers do not fill the log
        app = uvicorn.Config(
            self._app, http=connection, interface="asgi3", timeout_graceful_shutdown=1, **off, **quiet
        )
        self._uvicorn = uvicorn.Server(app)

    @property
    def url(self) -> str:
        """Where clients on this machine, or those that a tunnel brings here, find it."""
        host = self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def open(self) -> None:
        """Loads every reward, tries each on a grey picture, and lets clients in."""
        limit = self.settings.time_limit
        self._rewards = {
            one.name: RewardSet([one.setting], time_limit=limit, max_failed_share=1.0)
            for one in self.settings.rewards
        }
        # the first scores warm a reward up, and show what produces them
        grey = torch.full((1, 3, PROBE_SIDE, PROBE_SIDE), 0.5)
        served = []
        for one in self.settings.rewards:
            scores = self._rewards[one.name].score(RewardBatch(grey, ["a photo"], [{}]))[one.name]
            problem = scores.reasons[0]
            if problem is not None:
                _log.warning("The reward %r gives a grey picture no score: %s", one.name, problem)
            licence = scores.provenance.get("licence", "not stated")
            about = dict(scores.provenance)
            served.append(
                wire.Served(
                    name=one.name, kind=one.setting.reward, licence=licence, provenance=about, problem=problem
                )
            )
        self.served = tuple(served)
        self._socket.listen(64)

    def serve(self) -> None:
        """Answers until `stop` or a signal, whose own effect then follows: KeyboardInterrupt, of Ctrl-C."""
        self._uvicorn.run([self._socket])

    def stop(self) -> None:
        """Ends `serve`, from another thread."""
        self._uvicorn.should_exit = True

    def description(self) -> wire.Description:
        """What `/describe` answers."""
        return wire.Description(
            protocol=wire.PROTOCOL,
            rewards=list(self.served),
            max_body=self._max_body,
            max_pixels=wire.MOST_PIXELS,
            longest_answer=self.settings.queue_wait + self.settings.time_limit + self.settings.body_wait,
        )

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, the only one of its connection."""
        connection: _Connection = scope["state"]["connection"]
        connection.give(None)
        status, headers = 200, {"Connection": "close", "Cache-Control": "no-store"}
        try:
            body = await self._answer(Request(scope, receive), connection)
        except HTTPException as refused:
            await connection.drain()
            status, body = refused.status_code, json.dumps({"error": refused.detail}).encode()
            headers.update(refused.headers or {})
        except ClientDisconnect:
            return
        finally:
            connection.give(ANSWER_WAIT)
        await Response(body, status, headers, "application/json")(scope, receive, send)

    async def _answer(self, request: Request, connection: "_Connection") -> bytes:
        asked = (request.method, request.scope["path"])
        if asked == ("GET", "/health"):
            return b'{"status": "ok"}'
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        # compared in a time that does not tell how much of it is right
        if kind != "Bearer" or not hmac.compare_digest(given.encode(), self._token):
            raise HTTPException(401, "the token is missing or wrong")
        if connection not in self.strangers or len(self.known) >= self.settings.connections:
            raise _busy("too many connections are open")
        del self.strangers[connection]
        self.known.add(connection)
        if asked == ("GET", "/describe"):
            return self.description().model_dump_json().encode()
        if asked != ("POST", "/score"):
            raise HTTPException(404, "there are /health, /describe and /score")
        if self._places.locked():
            raise _busy("the queue is full")
        try:
            async with self._places:
                return await self._scores(await self._body(request))
        except asyncio.CancelledError:
            raise _busy("the server ends") from None

    async def _body(self, request: Request) -> bytes:
        """The request's body, whose length h11 has found to be a number."""
        length = int(request.headers.get("Content-Length", -1))
        if length < 0 or "Transfer-Encoding" in request.headers:
            raise HTTPException(411, "a body comes with its Content-Length")
        if length > self._max_body:
            raise HTTPException(413, f"{length} bytes are above the limit of {self._max_body}")
        body = bytearray()
        with anyio.move_on_after(self.settings.body_wait):
            async for part in request.stream():
                body += part
        if len(body) < length:
            raise HTTPException(408, f"{len(body)} of {length} bytes came in time")
        return bytes(body)

    async def _scores(self, body: bytes) -> bytes:
        try:
            async with asyncio.timeout(self.settings.queue_wait):
                await self._scoring.acquire()
        except TimeoutError:
            raise _busy("others are being scored") from None
        try:  # the pictures of one request at a time are unfolded
            return await _in_thread(partial(self._score, body))
        except wire.WireError as error:
            raise HTTPException(400, str(error)) from None
        except PixrlError as error:
            raise HTTPException(500, str(error)) from None
        finally:
            self._scoring.release()

    def _score(self, body: bytes) -> bytes:
        begun = time.monotonic()
        name, batch = wire.read_request(body)
        if name not in self._rewards:
            raise HTTPException(
                404,
                f"there is no reward {plain(name)!r} here.{did_you_mean(name, self._rewards)} "
                f"There are {', '.join(self._rewards)}.",
            )
        scores = self._rewards[name].score(batch)[name]
        failed = sum(reason is not None for reason in scores.reasons)
        seconds = time.monotonic() - begun
        _log.info("%s: %d pictures, %d failed, %.2f s", name, len(scores.reasons), failed, seconds)
        return wire.answer(scores)


class _Connection(H11Protocol):
    """A connection of one request, with a time for each of its parts in all: uvicorn bounds none before an answer."""

    def __init__(self, rewards: RewardServer, **parts: Any) -> None:
        super().__init__(**parts)
        self.app_state = {"connection": self}
        self._rewards = rewards
        self._end: asyncio.TimerHandle | None = None

    def give(self, seconds: float | None) -> None:
        """Cuts it off after so many seconds, in place of what it had; None: never."""
        if self._end is not None:
            self._end.cancel()
        self._end = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    async def drain(self) -> None:
        """Reads on for a moment: a sender that is cut off while it sends never hears the answer."""
        size = 0
        with anyio.move_on_after(DRAIN_WAIT):
            while self.cycle.more_body and not self.cycle.disconnected and size < DRAINED:
                came = await self.cycle.receive()
                size += len(came["body"]) if came["type"] == "http.request" else 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.give(self._rewards.settings.head_wait)
        strangers = self._rewards.strangers
        strangers[self] = None
        if len(strangers) > STRANGERS:
            oldest = next(iter(strangers))
            del strangers[oldest]
            oldest.transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Where a client sends no more, what came is all of the body; it may still listen for the answer."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        self.cycle.more_body = False
        self.cycle.message_event.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.give(None)
        self._rewards.strangers.pop(self, None)
        self._rewards.known.discard(self)
        if exc is not None:
            _log.info("The connection of %s broke off: %s", self.client[0] if self.client else "?", exc)


async def _in_thread(work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, on a daemon: a reward that hangs does not keep the server from its end."""
    done: Future[T] = Future()

    def run() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            done.set_exception(error)

    threading.Thread(target=run, name="pixrl-serve", daemon=True).start()
    return await asyncio.wrap_future(done)


def _busy(why: str) -> HTTPException:
    return HTTPException(503, why, {"Retry-After": "1"})
