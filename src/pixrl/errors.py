"""Every error that pixrl raises on purpose. Each message says what was given, what is allowed, and what to type."""

import difflib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SHORT, LONG = 4, 5
"""Length of a name from which on two letters may be wrong (not the first), and from which on a part of it will do."""
LONGEST_REASON = 300
"""Number of characters of an exception's message that a reason keeps."""


class PixrlError(Exception):
    """Base of all errors of this library; `exit_code` is the exit code of the command line."""

    exit_code = 1


class InputError(PixrlError, ValueError):
    """Error of input that cannot be used (command line: exit code 2)."""

    exit_code = 2


class ConfigError(InputError):
    """Error of a recipe or an override."""


class UnknownWordError(InputError):
    """Error of a toy prompt that uses a word outside the toy world's vocabulary."""


class ShapeError(InputError):
    """Error of a tensor that has the wrong shape."""


class RunError(PixrlError):
    """Error of a run that cannot start or go on (folder exists, too many failed scores, disk full ...)."""


class FailedScoresError(RunError):
    """Error of a larger share of pictures without a score than a run bears."""


class GuardError(RunError):
    """Error of a run that the guard ended, since it was gaming its reward."""


class ServiceError(RunError):
    """Error of a service that stayed away, refuses the run or has become another one: the run stops, to go on later."""


class CheckpointError(PixrlError):
    """Error of a checkpoint, manifest or model folder that is missing, half written or unlike its checksum."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the allowed name that was misspelled; an empty text where there is none.

    A word that only looks alike is another word: dragon is no misspelled drawing.
    """
    near = [name for name in map(str, allowed) if is_misspelled(given, name)]
    best = difflib.get_close_matches(given, near, n=1, cutoff=0)
    return f" Did you mean {best[0]!r}?" if best else ""


def is_misspelled(given: str, name: str) -> bool:
    """Return whether a name was meant: at most one letter is wrong, in longer names two, or it is a part of it."""
    one, other = given.casefold(), name.casefold()
    if len(one) >= LONG and one[:-1] in other:
        return True
    slips = 2 if min(len(one), len(other)) >= SHORT and one[0] == other[0] else 1
    return len(one) > 1 and abs(len(one) - len(other)) <= slips and _slips(one, other) <= slips


def _slips(one: str, other: str) -> int:
    """Return the letters to put in, take out, change or swap with their neighbour, to make one of the other."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, there in enumerate(other, 1):
            least = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != there))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == there:
                least = min(least, rows[-2][j - 2] + 1)
            row.append(least)
        rows.append(row)
    return rows[-1][-1]


@dataclass(frozen=True)
class Failure:
    """The failure of a call that returned nothing."""

    reason: str
    lost: ServiceError | None = None
    """The error that must end the run rather than fail some scores."""


def describe(error: BaseException) -> str:
    """Return an exception and where it was raised, such as `KeyError: 'tag' (my_reward.py:12)`."""
    text = " ".join(str(error).split())
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if len(message) > LONGEST_REASON:
        message = f"{message[:LONGEST_REASON]}..."
    frames = traceback.extract_tb(error.__traceback__)
    return f"{message} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else message
