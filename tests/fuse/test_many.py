"""Folders of fusions: samplers side by side and lists of pairs; resumable, independent, with an index page."""

import json

import pytest

from pixrl import api
from pixrl.algorithms import SAMPLERS
from pixrl.errors import ConfigError, InputError, RunError, UnknownWordError
from pixrl.fusion.config import FuseConfig
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs import fuse_many
from tests.fuse.world import fake_world

SMALL = {"budget": 16, "batch": 8, "exemplars": 1}


def config(**settings):
    return FuseConfig(**{"concepts": ("owl", "snail"), **SMALL, **settings})


def bare(**settings):
    return FuseConfig(**{**SMALL, **settings})


@pytest.fixture
def use(monkeypatch):
    """Makes a world the one that every recipe names."""

    def use_world(world):
        monkeypatch.setattr(fuse_job, "load_world", lambda *given: world)
        return world

    use_world(fake_world())
    return use_world


def manifests(run):
    return {p.parent.parent.name: p.read_text() for p in sorted(run.glob("runs/*/rollouts/manifest.jsonl"))}


def test_compare_all_runs_every_sampler_once_at_the_same_budget(tmp_path, use):
    world = use(fake_world())
    out = api.run_compare(config(), "all", tmp_path / "c", live=False)
    found = fuse_many.finished_runs(out)
    assert [run.config.sampler for run in found.runs] == list(SAMPLERS.entries)
    assert all(len(run.rows) == 16 for run in found.runs)
    assert world.renderer.rendered == len(SAMPLERS.entries) * 16 + 2  # and the exemplars only once
    page = (out / "report.html").read_text()
    assert all(f"runs/{name}/report.html" in page for name in SAMPLERS.entries)
    assert all((out / "runs" / name / "report.html").is_file() for name in SAMPLERS.entries)


def test_a_compared_run_is_the_run_alone(tmp_path, use):
    api.run_compare(config(), ["rmler", "random"], tmp_path / "c", live=False)
    api.run_fuse(config(sampler="random"), tmp_path / "alone", live=False)
    alone = (tmp_path / "alone" / "rollouts" / "manifest.jsonl").read_text()
    assert manifests(tmp_path / "c")["random"] == alone


def test_options_go_to_the_samplers_that_know_them(tmp_path, use):
    out = api.run_compare(config(options={"lr": 0.2}), ["rmler", "random"], tmp_path / "c", live=False)
    by_name = {run.config.sampler: run.config.options for run in fuse_many.finished_runs(out).runs}
    assert by_name["rmler"]["lr"] == 0.2
    assert by_name["random"] == {}
    with pytest.raises(ConfigError, match="None of the samplers mean, random has an option 'lr'"):
        fuse_many.compare_config(config(), ["mean", "random"], {"lr": 0.2})


@pytest.mark.parametrize(
    ("samplers", "says"),
    [(["rmlr", "ppo"], "Did you mean 'rmler'"), (["rmler"], "two or more"), (["ppo", "ppo"], "twice")],
)
def test_a_wrong_comparison_is_refused(tmp_path, use, samplers, says):
    with pytest.raises(InputError, match=says):
        api.run_compare(config(), samplers, tmp_path / "c", live=False)
    assert not (tmp_path / "c").exists()


def test_pairs_make_one_run_each_and_keep_the_lists_notes(tmp_path, use):
    (tmp_path / "pairs.txt").write_text("owl & snail\nfrog&car \nSnail & owl\n")
    out = api.run_pairs(bare(), tmp_path / "pairs.txt", tmp_path / "p", live=False)
    assert sorted(p.name for p in (out / "runs").iterdir()) == ["1-owl+snail", "2-frog+car"]
    page = (out / "report.html").read_text()
    assert "repeats line 1" in page and "2-frog+car/report.html" in page
    assert api.write_report(out).read_text() == page


def test_pairs_can_be_a_list(tmp_path, use):
    out = api.run_pairs(bare(), ("owl & snail", "frog & car & mushroom"), tmp_path / "p", live=False)
    assert len(fuse_many.finished_runs(out).runs) == 2


def test_pairs_with_concepts_in_the_recipe_are_refused(tmp_path, use):
    with pytest.raises(InputError, match="leave them out"):
        api.run_pairs(config(), ("owl & snail",), tmp_path / "p", live=False)


def test_an_unknown_word_anywhere_in_the_list_starts_nothing(tmp_path, use):
    with pytest.raises(UnknownWordError, match="dragon"):
        api.run_pairs(bare(), ("owl & snail", "dragon & car"), tmp_path / "p", live=False)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("after", [6, 10, 20, 30])
def test_interrupted_pairs_resume_to_the_unbroken_manifests(tmp_path, use, after):
    pairs = ("owl & snail", "frog & car")
    api.run_pairs(bare(), pairs, tmp_path / "whole", live=False)
    use(fake_world(die_after=after))
    with pytest.raises(KeyboardInterrupt):
        api.run_pairs(bare(), pairs, tmp_path / "broken", live=False)
    use(fake_world())
    assert api.resume(tmp_path / "broken", live=False) == tmp_path / "broken"
    assert manifests(tmp_path / "broken") == manifests(tmp_path / "whole")


def test_one_pair_that_fails_does_not_stop_the_others_and_is_reported(tmp_path, use):
    use(fake_world(broken=frozenset(range(8))))
    out = api.run_pairs(bare(), ("owl & snail", "frog & car"), tmp_path / "p", live=False)
    found = fuse_many.finished_runs(out)
    assert [run.config.concepts for run in found.runs] == [("frog", "car")]
    assert "no foreground found" in json.loads((out / "failures.json").read_text())["1-owl+snail"]
    assert "1-owl+snail" in (out / "report.html").read_text()


def test_all_pairs_failing_is_an_error(tmp_path, use):
    use(fake_world(broken=frozenset(range(99))))
    with pytest.raises(RunError, match="All 2 fusions stopped"):
        api.run_pairs(bare(), ("owl & snail", "frog & car"), tmp_path / "p", live=False)


def test_default_folders_are_new_and_named_after_what_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert api.default_fuse_out(config()).as_posix() == "runs/owl+snail-rmler-0"
    assert api.default_fuse_out(config(), compare=True).as_posix() == "runs/owl+snail-compare-0"
    named = api.default_fuse_out(bare(), pairs=tmp_path / "my list.txt")
    assert named.as_posix() == "runs/my_list-rmler-0"
    named.mkdir(parents=True)
    assert api.default_fuse_out(bare(), pairs=tmp_path / "my list.txt").name == "my_list-rmler-0-2"
