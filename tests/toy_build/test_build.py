"""The build survives kills and a change of machine, and its stages fit together."""

import json
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests import tolerance
from torch import Tensor, nn

from pixrl import models
from pixrl.errors import InputError
from pixrl.toy import CHECKPOINTS
from pixrl.toy.judge import SceneJudge
from pixrl.toy.language import canonical, is_held_out
from pixrl.toy.random_scenes import ToySubject, random_scene, resembles_held_out, training_subject
from pixrl.toy.scene import FIRST_PART, MIXED_CLASS, PART_CLASSES, SIDE, Task, part_class
from pixrl.toy.verify import Gate, high_frequencies
from pixrl.toy.verify_generators import frechet
from pixrl.toy.vocabulary import ACCESSORIES, KINDS
from toy_build import STAGES, judge, segmenters, training
from toy_build import build as build_stages
from toy_build import pictures as pictures_module
from toy_build.distil import Guided, distil, levels, midpoint
from toy_build.generators import part_shares
from toy_build.identity import info_nce, new_subjects
from toy_build.pictures import EVEN_SHARES, FUSION_SHARES, SINGLE_SHARES, pictures
from toy_build.segmenters import double_exposure, lesson, part_names
from toy_build.texts import QUESTIONS, facts
from toy_build.training import Build, Draw, Lesson, Plan, keep, kept_rows

PLAN = Plan(steps=8, batch=4, lr=1e-2, warmup=2, ema=0.5, level=0.5)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.setattr(training, "KEPT", tmp_path / "kept")
    return Build(tmp_path / "out", tmp_path / "work")


