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
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pixrl.errors import PixrlError
from pixrl.human_study.page import state_of, vote_page
from pixrl.human_study.study import Folder
from pixrl.human_study.votes import Participant, Vote, VoteRefused, Votes, check_vote
from pixrl.serve.pages import HEADERS, PICTURE_HEADERS, PageServer, body_of, in_thread

LONGEST_LOOK = 24 * 3600.0
"""Seconds for one comparison above which the time is not kept."""
NO_LINK = "This link is not one of this study. Ask whoever invited you for yours."
_log = logging.getLogger("pixrl")


class StudyServer(PageServer):
    """Serves one study; the port is taken from the start.

    Raises:
        InputError: the address cannot be listened at.
    """

    def __init__(self, folder: Folder, host: str = "127.0.0.1", port: int = 8766) -> None:
        self.folder = folder
        self._pictures = frozenset(folder.study.names)
        routes = [
            Route("/", self._nothing),
            Route("/s/{token}", self._page),
            Route("/s/{token}/state", self._state),
            Route("/s/{token}/vote", self._vote, methods=["PUT"]),
            Route("/s/{token}/vote", self._undo, methods=["DELETE"]),
            Route("/picture/{name}.png", self._picture),
        ]
        super().__init__(routes, lambda said: vote_page(None, static=False, message=said), host, port)
        self._votes = Votes(folder.votes)

    def serve(self) -> None:
        """Answers until `stop` or a signal."""
        try:
            super().serve()
        finally:
            self._votes.close()

    async def _nothing(self, request: Request) -> Response:
        raise HTTPException(404, "Here is a study. To take part, open your own link.")

    async def _page(self, request: Request) -> Response:
        await self._whose(request)
        return HTMLResponse(vote_page(self.folder.study, static=False), headers=HEADERS)

    async def _state(self, request: Request) -> Response:
        who = await self._whose(request)
        answers = await in_thread(self._votes.of, who.number)
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
            await in_thread(partial(check_vote, self.folder, who), vote)
            await in_thread(self._votes.save, who.number, [vote])
        except VoteRefused as refused:
            raise HTTPException(409, str(refused)) from None
        except PixrlError as error:
            _log.error("%s", error)
            raise HTTPException(503, "The vote cannot be kept just now; the page tries again.") from None
        return JSONResponse({"kept": True}, headers=HEADERS)

    async def _undo(self, request: Request) -> Response:
        who = await self._whose(request)
        task, criterion, _ = await _named(request)
        await in_thread(self._votes.undo, who.number, task, criterion)
        return JSONResponse({"kept": False}, headers=HEADERS)

    async def _picture(self, request: Request) -> Response:
        name = request.path_params["name"]
        file = self.folder.file_of(name)
        if name not in self._pictures or not await in_thread(file.is_file):
            raise HTTPException(404, "There is no such picture.")
        content = await in_thread(file.read_bytes)
        return Response(content, headers=PICTURE_HEADERS, media_type="image/png")

    async def _whose(self, request: Request) -> Participant:
        found = await in_thread(self._votes.by_token, request.path_params["token"])
        if not isinstance(found, Participant):
            raise HTTPException(404, NO_LINK)
        return found


async def _named(request: Request) -> tuple[int, str, dict[str, Any]]:
    """The comparison and criterion that a body names, and all of it."""
    given = await body_of(request)
    if given is None or type(given.get("task")) is not int or type(given.get("criterion")) is not str:
        raise HTTPException(400, "That is no vote: it says neither comparison nor question.")
    return given["task"], given["criterion"], given
