"""Run folders of fusions: what they hold, exact resume after a kill anywhere, Ctrl-C, failures, bad input."""

import json
import math
import os
import shutil
import signal

import pytest
import torch

from pixrl import api
from pixrl.algorithms import SAMPLERS
from pixrl.algorithms.fusion.mixing import Pooled
from pixrl.errors import CheckpointError, InputError, RunError, UnknownWordError
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.select import one_a_noise_first
from pixrl.fusion.world import FusionSession
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs.fuse import go_on, select_again, start
from pixrl.runs import checkpoint
from pixrl.runs.folder import RunFolder
from pixrl.runs.log import load_coefficients
from tests.fuse.world import fake_world
from tests.tolerance import agree, rounding

PAIR = ("owl", "snail")


def config(**settings):
    return FuseConfig(**{"concepts": PAIR, "budget": 32, "batch": 8, "exemplars": 2, **settings})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing broke off."""
    path = tmp_path_factory.mktemp("whole") / "run"
    start(config(), path, world=fake_world())
    return path


def lines(run):
    return (run / "rollouts" / "manifest.jsonl").read_text()


def same_run(a, b):
    assert lines(a) == lines(b)
    for place in ("rollouts/images", "rollouts/coefficients"):
        files = sorted(file.name for file in (a / place).iterdir())
        assert files == sorted(file.name for file in (b / place).iterdir())
        assert all((a / place / name).read_bytes() == (b / place / name).read_bytes() for name in files)
    assert (a / "selection.json").read_text() == (b / "selection.json").read_text()
    steps = [[row["step"] for row in RunFolder.open(run).metrics()] for run in (a, b)]
    assert steps[0] == steps[1]
    tensors = [checkpoint.load(checkpoint.latest(run))[0] for run in (a, b)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_a_run_folder_holds_everything(tmp_path, world):
    run = start(config(), tmp_path / "run", world=world)
    path = run.folder.path
    assert len(run.rows) == 32
    row = run.rows[9]
    assert (row.index, row.step, row.concepts, row.failed) == (9, 1, PAIR, None)
    assert set(row.scores) == {"S/owl", "S/snail", "reward", "balance"}
    s1, s2 = row.scores["S/owl"], row.scores["S/snail"]
    assert row.scores["balance"] == pytest.approx(abs(s1 - s2), abs=rounding(torch.float32, 8))
    assert row.scores["reward"] == pytest.approx(
        s1 + s2 - 5 * abs(s1 - s2), abs=rounding(torch.float32, 8, scale=5)
    )
    assert (path / row.file).is_file()
    share = row.extra["coefficients"]["share"]
    assert share["owl"] + share["snail"] == pytest.approx(1, abs=1e-3)
    assert len(list((path / "exemplars").glob("owl-*.png"))) == 2
    assert {p.name for p in path.iterdir()} >= {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "world.json",
    }
    metrics = RunFolder.open(path).metrics()
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert {"reward/fusion/mean", "failed_share", "ratio_mean", "seconds/render"} <= set(metrics[0])


def test_coefficients_and_seeds_give_a_picture_back(tmp_path, world):
    run = start(config(), tmp_path / "run", world=world)
    session = FusionSession(world, run.config)
    coefficients_BND = load_coefficients(run.folder, 2)
    seeds = [row.seed for row in run.rows if row.step == 2]
    similarities_BN, _ = session.score(session.render(coefficients_BND, seeds))
    expected = [row.scores["S/owl"] for row in run.rows if row.step == 2]
    assert similarities_BN[:, 0].tolist() == pytest.approx(expected, abs=rounding(torch.float32, 48))


@pytest.mark.parametrize("sampler", ["rmler", "ppo", "agswap", "golden", "search"])
def test_killed_while_rendering_and_resumed_is_the_unbroken_run(tmp_path, sampler):
    start(config(sampler=sampler), tmp_path / "whole", world=fake_world())
    exemplars = 2 * 2
    with pytest.raises(KeyboardInterrupt):
        start(config(sampler=sampler), tmp_path / "broken", world=fake_world(die_after=exemplars + 16))
    assert len(lines(tmp_path / "broken").splitlines()) == 16
    go_on(tmp_path / "broken", world=fake_world())
    same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize(
    "place",
    ["pixrl.runs.folder.RunFolder.save_images", "pixrl.runs.log.save_coefficients",
     "pixrl.runs.folder.RunFolder.append_manifest", "pixrl.runs.folder.RunFolder.log",
     "pixrl.runs.checkpoint.save", "pixrl.runs.checkpoint.keep_last"],
)  # fmt: skip
def test_killed_between_any_two_writes_and_resumed_is_the_unbroken_run(tmp_path, whole, place, step):
    """A child process is ended by SIGKILL at the nth call of a function that writes."""
    child = os.fork()
    if child == 0:
        kill_at(place, step)
        start(config(), tmp_path / "broken", world=fake_world())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    go_on(tmp_path / "broken", world=fake_world())
    same_run(whole, tmp_path / "broken")


def kill_at(place, call):
    """In this process, the nth call of `module.Class.name` or `module.name` is its last."""
    owner, _, name = place.rpartition(".")
    module, _, last = owner.rpartition(".")
    holder = vars(__import__(module, fromlist=[last]))[last]
    real = vars(holder)[name]
    calls = []

    def die(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(holder, name, die)


def test_a_torn_manifest_line_and_a_torn_checkpoint_are_made_anew(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "torn")
    manifest = tmp_path / "torn" / "rollouts" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    newest = checkpoint.latest(tmp_path / "torn")
    (newest / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "torn" / "selection.json").unlink()
    go_on(tmp_path / "torn", world=fake_world())
    same_run(whole, tmp_path / "torn")


def test_a_changed_model_is_not_resumed(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        start(config(), tmp_path / "run", world=fake_world(die_after=12))
    world = fake_world()
    monkeypatch.setattr(world.renderer, "fingerprint", lambda: "another")
    with pytest.raises(CheckpointError, match="has changed since the run"):
        go_on(tmp_path / "run", world=world)


def test_a_changed_scorer_is_not_resumed(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        start(config(), tmp_path / "run", world=fake_world(die_after=12))
    world = fake_world()
    world.scorer.provenance = {**world.scorer.provenance, "model": "fake (fedcba9876543210)"}
    with pytest.raises(CheckpointError, match=r"model: 'fake \(0123456789abcdef\)', now 'fake \(fedcba"):
        go_on(tmp_path / "run", world=world)


def test_an_existing_run_is_never_overwritten_without_force(tmp_path, world):
    start(config(), tmp_path / "run", world=world)
    before = lines(tmp_path / "run")
    with pytest.raises(RunError, match="--force"):
        start(config(seed=1), tmp_path / "run", world=world)
    assert lines(tmp_path / "run") == before
    start(config(seed=1), tmp_path / "run", world=world, force=True)
    assert lines(tmp_path / "run") != before


def test_an_unknown_toy_word_lists_the_vocabulary_and_starts_nothing(tmp_path, world):
    with pytest.raises(UnknownWordError, match="mushroom") as caught:
        start(config(concepts=("owl", "dragon")), tmp_path / "run", world=world)
    assert "'dragon'" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("concepts", [("owl",), ()])
def test_one_concept_is_not_a_fusion(tmp_path, world, concepts):
    with pytest.raises(InputError, match="at least two concepts"):
        fuse_job.start(
            FuseConfig.model_construct(**{**dict(config()), "concepts": concepts}),
            tmp_path / "r",
            world=world,
        )


def test_a_failed_picture_is_null_with_a_reason_and_the_run_goes_on(tmp_path):
    run = start(config(pool=0), tmp_path / "run", world=fake_world(broken=frozenset({3, 10})))
    failed = [row for row in run.rows if row.failed]
    assert [row.index for row in failed] == [3, 10]
    assert failed[0].failed == "no foreground found"
    assert set(failed[0].scores.values()) == {None}
    assert run.selection.failed == 2
    assert not {3, 10} & set(run.selection.indices)


def test_too_many_failures_stop_the_run_with_the_reason_and_everything_saved(tmp_path):
    world = fake_world(broken=frozenset(range(32)))
    with pytest.raises(RunError, match="no foreground found") as caught:
        start(config(), tmp_path / "run", world=world)
    assert "failed for 8 of 8 pictures, more than the share 0.5 that max_failed_share allows" in str(
        caught.value
    )
    assert len(RunFolder.open(tmp_path / "run").manifest()) == 8


def test_all_failed_below_the_limit_still_ends_with_a_report(tmp_path):
    world = fake_world(broken=frozenset(range(16)))
    run = start(config(budget=16, max_failed_share=0.99, batch=16), tmp_path / "a", world=fake_world())
    assert run.selection.failed == 0
    with pytest.raises(RunError):
        start(config(budget=16, max_failed_share=0.99, batch=16), tmp_path / "b", world=world)


def test_selecting_again_makes_nothing_and_says_how_far_the_best_fell_short(tmp_path, world):
    run = start(config(pool=0), tmp_path / "run", world=world)
    made = world.renderer.rendered
    strict = select_again(run.folder.path, presence=0.99)
    assert strict.selection.indices == ()
    near = strict.selection.nearest[0]
    row = strict.rows[near.index]
    least = min(row.scores["S/owl"], row.scores["S/snail"])
    assert near.presence == pytest.approx(0.99 - least, abs=rounding(torch.float32, 16))
    assert "None of 32 pictures qualifies" in strict.selection.summary()
    assert f"The nearest, {near.index}, fell short by" in strict.selection.summary()
    loose = select_again(run.folder.path, presence=-0.5, balance=3.0, keep=3)
    totals = [sum(run.rows[i].scores[f"S/{c}"] for c in PAIR) for i in range(32)]
    ranked = sorted(range(32), key=lambda i: -totals[i])
    assert list(loose.selection.indices) == one_a_noise_first(ranked, [row.seed for row in run.rows])[:3]
    assert loose.selection.indices[0] == ranked[0]
    assert len({run.rows[i].seed for i in loose.selection.indices}) == 3
    assert len(list((run.folder.path / "samples").glob("selected-*.png"))) == 3
    assert world.renderer.rendered == made
    assert fuse_job.open_finished(run.folder.path).selection == loose.selection


def test_each_noise_shows_its_best_before_any_shows_its_second():
    assert one_a_noise_first([4, 2, 0, 1, 3], [7, 8, 7, 8, 7]) == [4, 1, 2, 3, 0]
    assert one_a_noise_first([2, 0, 1], [5, 5, 5]) == [2, 0, 1]
    assert one_a_noise_first([2, 0, 1], [1, 2, 3]) == [2, 0, 1]


def test_the_offered_presence_threshold_lets_the_nearest_pass(tmp_path, world):
    run = start(config(), tmp_path / "run", world=world)
    strict = select_again(run.folder.path, presence=0.95, balance=3.0)
    offered = float(strict.selection.summary().split("--presence ")[1])
    again = select_again(run.folder.path, presence=offered, balance=3.0)
    assert strict.selection.nearest[0].index in again.selection.indices


def test_thresholds_come_from_the_recipe_then_the_card_then_the_paper(tmp_path, world):
    run = start(config(), tmp_path / "a", world=world)
    assert (run.selection.thresholds.presence, run.selection.thresholds.presence_source) == (
        0.3,
        "calibrated for toy:turbo",
    )
    run = start(config(presence=0.4), tmp_path / "b", world=world)
    assert (run.selection.thresholds.presence, run.selection.thresholds.presence_source) == (0.4, "given")
    uncalibrated = fake_world()
    uncalibrated.card = uncalibrated.card.model_copy(update={"presence": None})
    run = start(config(), tmp_path / "c", world=uncalibrated)
    assert run.selection.thresholds.presence == 0.63
    assert "ViT-H/14" in run.selection.thresholds.presence_source


def test_exemplars_do_not_depend_on_the_runs_seed_and_are_made_once(world):
    first = FusionSession(world, config(seed=0)).exemplars[0]
    made = world.renderer.rendered
    assert FusionSession(world, config(seed=7, sampler="random")).exemplars[0] is first
    assert world.renderer.rendered == made
    assert torch.equal(fake_world().exemplars("owl", 2).images_MCHW, first.images_MCHW)


def test_pooled_features_are_mixed_as_asked(world):
    coefficients_BND = torch.rand(3, 2, 48 + 8, generator=torch.Generator().manual_seed(0))
    coefficients_BND = coefficients_BND / coefficients_BND.sum(dim=1, keepdim=True)
    pooled_NE = FusionSession(world, config()).mixing.sources.pooled_BE
    average = FusionSession(world, config(pooled=Pooled.AVERAGE)).mixing.mix(coefficients_BND[:, :, :48])
    assert agree(average.pooled_BE, pooled_NE.mean(0).expand(3, -1), 8)
    weighted = FusionSession(world, config(pooled=Pooled.WEIGHT)).mixing.mix(coefficients_BND[:, :, :48])
    assert agree(weighted.pooled_BE, coefficients_BND[:, :, :48].mean(2) @ pooled_NE, 64)
    session = FusionSession(world, config(pooled=Pooled.COLUMNS))
    assert session.task().columns == 56
    columns = session.mixing.mix(coefficients_BND)
    assert agree(columns.pooled_BE, (coefficients_BND[:, :, 48:] * pooled_NE).sum(1), 64)
    assert columns.tokens_BLD.shape == (3, 3, 48)


def test_mixing_is_symmetric_in_the_concepts(world):
    coefficients_BND = torch.rand(2, 3, 48)
    names = ("owl", "snail", "frog")
    order = [2, 0, 1]
    one = FusionSession(world, config(concepts=names)).mixing.mix(coefficients_BND)
    other = FusionSession(world, config(concepts=tuple(names[i] for i in order))).mixing.mix(
        coefficients_BND[:, order]
    )
    assert agree(one.tokens_BLD, other.tokens_BLD, 64)
    assert agree(one.pooled_BE, other.pooled_BE, 64)


def test_three_concepts_run_with_every_sampler(tmp_path, world):
    for sampler in SAMPLERS.entries:
        run = start(
            config(concepts=("owl", "snail", "frog"), sampler=sampler), tmp_path / sampler, world=world
        )
        assert set(run.rows[0].scores) == {"S/owl", "S/snail", "S/frog", "reward", "balance"}


def test_python_returns_images_scores_and_the_folder(tmp_path, world, monkeypatch):
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: world)
    result = api.fuse(["owl", "snail"], budget=16, batch=8, exemplars=1, out=tmp_path / "run")
    assert len(result.images) == len(result.scores) == 16
    assert result.images[0].size == (8, 8)
    assert len(result.images[2:5]) == 3
    assert result.run == tmp_path / "run"
    assert result.report.is_file()
    assert all(math.isfinite(score["reward"]) for score in result.scores)
    assert set(result.selected) <= set(range(16))
    with pytest.raises(InputError, match="concepts is a list"):
        api.fuse("owl")


def test_python_without_a_folder_makes_a_new_one_each_time(tmp_path, world, monkeypatch):
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: world)
    monkeypatch.chdir(tmp_path)
    runs = [api.fuse(["owl", "snail"], budget=8, batch=8, exemplars=1).run.name for _ in range(2)]
    assert runs == ["owl+snail-rmler-0", "owl+snail-rmler-0-2"]


def test_resume_of_another_kind_of_run_is_refused(tmp_path):
    RunFolder.create(tmp_path / "run", kind="align", recipe=config())
    with pytest.raises(RunError, match="'align'"):
        fuse_job.go_on(tmp_path / "run")
    RunFolder.create(tmp_path / "study", kind="fuse-study", recipe=config())
    with pytest.raises(RunError, match="'fuse-study', not a folder of fusions"):
        api.resume(tmp_path / "study")


def test_leaving_the_writer_waits_for_the_disk_and_reports_a_full_one(tmp_path, world, monkeypatch):
    def full(*args):
        raise RunError("The disk is full")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(RunError, match="The disk is full"):
        start(config(budget=8), tmp_path / "run", world=world)
    assert len(RunFolder.open(tmp_path / "run").manifest()) == 8


def test_a_damaged_selection_says_how_to_choose_anew(tmp_path, world):
    run = start(config(), tmp_path / "run", world=world)
    (run.folder.path / "selection.json").write_text(json.dumps({"keep": 1}))
    with pytest.raises(CheckpointError, match="pixrl select"):
        api.write_report(run.folder.path)
    (run.folder.path / "selection.json").unlink()
    assert "32 pictures" in api.write_report(run.folder.path).read_text()  # as it stands
    assert not (run.folder.path / "selection.json").exists()
