"""The server behind `pixrl vote`: a page on which people vote on the groups of a run that waits for them.

    GET    /v/TOKEN         the page; the token is new each time, and unguessable
    GET    /v/TOKEN/state   what the run is doing, and the groups it waits for: opaque names of pictures, no seed
    PUT    /v/TOKEN/vote    {"group": 12, "best": [PICTURE, ...]}; no picture: none is better
    DELETE /v/TOKEN/vote    {"group": 12}
    GET    /v/TOKEN/picture/NAME.png

An answer to a PUT means that the vote is on the disk, or that the group had one already (`counted`: false).
"""

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pixrl.errors import InputError, PixrlError
from pixrl.report.page import render
from pixrl.rewards.votes.groups import FOLDER, VOTES, GroupVotes, VotedGroup
from pixrl.rewards.votes.reward import Ask
from pixrl.serve.pages import HEADERS, PICTURE_HEADERS, PageServer, body_of, in_thread

TOKEN_BYTES = 24
"""Random bytes of the link: 192 bits."""
GOODBYE = 3.0
"""Seconds for which a page that is open is still told that the run has ended."""
NAME = re.compile(r"[0-9a-f]{32}")
NO_LINK = "This link is not the one that pixrl vote printed last. Open that one."
GONE = (
    "That picture is gone, so the vote was not kept; all earlier ones are. Stop pixrl vote with Ctrl-C and go on with "
    "the run: it is drawn again."
)
TOO_LATE = "Training has learned from that vote already, so it cannot be taken back."
_log = logging.getLogger("pixrl")


class VoteServer(PageServer):
    """Serves the votes of one run, from before the run has a folder until it has ended.

    Args:
        run: the run's folder.
        ask: what is asked about a group.
        steps: how many training steps there are.
        host, port: the address.

    Raises:
        InputError: the address cannot be listened at.
    """

    def __init__(self, run: Path, ask: Ask, steps: int, host: str = "127.0.0.1", port: int = 8767) -> None:
        self._place = run / FOLDER
        self._ask, self._steps = ask, steps
        self._token = secrets.token_urlsafe(TOKEN_BYTES)
        self._ended: str | None = None
        self._polled = 0.0
        base = "/v/{token}"
        routes = [
            Route("/", self._nothing),
            Route(base, self._page),
            Route(f"{base}/state", self._state),
            Route(f"{base}/vote", self._vote, methods=["PUT"]),
            Route(f"{base}/vote", self._undo, methods=["DELETE"]),
            Route(base + "/picture/{name}.png", self._picture),
        ]
        super().__init__(routes, _page, host, port)

    @property
    def link(self) -> str:
        """The whole address of the page."""
        return f"{self.url}/v/{self._token}"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answer on a thread of its own while the block trains; open pages are told how it ended."""
        thread = threading.Thread(target=self.serve, name="pixrl-vote")
        thread.start()
        try:
            yield
            self._ended = "The run is finished: all votes are learned from. You can close this page."
        except BaseException:
            self._ended = "The run has stopped; all votes are kept. The terminal says why, and how to go on."
            raise
        finally:
            if time.monotonic() - self._polled < GOODBYE:
                time.sleep(GOODBYE)
            self.stop()
            thread.join()

    async def _nothing(self, request: Request) -> Response:
        raise HTTPException(404, NO_LINK)

    async def _page(self, request: Request) -> Response:
        self._require_token(request)
        return HTMLResponse(_page(None), headers=HEADERS)

    async def _state(self, request: Request) -> Response:
        self._require_token(request)
        self._polled = time.monotonic()
        return JSONResponse(await in_thread(self._asked), headers=HEADERS)

    async def _vote(self, request: Request) -> Response:
        number, given = await self._group(request)
        best = given.get("best")
        if not isinstance(best, list) or not all(isinstance(name, str) for name in best):
            raise HTTPException(400, "A vote names the best pictures.")
        counted = await self._kept(lambda votes: self._save(votes, number, best))
        return JSONResponse({"counted": counted}, headers=HEADERS)

    async def _undo(self, request: Request) -> Response:
        number, _ = await self._group(request)
        if not await self._kept(lambda votes: votes.undo(number)):
            raise HTTPException(409, TOO_LATE)
        return JSONResponse({"counted": False}, headers=HEADERS)

    async def _picture(self, request: Request) -> Response:
        self._require_token(request)
        file = self._file_of(request.path_params["name"])
        if file is None or not await in_thread(file.is_file):
            raise HTTPException(404, "There is no such picture.")
        return Response(await in_thread(file.read_bytes), headers=PICTURE_HEADERS, media_type="image/png")

    def _asked(self) -> dict[str, Any]:
        """Return what the page is told."""
        groups: list[VotedGroup] = []
        given = 0
        file = self._place / VOTES
        if file.is_file():
            try:
                with GroupVotes(file) as votes:
                    groups = votes.waiting()
                    given = votes.count()
            except PixrlError as error:  # the file is being made
                _log.debug("%s", error)
        return {
            "ask": self._ask.value,
            "steps": self._steps,
            "step": groups[0].step if groups else None,
            "votes": given,
            "ended": self._ended,
            "groups": [
                {
                    "group": one.number,
                    "prompt": one.prompt,
                    # their names are random, and so is this order
                    "pictures": sorted(Path(shown.file).stem for shown in one.pictures),
                    "voted": one.ranks is not None,
                }
                for one in groups
            ],
        }

    def _save(self, votes: GroupVotes, number: int, best: Sequence[str]) -> bool:
        count = len(votes.of(number).pictures)
        if len(best) not in (0, 1 if self._ask is Ask.BEST else count):
            what = "one picture" if self._ask is Ask.BEST else f"all {count} pictures in order"
            raise InputError(f"A vote names {what}, or none where none is better. Reload the page.")
        files = [self._file_of(name) for name in best]
        if not all(file is None or file.is_file() for file in files):
            raise InputError(GONE)
        return votes.vote(number, [f"{name}.png" for name in best])

    async def _kept(self, act: Callable[[GroupVotes], bool]) -> bool:
        """Do something to the votes; a refusal is answered by its sentence, and what may pass by another status."""

        def with_groups() -> bool:
            if not (self._place / VOTES).is_file():
                raise InputError("The run has no groups yet. Reload the page.")
            with GroupVotes(self._place / VOTES) as votes:
                return act(votes)

        try:
            return bool(await in_thread(with_groups))
        except InputError as refused:
            raise HTTPException(409, str(refused)) from None
        except PixrlError as error:
            _log.error("%s", error)
            raise HTTPException(
                503,
                "The vote cannot be kept just now, is the disk full? All earlier ones are; this one is sent again.",
            ) from None

    async def _group(self, request: Request) -> tuple[int, dict[str, Any]]:
        self._require_token(request)
        given = await body_of(request)
        if given is None or type(given.get("group")) is not int:
            raise HTTPException(400, "That is no vote: it does not say which group it is about.")
        return given["group"], given

    def _file_of(self, name: str) -> Path | None:
        return self._place / f"{name}.png" if NAME.fullmatch(name) else None

    def _require_token(self, request: Request) -> None:
        given = str(request.path_params["token"]).encode()
        if not secrets.compare_digest(given, self._token.encode()):
            raise HTTPException(404, NO_LINK)


def _page(message: str | None) -> str:
    return render("live_vote.html.j2", {"message": message})