def fit(build: Build, plan: Plan, *, stop_at: int | None = None) -> list[Tensor]:
    """Train a small network on noise; with `stop_at` the machine goes away before that step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))

    def prepare(draw: Draw) -> Lesson:
        if draw.step == stop_at:
            raise KeyboardInterrupt
        return draw.normal(plan.batch, 3), torch.from_numpy(draw.rng.random((plan.batch, 1))).float()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (network(x) - y).square().mean()

    build.fit("small", network, plan, prepare, loss)
    return [t.detach().clone() for t in (*network.parameters(), *network.buffers())]


def test_rows_that_a_killed_build_has_made_are_not_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "encoded" / "rows.npy", []

    def rows(places: range, most: int) -> Tensor:
        if places.start >= most:
            raise KeyboardInterrupt
        made.append(places)
        return torch.tensor([[place, -place] for place in places], dtype=torch.float32)

    with pytest.raises(KeyboardInterrupt):
        kept_rows(path, 10, lambda places: rows(places, 8), size=4)
    assert not path.exists()
    found = kept_rows(path, 10, lambda places: rows(places, 99), size=4)
    assert made == [range(4), range(4, 8), range(8, 10)]
    assert found.dtype == torch.float16
    assert found.tolist() == [[place, -place] for place in range(10)]
    assert torch.equal(kept_rows(path, 10, lambda places: rows(places, 0)), found)
    assert [file.name for file in path.parent.iterdir()] == ["rows.npy"]


def test_a_killed_build_ends_with_the_same_weights(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    straight = fit(replace(build, work=build.work / "straight"), PLAN)
    with pytest.raises(KeyboardInterrupt):
        fit(build, PLAN, stop_at=5)
    resumed = fit(build, PLAN)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert build.finished("small", PLAN)


def test_lessons_prepared_by_other_processes_are_the_same(build: Build) -> None:
    alone = fit(replace(build, work=build.work / "alone"), PLAN)
    helped = fit(replace(build, work=build.work / "helped", workers=2), PLAN)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_what_is_kept_is_small_and_enough_to_go_on(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(build, PLAN, stop_at=5)
    (path,) = keep(build.work, build.out, training.KEPT)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        assert file.metadata()["step"] == "5"
    assert {name.split(".")[0] for name in names} == {"average", "buffer"}
    elsewhere = replace(build, work=build.work / "elsewhere")
    fit(elsewhere, PLAN)
    assert elsewhere.finished("small", PLAN)
    (build.out / "small").mkdir(parents=True)
    assert keep(elsewhere.work, build.out, training.KEPT) == [], "its checkpoint is what remains of it"


def test_a_stage_that_ended_elsewhere_is_not_trained_again(build: Build) -> None:
    ended = fit(build, PLAN)
    keep(build.work, build.out, training.KEPT)
    elsewhere = replace(build, work=build.work / "elsewhere")
    assert elsewhere.finished("small", PLAN)
    again = fit(elsewhere, PLAN)
    for here, there in zip(ended, again, strict=True):
        assert torch.equal(here.half(), there.half())


def test_muon_is_torchs_in_a_finer_precision() -> None:
    """Three steps on wide, tall and square matrices; torch's iteration is in bfloat16, and so is the tolerance."""
    torch.manual_seed(0)
    starts = [torch.randn(*shape) for shape in ((6, 9), (9, 6), (6, 9), (8, 8))]
    ends = []
    for kind in (torch.optim.Muon, training.Muon32):
        parameters = [nn.Parameter(start.clone()) for start in starts]
        optimizer = kind(parameters, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in range(3):
            for number, parameter in enumerate(parameters):
                noise = torch.Generator().manual_seed(10 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=noise)
            optimizer.step()
        ends.append(parameters)
    rate = 3 * 0.1 * 0.2 * 3  # three steps of at most lr * 0.2 * sqrt(9) an entry
    for start, theirs, ours in zip(starts, *ends, strict=True):
        assert (theirs - start).abs().max() > 0.1 * rate
        assert (theirs - ours).abs().max() < 16 * torch.finfo(torch.bfloat16).eps * rate


def test_averaged_weights_are_what_a_stage_leaves(build: Build) -> None:
    still = replace(PLAN, ema=1.0, steps=3)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
    moved = fit(build, still)
    early = fit(replace(build, work=build.work / "none"), replace(still, ema=0.0))
    change = sum(
        float((a.detach() - b).abs().sum()) for a, b in zip(start.parameters(), moved[:6], strict=True)
    )
    whole = sum(
        float((a.detach() - b).abs().sum()) for a, b in zip(start.parameters(), early[:6], strict=True)
    )
    assert 0 < change < whole, "early steps are averaged with a shorter memory, and still lag behind"


def test_stages_are_named_in_the_order_of_their_needs() -> None:
    needs = {
        "sd3": "vae clip texts",
        "turbo": "vae clip texts",
        "parts": "vae clip texts",
        "flux": "vae clip texts",
        "judge": "vae",
        "texts": "clip",
        "preference": "clip",
    }
    order = list(STAGES)
    for stage, earlier in needs.items():
        assert max(order.index(name) for name in earlier.split()) < order.index(stage)
    with pytest.raises(InputError, match="no stage 'txts'"):
        build_stages(["txts"])


def test_sets_hold_out_what_is_held_out(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    for shares in (EVEN_SHARES, SINGLE_SHARES, FUSION_SHARES):
        assert sum(shares.values()) == pytest.approx(1)
    assert Task.HYBRID not in SINGLE_SHARES
    for what in ("single", "fusion", "even", "scenes"):
        scenes = [pictures_module.SCENE_OF[what](7, row) for row in range(60)]
        assert not any(is_held_out(canonical(scene)) for scene in scenes)
    subjects = [training_subject(np.random.default_rng((7, 2, row))) for row in range(60)]
    assert not any(resembles_held_out(subject) for subject in subjects)


def test_pictures_are_drawn_once_and_read_again(build: Build) -> None:
    first = pictures(build.work, "even", 12, 3, processes=1)
    again = pictures(build.work, "even", 12, 3, processes=1)
    assert (first.images == again.images).all()
    assert again.images.shape == (12, 128, 128, 3)
    parts, kinds = first.parts(range(12)), first.kinds(range(12))
    assert ((parts > 0) == (kinds > 0)).all()
    white = first.cutouts([0])[0].permute(1, 2, 0)
    assert (white[torch.from_numpy(np.array(first.labels[0])) == 0] == 1).all()


def test_lessons_about_parts_show_hybrids_of_any_pair_and_exposures() -> None:
    rng = np.random.default_rng(1)
    classes = [set(np.unique(lesson(rng)[1])) for _ in range(60)]
    kinds = [{(c - FIRST_PART) // 4 for c in found if c >= FIRST_PART} for found in classes]
    assert sum(len(found) >= 2 for found in kinds) > 15
    assert all(max(found) < PART_CLASSES for found in classes)
    picture, exposed = double_exposure(rng)
    assert picture.dtype == np.uint8
    assert (exposed == MIXED_CLASS).sum() > 50
    names = part_names()
    assert names[part_class("owl", 0)] == "owl head"
    assert len(set(names)) == PART_CLASSES == len(KINDS) * 4 + 3


def test_shares_of_parts_in_patches_are_what_is_counted() -> None:
    classes = torch.randint(PART_CLASSES, (2, 128, 128), generator=torch.Generator().manual_seed(0))
    shares = part_shares(classes)
    assert shares.shape == (2, 64, PART_CLASSES)
    patch = classes[1, 16:32, 32:48]
    counted = torch.bincount(patch.flatten(), minlength=PART_CLASSES) / 256
    assert tolerance.agree(shares[1, 8 + 2], counted, 256)


def test_twins_differ_in_their_mark_alone_and_the_loss_wants_views_together() -> None:
    subjects = new_subjects(np.random.default_rng(2), 16)
    for first, twin in zip(subjects[::2], subjects[1::2], strict=True):
        assert first.mark != twin.mark
        assert replace(first, mark=twin.mark) == twin
    labels = torch.arange(4).repeat(2)
    together = torch.eye(4).repeat(2, 1)
    apart = torch.cat((torch.eye(4), torch.eye(4).roll(1, 0)))
    assert info_nce(together, labels) < info_nce(apart, labels)


def test_captions_are_asked_only_what_they_answer() -> None:
    rng = np.random.default_rng(3)
    for number in range(200):
        scene = random_scene(rng, list(Task)[number % len(Task)])
        for name, answer in facts(scene).items():
            assert answer is None or 0 <= answer < QUESTIONS[name]


def test_a_walk_leads_where_its_teacher_leads() -> None:
    """Along v = x the exact end is known: the midpoint's error falls with the stride's cube."""
    x, ids = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.zeros(2, 5)

    def along(x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return x

    def error(stride: float) -> float:
        strides = torch.full((2,), stride, dtype=torch.float64)
        end = x - stride * midpoint(along, x, torch.ones(2), strides, ids)
        return float((end - x * math.exp(-stride)).abs().max())

    assert 6 < error(0.2) / error(0.1) < 10


def test_a_walk_asks_its_teacher_at_the_levels_that_it_passes() -> None:
    asked: list[Tensor] = []

    def teacher(x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        asked.append(t)
        return x

    t, stride = torch.tensor([1.0, 0.3]), torch.tensor([0.2, 0.1])
    midpoint(teacher, torch.ones(2, 1, 1, 1), t, stride, torch.zeros(2, 5))
    assert torch.equal(asked[0], t)
    assert torch.allclose(asked[1], torch.tensor([0.9, 0.25]))


def test_guidance_leads_away_from_the_empty_caption() -> None:
    """Rows whose tokens are the empty caption's answer 1, others 3: guidance of 2 gives 1 + 2 * (3 - 1)."""
    empty = torch.tensor([7, 7])

    def velocity(x: Tensor, t: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
        assert kept.shape == (4, 3)
        return torch.where((ids == empty).all(1)[:, None, None, None], 1.0, 3.0).expand_as(x)

    guided = Guided(velocity, lambda given: (empty.expand_as(given[0]), given[1]), 2.0)
    answer = guided(torch.zeros(2, 1, 2, 2), torch.ones(2), torch.tensor([[1, 2], [7, 7]]), torch.ones(2, 3))
    assert torch.equal(answer, torch.tensor([5.0, 1.0])[:, None, None, None].expand_as(answer))


def test_levels_are_on_the_samplers_grid_as_often_as_asked(build: Build) -> None:
    found = levels(build.draw(3), 4000, 4, 0.5)
    on_grid = (found * 4 == (found * 4).round()).float().mean()
    assert found.min() > 0 and found.max() == 1.0
    assert abs(float(on_grid) - 0.5) < 5 * 0.5 / math.sqrt(4000), "five standard errors"


def test_a_student_learns_the_average_velocity(build: Build) -> None:
    """Of a teacher v = x, whose midpoint step over a quarter is one step along (1 - 1/8) x."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.5))

    student = Scaled()
    distil(
        build, "student", Plan(steps=150, batch=8, lr=2e-2, warmup=5, ema=0.9, weight_decay=0.0), student,
        (lambda x, t, ids: student.factor * x, lambda x, t, ids: x),
        lambda draw: (draw.normal(8, 1, 2, 2), (torch.zeros(8, 2),), (torch.zeros(8, 2),)), steps=4,
        on_grid=1.0,
    )  # fmt: skip
    assert float(student.factor.detach()) == pytest.approx(1 - 1 / 8, abs=0.01)


@pytest.mark.slow
def test_a_stage_writes_a_checkpoint_that_its_class_loads(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for plan in ("PARTS_PLAN", "REDRAWN_PLAN"):
        monkeypatch.setattr(segmenters, plan, replace(getattr(segmenters, plan), steps=2, batch=2))
    bank = [lesson(np.random.default_rng(row)) for row in range(4)]
    monkeypatch.setattr(
        segmenters, "redrawn", lambda *given: tuple(np.stack(part) for part in zip(*bank, strict=True))
    )
    segmenters.build_parts(build)
    model = segmenters.SegformerForSemanticSegmentation.from_pretrained(build.out / "parts")
    assert model.config.id2label[part_class("snail", 3)] == "snail extra"
    assert (build.out / "parts" / "provenance.json").exists()


def test_the_judge_learns_from_others_than_the_held_out_subjects(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = [scene.objects[0] for scene in judge.subject_scenes(build.seed, 200)]
    assert not any(resembles_held_out(ToySubject(one.kind, one.palette)) for one in things if one.palette)
    for name, few in (("DRAWINGS", 12), ("DECODED", 4), ("PLAN", replace(judge.PLAN, steps=2, batch=4))):
        monkeypatch.setattr(judge, name, few)
    build.out.mkdir(parents=True)
    (build.out / "vae").symlink_to(CHECKPOINTS / "vae")
    judge.build_judge(build)
    backgrounds, worn = SceneJudge.load(build.out / "judge").reads(torch.rand(3, 3, SIDE, SIDE))
    assert backgrounds.shape == (3,) and worn.shape == (3, len(ACCESSORIES))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "turbo", "flux"])
def test_a_generator_goes_through_its_rounds(
    name: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps a round on a dozen pictures; what comes out loads as its pipeline and draws."""
    build.out.mkdir(parents=True)
    for part in ("vae", "clip", "texts"):
        (build.out / part).symlink_to(CHECKPOINTS / part)
    few = {"sd3": "single", "turbo": "fusion", "flux": "subjects"}
    stage = import_module(f"toy_build.{name}")
    for module in (import_module("toy_build.sd3"), stage):
        for plan in ("TEACHER", "STUDENT"):
            monkeypatch.setattr(module, plan, replace(getattr(module, plan), steps=2, batch=2))
    monkeypatch.setattr(stage, "pictures", lambda work, what, count, seed: pictures(work, what, 12, seed, 1))
    monkeypatch.setattr("toy_build.sd3.pictures", stage.pictures)
    monkeypatch.setattr("torch.compile", lambda module, **given: module)
    calibrated: list[str] = []  # pictures of two steps show nothing that similarities could be taken from
    if name != "flux":
        monkeypatch.setattr(stage, "calibrate", lambda build, name: calibrated.append(name))
    shared = CHECKPOINTS / "vae" / "diffusion_pytorch_model.safetensors"
    before = shared.read_bytes()
    for _ in range(2):  # the second time nothing is left to train, and what is saved replaces what is there
        getattr(stage, f"build_{name}")(build)
    assert calibrated == ([] if name == "flux" else [name] * 2)
    assert shared.read_bytes() == before, "the parts that pipelines share are nobody's to write"
    policy = models.load(build.out / name)
    assert policy.sample(policy.encode(["a photo of an owl"]), [3]).shape == (1, 3, SIDE, SIDE)
    assert (build.work / "pictures" / f"{few[name]}-7-12").is_dir()
    record = json.loads((build.out / name / "provenance.json").read_text())
    assert set(record["plans"]) == {name, f"{name}_teacher"}


def test_figures_of_the_gates_mean_what_they_say() -> None:
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 64, 64, generator=noise)
    blurred = torch.nn.functional.avg_pool2d(images, 9, stride=1, padding=4)
    assert high_frequencies(blurred) < 0.1 * high_frequencies(images)
    features = torch.randn(400, 6, generator=noise, dtype=torch.float64)
    assert frechet(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet(features + 2.0, features) == pytest.approx(6 * 4.0)
    assert frechet(3 * features, features) == pytest.approx(4 * float(features.T.cov().trace()), rel=0.01)
    assert (Gate("x", "y", 0.3, 0.2).passed, Gate("x", "y", 0.3, at_most=0.2).passed) == (True, False)
