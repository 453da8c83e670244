"""`pixrl study`, typed in a test."""

from collections.abc import Sequence

import pytest

from pixrl.cli import app


def main(arguments: Sequence[str]) -> int:
    """The exit code of `pixrl study ARGUMENTS`."""
    with pytest.raises(SystemExit) as done:
        app(["study", *arguments])
    return int(done.value.code or 0)
