"""A folder for each file of the parsers that read files."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every example of a test writes into."""
    return tmp_path_factory.mktemp("fuzz")
