"""The server behind `pixrl human-study serve`: a page for each participant, and where their votes go.

    GET    /s/TOKEN         the page; the token is the participant's, and unguessable
    GET    /s/TOKEN/state   what they compare and have answered: opaque names of pictures, no system, no check, no path
    PUT    /s/TOKEN/vote    {"task": 3, "criterion": "overall", "choice": PICTURE, "seconds": 2.5}
    DELETE /s/TOKEN/vote    {"task": 3, "criterion": "overall"}
    GET    /picture/NAME.png

An answer to a PUT means that the vote is on the disk. The same vote sent again changes nothing.
"""

import logging
import math
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pixrl.errors import InputError, PixrlError
from pixrl.human_study.page import state_of, vote_page
from pixrl.human_study.study import Folder
from pixrl.human_study.votes import Participant, Vote, VoteRefused, Votes, check_vote
from pixrl.untrusted import parse_json

LONGEST_BODY = 4096
"""Bytes of a vote, at most."""
LONGEST_LOOK = 24 * 3600.0
"""Seconds for one comparison above which the time is not kept."""
CONNECTIONS = 1024
NO_LINK = "This link is not one of this study. Ask whoever invited you for yours."
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
}
_log = logging.getLogger("pixrl")


class StudyServer:
    """Serves one study; the port is taken from the start.

    Raises:
        InputError: the address cannot be listened at.
    """

    def __init__(self, folder: Folder, host: str = "127.0.0.1", port: int = 8766) -> None:
        self.folder = folder
        self.host = host
        self._pictures = frozenset(folder.study.names)
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen(128)
        except OSError as error:
            self._socket.close()
            raise InputError(
                f"Cannot listen at {host}, port {port}: {error.strerror or error}. Is another server there? Give "
                "another one: --port 0 takes any that is free."
            ) from None
        self.port: int = self._socket.getsockname()[1]
        self._votes = Votes(folder.votes)
        routes = [
            Route("/", self._nothing),
            Route("/s/{token}", self._page),
            Route("/s/{token}/state", self._state),
            Route("/s/{token}/vote", self._vote, methods=["PUT"]),
            Route("/s/{token}/vote", self._undo, methods=["DELETE"]),
            Route("/picture/{name}.png", self._picture),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _refused})
        quiet: Any = {"log_config": None, "log_level": "error", "access_log": False}  # links are secrets
        off: Any = {"ws": "none", "lifespan": "off", "proxy_headers": False, "server_header": False}
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(app, limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=5, **quiet, **off)
        )

    @property
    def url(self) -> str:
        """Where it is found, without a link's token."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def serve(self) -> None:
        """Answers until `stop` or a signal."""
        try:
            self._uvicorn.run([self._socket])
        finally:
            self._votes.close()

    def stop(self) -> None:
        """Ends `serve`, from another thread."""
        self._uvicorn.should_exit = True

    async def _nothing(self, request: Request) -> Response:
        raise HTTPException(404, "Here is a study. To take part, open your own link.")

    async def _page(self, request: Request) -> Response:
        await self._whose(request)
        return HTMLResponse(vote_page(self.folder.study, static=False), headers=HEADERS)

    async def _state(self, request: Request) -> Response:
        who = await self._whose(request)
        answers = await _in_thread(self._votes.of, who.number)
        return JSONResponse(state_of(self.folder.study, who, answers), headers=HEADERS)

    async def _vote(self, request: Request) -> Response:
        who = await self._whose(request)
        task, criterion, given = await _named(request)
        choice, seconds = given.get("choice"), given.get("seconds")
        if not isinstance(choice, str):
            raise HTTPException(400, "A vote names the picture that was chosen.")
        is_time = isinstance(seconds, int | float) and math.isfinite(seconds) and 0 <= seconds < LONGEST_LOOK
        vote = Vote(task, criterion, choice, float(seconds) if is_time else None)  # type: ignore[arg-type]
        try:
            await _in_thread(partial(check_vote, self.folder, who), vote)
            await _in_thread(self._votes.save, who.number, [vote])
        except VoteRefused as refused:
            raise HTTPException(409, str(refused)) from None
        except PixrlError as error:
            _log.error("%s", error)
            raise HTTPException(503, "The vote cannot be kept just now; the page tries again.") from None
        return JSONResponse({"kept": True}, headers=HEADERS)

    async def _undo(self, request: Request) -> Response:
        who = await self._whose(request)
        task, criterion, _ = await _named(request)
        await _in_thread(self._votes.undo, who.number, task, criterion)
        return JSONResponse({"kept": False}, headers=HEADERS)

    async def _picture(self, request: Request) -> Response:
        name = request.path_params["name"]
        file = self.folder.file_of(name)
        if name not in self._pictures or not await _in_thread(file.is_file):
            raise HTTPException(404, "There is no such picture.")
        content = await _in_thread(file.read_bytes)
        return Response(
            content, headers={**HEADERS, "Cache-Control": "private, max-age=86400"}, media_type="image/png"
        )

    async def _whose(self, request: Request) -> Participant:
        found = await _in_thread(self._votes.by_token, request.path_params["token"])
        if not isinstance(found, Participant):
            raise HTTPException(404, NO_LINK)
        return found


async def _in_thread(call: Callable[..., Any], *given: Any) -> Any:
    return await anyio.to_thread.run_sync(call, *given)


async def _named(request: Request) -> tuple[int, str, dict[str, Any]]:
    """The comparison and criterion that a body names, and all of it."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > LONGEST_BODY:
                raise HTTPException(413, "That is no vote: it is too long.")
    except ClientDisconnect:
        raise HTTPException(400, "The vote did not arrive.") from None
    try:
        given = parse_json(bytes(body))
    except ValueError:
        given = None
    if (
        not isinstance(given, dict)
        or type(given.get("task")) is not int
        or type(given.get("criterion")) is not str
    ):
        raise HTTPException(400, "That is no vote: it says neither comparison nor question.")
    return given["task"], given["criterion"], given


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.method == "GET" and not request.url.path.endswith(("/state", ".png")):
        return HTMLResponse(vote_page(None, static=False, message=error.detail), error.status_code, HEADERS)
    return JSONResponse({"error": error.detail}, error.status_code, HEADERS)
