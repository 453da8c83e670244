"""The truth about a fusion's pictures: in its manifest, log, report and figures; learned from only if asked."""

import json

import pytest
import torch

from pixrl import api
from pixrl.doctor.fusion import examine_fusion
from pixrl.errors import CheckpointError, ConfigError, InputError
from pixrl.fusion.config import FuseConfig, FusionReward
from pixrl.fusion.select import truths_of
from pixrl.fusion.trainer import FusionTrainer
from pixrl.fusion.world import FusionSession, FusionWorld
from pixrl.hub import Card
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs.fuse import go_on, start
from pixrl.jobs.fuse_many import PAIRS, ManyConfig, start_many
from pixrl.metrics.true_fusion import Fusion, FusionVerdict
from pixrl.report.fuse import run_figures, write_fuse_report, write_many_report
from pixrl.runs.folder import RunFolder
from pixrl.runs.loop import take_step
from tests import tiny
from tests.fuse.world import fake_world

PAIR = ("owl", "snail")
KINDS = ("owl", "snail", "mushroom")


class FakeTruth:
    """A picture is a true fusion where one of its pixels is bright in one colour, the more the brighter."""

    name = "fake-parts"

    def __init__(self):
        self.provenance = {"model": "fake-parts (0123)", "licence": "none"}
        self.judged = 0

    def parents(self, concepts):
        if not set(concepts) <= set(KINDS):
            raise InputError(f"A true fusion has two or more different parents; given: {', '.join(concepts)}")
        return tuple(concepts)

    def judge(self, images_BCHW, concepts):
        self.judged += len(images_BCHW)
        return tuple(
            Fusion(FusionVerdict.FUSION, (0.75, 0.25), bright)
            if bright > 0.45
            else Fusion(FusionVerdict.THIRD_KIND, (0.25, 0.0), 0.0)
            for bright in images_BCHW.flatten(1)[:, 119].tolist()
        )


def told_world(**given) -> FusionWorld:
    world = fake_world(**given)
    world.truth = FakeTruth()
    return world


def config(**settings):
    return FuseConfig(**{"concepts": PAIR, "budget": 32, "batch": 8, "exemplars": 2, **settings})


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return start(config(), tmp_path_factory.mktemp("told") / "run", world=told_world())


@pytest.fixture(scope="module")
def untold(tmp_path_factory):
    return start(config(), tmp_path_factory.mktemp("untold") / "run", world=fake_world())


def test_the_truth_changes_nothing_but_what_is_told(told, untold):
    for one, other in zip(told.rows, untold.rows, strict=True):
        assert one.seed == other.seed
        assert {name: one.scores[name] for name in other.scores} == other.scores
    assert told.selection == untold.selection
    assert not truths_of(untold.rows, PAIR)
    for name in ("recipe.yaml", "world.json"):
        assert "truth" not in (untold.folder.path / name).read_text()


def test_every_row_of_the_manifest_says_what_the_picture_is(told):
    session = FusionSession(told_world(), config())
    trainer = FusionTrainer(session, config())
    steps = [take_step(trainer, number) for number in range(config().steps)]
    expected = tuple(truth for step in steps for truth in step.scores.truths)
    assert {truth.verdict for truth in expected} == {FusionVerdict.FUSION, FusionVerdict.THIRD_KIND}
    assert truths_of(told.rows, PAIR) == expected
    row = next(row for row in told.rows if row.extra["verdict"] == "fusion")
    assert row.scores["true_fusion/owl"] == 0.75 and row.scores["true_fusion/snail"] == 0.25
    assert 0 < row.scores["true_fusion"] < 1


def test_the_log_has_the_share_of_each_verdict(told):
    for row in told.folder.metrics():
        verdicts = [one.extra["verdict"] for one in told.rows if one.step == row["step"]]
        assert row["true_fusion/fusion"] == verdicts.count("fusion") / len(verdicts)
        assert row["true_fusion/third_kind"] == verdicts.count("third_kind") / len(verdicts)
        assert row["true_fusion/overlay"] == 0


def test_the_reports_say_it(told, untold, tmp_path):
    page = write_fuse_report(told).read_text(encoding="utf-8")
    count = sum(row.extra["verdict"] == "fusion" for row in told.rows)
    assert f"true fusion {count}, a third kind {len(told.rows) - count}; by fake-parts" in page
    assert page.count("<br>true fusion") >= count
    assert "Rank correlation of reward and truth" in page
    assert run_figures(told).true_fusions == pytest.approx(count / len(told.rows))
    other = write_fuse_report(untold).read_text(encoding="utf-8")
    assert "the truth" not in other and "true fusion" not in other
    values = config().model_dump(mode="json", exclude={"concepts", "sampler", "options"})
    many = ManyConfig(concepts=(PAIR, ("owl", "mushroom")), samplers=("random",), fuse=values)
    runs = start_many(many, PAIRS, tmp_path / "many", world=told_world())
    assert "true fusions</th>" in write_many_report(runs).read_text(encoding="utf-8")


