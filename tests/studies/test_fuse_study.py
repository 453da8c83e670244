"""The study runner, its intervals and the calibration of thresholds."""

import math
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from tests.fuse.world import FakeScorer, fake_world
from tests.studies.command import main

from pixrl import config as recipes
from pixrl.equations import is_candidate
from pixrl.errors import ConfigError, InputError
from pixrl.fusion.world import BALANCE_SHARE, PROBE_SEED, calibrate_presence
from pixrl.metrics.intervals import bootstrap, by_unit, paired
from pixrl.types import sample_seed
from studies import fusion_runs as study_module
from studies.command import KINDS
from studies.fusion_runs import HeldOut, StudyConfig
from studies.grid import run_grid

KIND = KINDS["fuse-study"]
RECIPE = {
    "pairs": ["owl & snail", "frog & car"],
    "seeds": [0, 1],
    "variants": {"rmler": {}, "random": {"sampler": "random"}},
    "fuse": {"budget": 16, "batch": 8, "pool": 0, "exemplars": 1},
    "differences": [["rmler", "random"]],
}


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    world = fake_world()
    other = FakeScorer()
    other.read = torch.randn(3 * 64, 32, generator=torch.Generator().manual_seed(9)) / 14
    calibration = calibrate_presence(world, ["owl", "snail", "frog", "car"], exemplars=2, probes=4)
    monkeypatch.setattr(study_module, "load_world", lambda *given: world)
    monkeypatch.setattr(study_module, "load_heldout", lambda *given: HeldOut(other, calibration))
    return world


def load(**changes):
    return recipes.load(StudyConfig, {**RECIPE, **changes})


def test_every_pair_variant_and_seed_is_run_once_and_recorded(tmp_path):
    records = run_grid(KIND, load(), tmp_path / "s", quiet=True)
    keys = {(r["pair"], r["variant"], r["seed"]) for r in records}
    assert len(records) == len(keys) == 2 * 2 * 2
    assert all(len(r["batch_rewards"]) == 2 and r["figures"]["failed"] == 0 for r in records)


def test_a_broken_off_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = run_grid(KIND, load(), tmp_path / "whole", quiet=True)
    real, calls = study_module.run_task, []

    def stop_at_five(*given):
        calls.append(given[1])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(study_module, "run_task", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        run_grid(KIND, load(), tmp_path / "broken", quiet=True)
    records = run_grid(KIND, load(), tmp_path / "broken", quiet=True)
    assert len(calls) == len(whole) + 1
    figures = [[r["figures"] for r in some] for some in (whole, records)]
    assert figures[0] == figures[1]


def test_a_folder_of_another_study_is_refused(tmp_path):
    run_grid(KIND, load(), tmp_path / "s", quiet=True)
    with pytest.raises(ConfigError, match="another study"):
        run_grid(KIND, load(alpha=3.0), tmp_path / "s", quiet=True)


def test_the_heldout_encoder_scores_the_same_pictures(tmp_path):
    records = run_grid(KIND, load(heldout="fake:other"), tmp_path / "s", quiet=True)
    own, other = records[0]["figures"]["reward"], records[0]["figures"]["heldout_reward"]
    assert own is not None and other is not None and own != other


def test_variants_share_one_alpha_in_the_figures(tmp_path):
    same = {"sampler": "random", "noise": "image"}
    variants = {"a": {**same, "alpha": 0.0}, "b": {**same, "alpha": 7.0}}
    records = run_grid(KIND, load(variants=variants, differences=[]), tmp_path / "s", quiet=True)
    by_name = {(r["variant"], r["pair"], r["seed"]): r["figures"] for r in records}
    assert by_name["a", "owl & snail", 0] == by_name["b", "owl & snail", 0]


def test_the_command_writes_tables_and_refuses_nonsense(tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(f"kind: fuse-study\n{recipes.dump(load(heldout='fake:other'))}")
    assert main([str(path), "--out", str(tmp_path / "s")]) == 0
    table = (tmp_path / "s" / "table.md").read_text()
    assert table == capsys.readouterr().out.removesuffix("\n")
    assert "| rmler − random |" in table and "2 pairs × 2 seeds × 2 variants, 8 runs" in table
    assert "By fake:other, which was not the reward" in table
    assert (tmp_path / "s" / "summary.json").is_file()
    assert main([str(path), "--out", str(tmp_path / "s"), "--table"]) == 0
    assert main([str(path), "--out", str(tmp_path / "t"), "--set", "differences=[[rmler, randm]]"]) == 2
    assert "Did you mean 'random'" in capsys.readouterr().err


def test_the_committed_studies_load_and_cover_what_the_issue_asks():
    study = recipes.load(StudyConfig, "toy/fuse-study", kind="fuse-study")
    study.check()
    assert len(study.pairs) >= 20 and len(study.seeds) == 3 and len(study.variants) == 9
    assert all(study.recipe(task).budget == 128 for task in study.tasks())
    assert {("rmler", "random"), ("rmler", "ppo")} <= set(study.differences)
    alphas = recipes.load(StudyConfig, "toy/fuse-alpha", kind="fuse-study")
    alphas.check()
    found = {(r.alpha, r.options["policy"]) for r in map(alphas.recipe, alphas.tasks())}
    assert {alpha for alpha, _ in found} == {0, 1, 3, 5, 7}
    assert {policy for _, policy in found} == {"compact", "paper"}


def test_the_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        interval = bootstrap(list(rng.normal(1.0, 2.0, size=24)))
        covered += interval.low <= 1.0 <= interval.high
    assert covered >= 51


def test_intervals_ignore_nan_and_say_when_there_is_nothing():
    assert bootstrap([1.0, math.nan, 3.0]).mean == 2.0
    assert bootstrap([]).text() == "–"
    assert not bootstrap([1.0]).excludes_zero


def test_seeds_are_averaged_within_a_pair_and_differences_are_paired():
    records = [
        {"pair": pair, "variant": variant, "seed": seed, "figures": {"x": value, "y": None}}
        for pair, base in (("p", 0.0), ("q", 100.0))
        for seed in (0, 1)
        for variant, value in (("a", base + seed + 1), ("b", base + seed))
    ]
    random.Random(0).shuffle(records)
    assert by_unit(records, "a", "x") == {"p": 1.5, "q": 101.5}
    difference = paired(records, "a", "b", "x")
    assert (difference.mean, difference.low, difference.high) == (1.0, 1.0, 1.0)
    assert difference.excludes_zero
    assert by_unit(records, "a", "y") == {}


CONCEPTS = ["owl", "snail", "frog", "car"]


def test_calibration_lies_between_other_kinds_and_the_own_kind(fake):
    found = calibrate_presence(fake, CONCEPTS, exemplars=2, probes=6)
    assert found.different_median <= found.threshold < found.same_median
    assert found.balance == pytest.approx(BALANCE_SHARE * (found.same_median - found.different_median))
    assert found.recognized > 0.9
    assert found == calibrate_presence(fake, CONCEPTS, exemplars=2, probes=6)
    assert set(found.to_card()) >= {"threshold", "balance", "unmixed_passes", "unrelated_passes"}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3])
