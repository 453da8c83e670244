"""Every error that pixrl raises on purpose. Each message says what was given, what is allowed, and what to type."""

import difflib
from collections.abc import Iterable


class PixrlError(Exception):
    """Base of all errors of this library. `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(PixrlError, ValueError):
    """The caller gave something that cannot be used (command line: exit code 2)."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe or an override is wrong."""


class UnknownWordError(InputError):
    """A toy prompt uses a word outside the toy world's vocabulary."""


class ShapeError(InputError):
    """A tensor has the wrong shape."""


class RunError(PixrlError):
    """A run cannot start or go on (folder exists, too many failed scores, disk full ...)."""


class ServiceError(RunError):
    """A service that the run depends on stayed away, refuses it or has become another one: stop, go on later."""


class CheckpointError(PixrlError):
    """A checkpoint, manifest or model folder is missing, half written or does not match its checksum."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest allowed name, or an empty string when none is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {str(near[0])!r}?" if near else ""
