"""The server behind `pixrl human-study serve`: a page for each participant, and where their votes go.

    GET    /s/TOKEN         the page; the token is the participant's, and unguessable
    GET    /s/TOKEN/state   what they compare and have answered: opaque names of pictures, no system, no check, no path
    PUT    /s/TOKEN/vote    {"task": 3, "criterion": "overall", "choice": PICTURE, "seconds": 2.5}
    DELETE /s/TOKEN/vote    {"task": 3, "criterion": "overall"}
    GET    /picture/NAME.png

An answer to a PUT means that the vote is on the disk. The same vote sent again changes nothing. The page is the
same in a static bundle, `write_bundle`, whose votes come back as files.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pixrl.errors import InputError, PixrlError, RunError
from pixrl.human_study.study import PICTURES, Folder, Study
from pixrl.human_study.votes import Participant, Vote, VoteRefused, Votes, check_vote
from pixrl.report.page import render
from pixrl.runs.files import temporary
from pixrl.serve.pages import HEADERS, PICTURE_HEADERS, PageServer, body_of, in_thread
from pixrl.text import parse_json, read_text

LINKS = "links.csv"
PLANS = "plans"


def vote_page(study: Study | None, *, static: bool, message: str | None = None) -> str:
    """Return the page: the same for everyone, since what is shown comes by the link.

    Args:
        study: which one; None: only the message.
        static: whether it is part of a bundle, without a server.
        message: a sentence in place of the study.
    """
    title = "Study" if study is None else study.settings.title
    return render("vote.html.j2", {"title": title, "static": static, "message": message, "date": None})


def state_of(study: Study, who: Participant, answers: Sequence[Vote]) -> dict[str, Any]:
    """Return what a participant's page is told: nothing of systems, files, scores or which comparison is a check."""
    return {
        "criteria": [criterion.model_dump() for criterion in study.settings.criteria],
        "ties": study.settings.ties,
        "tasks": [
            {
                "prompt": study.items[task.item].prompt,
                "reference": study.items[task.item].reference,
                "pictures": task.pictures,
            }
            for task in who.tasks
        ],
        "answers": [
            {"task": vote.task, "criterion": vote.criterion, "choice": vote.choice} for vote in answers
        ],
    }


def write_links(folder: Folder, base: str, *, static: bool = False) -> Path:
    """Write links.csv, one participant's link a line, readable by its owner alone, and return its path."""
    with Votes(folder.votes) as votes:
        people = votes.participants()
    middle = "/#" if static else "/s/"
    rows = [f"{who.number + 1},{base.rstrip('/')}{middle}{who.token}\n" for who in people]
    file = folder.path / LINKS
    beside = temporary(file, "tmp")
    with os.fdopen(
        os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as out:
        out.write("participant,link\n" + "".join(rows))
    beside.replace(file)
    return file


def write_bundle(folder: Folder, out: Path) -> int:
    """Write a folder that any web server can hand out, and return the number of participants.

    Each has a file of their own there, named by their token; votes stay in the browser until they are saved as a file.

    Raises:
        RunError: something is in the way.
        InputError: a picture of the study is gone.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty, so no bundle is written there. Give another --static.")
    names = folder.study.names
    missing = [name for name in names if not folder.file_of(name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} pictures are gone, the first {folder.file_of(missing[0])}. Put them back."
        )
    place = temporary(out.absolute(), "new")
    try:
        (place / PICTURES).mkdir(parents=True)
        (place / PLANS).mkdir()
        for name in names:
            shutil.copyfile(folder.file_of(name), place / PICTURES / f"{name}.png")
        with Votes(folder.votes) as votes:
            people = votes.participants()
        for who in people:
            plan = json.dumps(state_of(folder.study, who, []))
            (place / PLANS / f"{who.token}.js").write_text(f"startStudy({plan});\n", encoding="utf-8")
        page = vote_page(folder.study, static=True)
        (place / "index.html").write_text(page, encoding="utf-8")
        for hidden in (PLANS, PICTURES):  # so that servers which list folders do not list these
            (place / hidden / "index.html").write_text("", encoding="utf-8")
        if out.exists():
            out.rmdir()
        place.rename(out)
    finally:
        if place.exists():
            shutil.rmtree(place)
    return len(people)


_LIKE = "It is the file that the study's page saves at its end."


def import_votes(folder: Folder, files: Sequence[Path]) -> int:
    """Read votes that participants of a bundle saved, all files or none, and return their number.

    The same file again changes nothing; a later one of the same person counts.

    Raises:
        InputError: a file holds no votes, those of another study, or one that answers nothing that was asked.
    """
    found: list[tuple[int, list[Vote]]] = []
    with Votes(folder.votes) as votes:
        for file in files:
            given = parse_json(read_text(file), str(file), like=_LIKE)
            if not isinstance(given, Mapping) or not isinstance(given.get("votes"), list):
                raise InputError(f"{file} holds no votes. {_LIKE}")
            who = votes.by_token(str(given.get("token")))
            if who is None:
                raise InputError(
                    f"{file} is of nobody in {folder.path}: its link belongs to another study. Import it there."
                )
            rows = [_vote(row, file) for row in given["votes"]]
            for row in rows:
                try:
                    check_vote(folder, who, row)
                except VoteRefused as refused:
                    raise InputError(f"{file}: {refused} Nothing was imported.") from None
            found.append((who.number, rows))
        for number, rows in found:
            votes.save(number, rows)
    return sum(len(rows) for _, rows in found)


def _vote(row: object, file: Path) -> Vote:
    kinds: dict[str, Any] = {"task": int, "criterion": str, "choice": str, "at": (int, float)}
    if not isinstance(row, Mapping) or not all(
        isinstance(row.get(name), kind) and not isinstance(row.get(name), bool)
        for name, kind in kinds.items()
    ):
        raise InputError(f"{file} holds a vote without task, criterion, choice and time. {_LIKE}")
    seconds = row.get("seconds")
    spent = float(seconds) if isinstance(seconds, int | float) else None
    return Vote(row["task"], row["criterion"], row["choice"], spent, float(row["at"]))


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
