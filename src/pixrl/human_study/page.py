"""The page that participants vote on, as the server gives it and as a static bundle holds it."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrl.errors import InputError, RunError
from pixrl.human_study.study import PICTURES, Folder, Study
from pixrl.human_study.votes import Participant, Vote, VoteRefused, Votes, check_vote
from pixrl.report.page import render
from pixrl.runs.files import temporary
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