def test_a_resumed_run_is_told_by_the_same_network(told, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(config(), path, world=told_world(die_after=25))
    changed = told_world()
    changed.truth.provenance = {"model": "fake-parts (4567)", "licence": "none"}
    with pytest.raises(CheckpointError, match=r"truth: 'fake-parts \(0123\)'"):
        go_on(path, world=changed)
    run = go_on(path, world=told_world())
    manifests = [RunFolder.open(one).manifest() for one in (run.folder.path, told.folder.path)]
    assert manifests[0] == manifests[1]


def test_a_recipe_may_learn_from_the_truth(tmp_path):
    asked = config(reward="true_fusion", budget=64, sampler="rmler")
    world = told_world(broken=frozenset({30}))
    run = start(asked, tmp_path / "run", world=world)
    assert world.truth.judged == 64
    for row in run.rows:
        assert row.scores["reward"] == (None if row.failed else row.scores["true_fusion"])
    assert sum(row.failed is not None for row in run.rows) == 1
    rewards = [row.scores["reward"] for row in run.rows if row.failed is None]
    assert torch.tensor(rewards[-16:]).mean() > torch.tensor(rewards[:16]).mean() + 0.1
    page = write_fuse_report(run).read_text(encoding="utf-8")
    assert "the balance of a true fusion, 0 of everything else" in page
    again = start(config(budget=64, sampler="rmler"), tmp_path / "other", world=told_world())
    assert [row.seed for row in again.rows] and again.rows[-1].scores["reward"] != run.rows[-1].scores[
        "reward"
    ]


def test_without_a_segmentation_of_parts_it_cannot_be_learned_from(tmp_path):
    with pytest.raises(ConfigError, match="needs a segmentation of parts, and toy:turbo names none"):
        start(config(reward=FusionReward.TRUE_FUSION), tmp_path / "run", world=fake_world())
    assert not (tmp_path / "run").exists()


def test_concepts_that_are_no_kinds_are_refused_only_where_the_recipe_asks(tmp_path):
    frog = config(concepts=("owl", "frog"))
    run = start(frog, tmp_path / "run", world=told_world())
    assert not truths_of(run.rows, frog.concepts) and fuse_job.read_world(run.folder).truth is None
    for asked in ({"truth": "fake-parts"}, {"reward": "true_fusion", "truth": "fake-parts"}):
        with pytest.raises(InputError, match="different parents; given: owl, frog"):
            start(config(concepts=("owl", "frog"), **asked), tmp_path / "other", world=told_world())
        assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    labels = (
        "background",
        *(f"{kind} {slot}" for kind in ("owl", "snail", "frog") for slot in ("head", "body")),
    )
    return tiny.segmenter(tmp_path_factory.mktemp("parts"), labels=labels)


def test_a_checkpoint_tells_the_truth_of_the_toy_worlds_pictures(parts, tmp_path):
    given = {"budget": 4, "batch": 4, "sampler": "random", "exemplars": 1, "truth": str(parts)}
    api.fuse(["owl", "snail"], out=tmp_path / "run", **given)
    rows = RunFolder.open(tmp_path / "run").manifest()
    assert len(truths_of(rows, PAIR)) == 4
    record = json.loads((tmp_path / "run" / "world.json").read_text())
    assert record["truth"] == str(parts) and record["scorer"]["truth"].startswith(str(parts))


def test_the_doctor_finds_what_stands_against_it_in_files(parts, tmp_path):
    def problems(**given):
        return [one.message for one in examine_fusion(config(**given), about_to_run=True).problems]

    assert not problems(truth=str(parts))
    assert examine_fusion(config(truth=str(parts))).rewards.keys() >= {str(parts)}
    (refused,) = problems(truth=str(parts), concepts=("owl", "cat"))
    assert "different parents of owl, snail, frog; given: owl, cat" in refused
    (other,) = problems(truth="toy:segmenter")
    assert "toy:segmenter does not tell the parts of kinds: its class 'owl' is no part" in other
    untold = str(tiny.sd3(tmp_path / "untold", card={**tiny.SD3_CARD, "clip": "toy:clip"}))
    (lacking,) = problems(reward="true_fusion", model=untold, segmenter="toy:segmenter")
    assert "add --set truth=FOLDER" in lacking
    (missing,) = problems(truth=str(tmp_path / "nowhere"))
    assert "nowhere" in missing


def test_a_checkpoints_card_names_it():
    assert Card(parts="toy:parts", synonyms={"mug": "cup"}).parts == "toy:parts"
