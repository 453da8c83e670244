"""Results against what was put in: known tastes, hand-counted figures, and what other formulas give."""

import csv
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pixrl import cli
from pixrl.human_study.results import Answer, Ballots, alpha, compute, pearson, spearman
from pixrl.human_study.study import TIE, Folder, Picture, Study, Task
from pixrl.human_study.votes import Vote, Votes
from tests.human_study.conftest import SYSTEMS, Make
from tests.tolerance import EPS64 as _EPS64  # noqa: F401

Taste = Callable[[Task], str]


def vote_all(folder: Folder, taste: Taste, people: list[int], criterion: str = "harmony") -> None:
    with Votes(folder.votes) as votes:
        everyone = votes.participants()
        for n in people:
            tasks = enumerate(everyone[n].tasks)
            votes.save(n, [Vote(k, criterion, taste(task), 1.0) for k, task in tasks])
