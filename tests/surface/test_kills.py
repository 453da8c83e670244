"""A run that is killed at any file operation goes on, and ends as one that never was; nothing is left over.

`SAMPLE` kills of each kind of run, the first and the last operation among them; `PIXRL_EVERY_KILL=1` takes all of them,
which is some minutes.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pixrl import api
from pixrl.fusion.config import FuseConfig
from pixrl.jobs import align as align_job
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs.check import check
from pixrl.runs import checkpoint
from pixrl.runs.config import AlignConfig, PersonalizeConfig
from pixrl.runs.folder import RunFolder
from tests import kills, tiny
from tests.align.parts import recipe as align_recipe
from tests.align.parts import same
from tests.fuse.world import fake_world
from tests.personalize.conftest import make_subject
from tests.personalize.test_job import recipe as personalize_recipe

SAMPLE = {"fuse": 24, "align": 16, "personalize": 12}
FEWER = 14
OF_TIME = ("environment.json", "report.html", "metrics.jsonl", "checkpoints", "tensorboard")
"""What differs between two runs of one recipe: dates, seconds, and files that hold them."""
Begin = Callable[[Path], object]


@dataclass(frozen=True)
class Play:
    """How to start and to resume a tiny run, both with its report."""

    start: Begin
    resume: Begin
    again: Begin
    """Start with --force."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not wait for threads that it has not
    yield
    torch.set_num_threads(before)


@pytest.fixture
def play(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    if request.param == "fuse":
        monkeypatch.setattr(fuse_job, "load_world", lambda *given: fake_world())
        config = FuseConfig(concepts=("owl", "snail"), budget=8, batch=4, exemplars=1)
        return Play(
            lambda run: api.run_fuse(config, run, live=False),
            lambda run: api.resume(run, live=False),
            lambda run: api.run_fuse(config, run, live=False, force=True),
        )
    settings = _align(tmp_path) if request.param == "align" else _personalize(tmp_path)
    # the model is loaded once: each child has a copy of its own; the checks before the first update write nothing
    shop = align_job.load_run(settings)
    monkeypatch.setattr(align_job, "load_run", lambda config, *rest, **more: shop)
    monkeypatch.setattr(align_job.Training, "_check_on_policy", lambda *given: {})
    return Play(
        lambda run: api.run_align(settings, run, live=False),
        lambda run: api.resume(run, live=False),
        lambda run: api.run_align(settings, run, live=False, force=True),
    )


def _align(place: Path) -> AlignConfig:
    prompts = place / "prompts.txt"
    prompts.write_text("a red owl\ntwo blue snails\na cat\n")
    settings = align_recipe(
        tiny.sd3(place / "model", card=tiny.SD3_CARD),
        prompts,
        steps=2,
        prompts={"source": str(prompts), "per_step": 1},
        exploration={"kind": "noise", "noises": 2},
        sampling={"steps": 1, "solver": "euler"},
        loss={"kind": "nft", "timesteps": 1},
        evaluation={"prompts": 1, "every": 1},
    )
    return AlignConfig.model_validate(settings)


def _personalize(place: Path) -> PersonalizeConfig:
    make_subject(place / "subjects" / "rex")
    make_subject(place / "subjects" / "tom", word="cat", seed=2)
    settings = personalize_recipe(
        tiny.flux(place / "model", guidance_embeds=True),
        place / "subjects",
        prompts={"source": str(place / "subjects"), "per_step": 1},
        exploration={"kind": "noise", "noises": 2},
        sampling={"steps": 2, "noise": "flow_sde"},
        evaluation={"prompts": 1},
    )
    return PersonalizeConfig.model_validate(settings)


def _sample(total: int, size: int) -> list[int]:
    return list(range(total)) if os.environ.get("PIXRL_EVERY_KILL") else kills.sample(total, size)


def _same_run(one: Path, other: Path) -> None:
    assert kills.content(one, without=OF_TIME) == kills.content(other, without=OF_TIME)
    rows = [RunFolder.open(run).metrics() for run in (one, other)]
    timed = (
        "seconds/",
        "images_per_second",
        "gradient_disagreement",
    )  # the last in the first step of a process
    figures = [
        [{k: repr(x) for k, x in row.items() if not k.startswith(timed)} for row in run] for run in rows
    ]
    assert figures[0] == figures[1]
    last = [checkpoint.latest(run) for run in (one, other)]
    assert last[0] is not None and last[1] is not None and last[0].name == last[1].name
    tensors, states = zip(*(checkpoint.load(folder) for folder in last), strict=True)
    assert same(*tensors) and states[0] == states[1]


def _done(work: Begin, run: Path, die_at: int | None = None) -> int:
    """Works in a forked process; how many file operations it made."""
    status, count = kills.in_child(lambda: work(run), die_at)
    assert status == (0 if die_at is None else kills.KILLED)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("play", SAMPLE, indirect=True)
def test_killed_at_any_file_operation_and_resumed(
    request: pytest.FixtureRequest, tmp_path: Path, play: Play
) -> None:
    whole = tmp_path / "whole"
    total = _done(play.start, whole)
    assert total > 50
    for number in _sample(total, SAMPLE[request.node.callspec.params["play"]]):
        place = tmp_path / f"killed-{number}"
        run = place / "run"
        place.mkdir()
        _done(play.start, run, number)
        # a folder that exists can be gone on with; before, there is nothing, and the same command starts it
        _done(play.resume if run.exists() else play.start, run)
        _same_run(whole, run)
        assert check(run).findings == ()
        assert [entry.name for entry in place.iterdir()] == ["run"], number


@pytest.mark.slow
@pytest.mark.parametrize("play", ["fuse"], indirect=True)
def test_killed_twice_and_resumed(tmp_path: Path, play: Play) -> None:
    """The second time while the run is taken up again."""
    total = _done(play.start, tmp_path / "whole")
    middle = 2 * total // 3
    first = tmp_path / "first"
    _done(play.start, first, middle)
    left = _done(play.resume, first)
    for number in _sample(left, FEWER):
        run = tmp_path / f"second-{number}"
        _done(play.start, run, middle)
        _done(play.resume, run, number)
        _done(play.resume, run)
        _same_run(tmp_path / "whole", run)
        assert check(run).findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("play", ["fuse"], indirect=True)
def test_killed_while_it_replaces_an_old_run(tmp_path: Path, play: Play) -> None:
    """Until the new run has saved a step the old one is there, under its name or set aside; then it goes."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    _done(play.start, whole)
    total = _done(play.start, old)
    (old / "samples" / "mine.png").write_bytes(b"of the old run")
    operations = _done(play.again, _copy(old, tmp_path / "count"))
    assert operations > total
    for number in _sample(operations, FEWER):
        place = tmp_path / f"killed-{number}"
        run = _copy(old, place / "run")
        _done(play.again, run, number)
        kept = [file.parents[1] for file in place.rglob("mine.png")]
        saved = any(run.glob("checkpoints/step-*"))
        assert kept or saved, "the old run is gone before the new one has saved a step"
        _done(play.resume, run)
        assert check(run).findings == ()
        assert [entry.name for entry in place.iterdir()] == ["run"]
        if kept != [run]:
            assert not list(place.rglob("mine.png"))
            _same_run(whole, run)


def _copy(source: Path, place: Path) -> Path:
    shutil.copytree(source, place)
    return place