def test_single_concepts_pass_as_a_mix_no_more_often_than_asked(fake, share):
    """The two-stage selection itself decides, picture by picture and pair by pair."""
    found = calibrate_presence(fake, CONCEPTS, exemplars=2, probes=6, false_passes=share)
    seeds = [sample_seed(PROBE_SEED, 0, 0, i) for i in range(6)]
    passed = {True: [], False: []}
    for shown in CONCEPTS:
        images = fake.renderer.sample(fake.renderer.encode([fake.prompt(shown)] * 6), seeds)
        for pair in combinations(CONCEPTS, 2):
            features = [fake.exemplars(concept, 2).features_ME for concept in pair]
            similarities = fake.scorer.similarities(images, features).similarities_BN
            passed[shown in pair] += is_candidate(similarities, found.threshold, found.balance).tolist()
    for own, measured in ((True, found.unmixed_passes), (False, found.unrelated_passes)):
        assert np.mean(passed[own]) == pytest.approx(measured) and measured <= share


def test_calibration_takes_the_lowest_threshold_that_does(fake):
    strict = calibrate_presence(fake, CONCEPTS, exemplars=2, probes=6, false_passes=0.0)
    loose = calibrate_presence(fake, CONCEPTS, exemplars=2, probes=6, false_passes=0.3)
    assert loose.threshold == loose.different_median
    between = calibrate_presence(fake, CONCEPTS, exemplars=2, probes=6, false_passes=0.05)
    assert loose.threshold < between.threshold < strict.threshold
    assert between.unrelated_passes == pytest.approx(3 / 72)  # 5 % of its 72 pictures and pairs are 3.6


def test_calibration_needs_two_concepts_and_a_true_share(fake):
    with pytest.raises(InputError, match="two or more"):
        calibrate_presence(fake, ["owl"])
    with pytest.raises(InputError, match="at least 0 and below 1"):
        calibrate_presence(fake, ["owl", "snail"], false_passes=1.0)
    alone = calibrate_presence(fake, ["owl", "snail"], exemplars=2, probes=6)
    assert math.isnan(alone.unrelated_passes) and math.isfinite(alone.threshold)
