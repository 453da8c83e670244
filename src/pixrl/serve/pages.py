"""The server of a page that people vote on: a port, a Starlette application, headers that keep links secret."""

import socket
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute

from pixrl.errors import InputError
from pixrl.untrusted import parse_json

LONGEST_BODY = 4096
"""Bytes of a vote, at most."""
CONNECTIONS = 1024
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
}
PICTURE_HEADERS = {**HEADERS, "Cache-Control": "private, max-age=86400"}


class PageServer:
    """Serves a page at an address; the port is taken from the start.

    Args:
        routes: what it answers.
        message: makes the page that says a sentence, for a browser that asks for what is not there.
        host, port: the address; port 0 takes any that is free.

    Raises:
        InputError: the address cannot be listened at.
    """

    def __init__(
        self, routes: Sequence[BaseRoute], message: Callable[[str], str], host: str, port: int
    ) -> None:
        self.host = host
        self._message = message
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
        app = Starlette(routes=routes, exception_handlers={HTTPException: self._refused})
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
        self._uvicorn.run([self._socket])

    def stop(self) -> None:
        """Ends `serve`, from another thread."""
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Gives the port back where `serve` was never called."""
        self._socket.close()

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if request.method == "GET" and not request.url.path.endswith(("/state", ".png")):
            return HTMLResponse(self._message(error.detail), error.status_code, HEADERS)
        return JSONResponse({"error": error.detail}, error.status_code, HEADERS)


async def in_thread(call: Callable[..., Any], *given: Any) -> Any:
    """Call what waits for the disk without keeping others waiting."""
    return await anyio.to_thread.run_sync(call, *given)


async def body_of(request: Request) -> dict[str, Any] | None:
    """Return the JSON object of a request; None where its body is none.

    Raises:
        HTTPException: the body is longer than any vote, or did not arrive.
    """
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
        return None
    return given if isinstance(given, dict) else None
