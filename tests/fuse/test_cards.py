"""What a fusion takes on a card that is not here: against what torch counts, what tensors take, and what runs do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from pixrl import api, cli, models
from pixrl.device import Precision
from pixrl.doctor import fusion as doctor
from pixrl.doctor.cards import CARDS, RESERVED, Gpu
from pixrl.doctor.diagnosis import Findings
from pixrl.doctor.estimate import empty_renderer
from pixrl.doctor.fusion import FusionEstimate, estimate_fusion, examine_fusion, plan_fusion
from pixrl.errors import ConfigError, InputError
from pixrl.fusion.config import FuseConfig, FusionMemory
from pixrl.fusion.world import FusionWorld, mixing_of, render
from pixrl.hub import Card, Checkpoint
from pixrl.models.base import Conditioning, Mixture
from pixrl.models.flux import FluxPolicy
from pixrl.models.memory.estimate import PeakMeter, part_sizes
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.sd3 import SD3Policy
from pixrl.runs.planner import trial
from tests import tiny, tiny_language
from tests.fuse.world import FakeRenderer, FakeScorer
from tests.tolerance import PICTURE, agree

FULL = Precision(torch.float32, None)
NEAR = 1.1
OWL_SNAIL = ("owl", "snail")
KINDS = ["columns", "tokens", "steps", "velocity", "spatial", "regions"]


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd3(tmp_path_factory.mktemp("tiny") / "sd3", card=tiny.SD3_CARD)


def recipe(model: Path | str, kind: str = "columns", **changes: Any) -> FuseConfig:
    settings = {"concepts": OWL_SNAIL, "model": str(model), "mixing": {"kind": kind}, **changes}
    return FuseConfig.model_validate(settings)


def loaded(folder: Path | str, **options: Any) -> FlowPipelinePolicy:
    policy = models.load(folder, device="cpu", dtype="float32", **options)
    assert isinstance(policy, FlowPipelinePolicy)
    return policy


def estimated(folder: Path, config: FuseConfig) -> FusionEstimate:
    how = (str(folder), Checkpoint(folder), FULL, torch.device("cpu"), config.memory, Findings())
    made = empty_renderer(*how, **config.drawing)
    assert isinstance(made, FlowPipelinePolicy)
    return estimate_fusion(made, config, FULL)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(sd3_folder: Path, kind: str) -> None:
    """Of four children of even shares, drawn and decoded by the real weights."""
    config = recipe(sd3_folder, kind)
    found = estimated(sd3_folder, config)
    policy = loaded(sd3_folder)
    mixing = mixing_of(policy, Card(), config)
    even = torch.full((4, 2, mixing.features_ND.shape[1]), 0.5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        render(policy, mixing, even, [1, 2, 3, 4])
    expected = 4 * found.operations(found.passes)
    assert counter.get_total_flops() / NEAR <= expected <= counter.get_total_flops() * NEAR
    source = mixing.mix(even)
    assert (found.rows == 2) == isinstance(source, Mixture)
    assert 4 * found.passes == (source.passes if isinstance(source, Mixture) else 4 * policy.settings.steps)


@pytest.mark.parametrize("kind", ["columns", "velocity", "regions"])
def test_memory_is_the_sum_of_the_tensors(sd3_folder: Path, kind: str) -> None:
    """The weights, and what is alive while so many rows go through the network and the decoder."""
    config = recipe(sd3_folder, kind, dtype="float32", memory={"rollout_batch": 4})
    found = plan_fusion(config, CARDS["4090"]).plans[0]
    policy = loaded(sd3_folder)
    weights = sum(part.bytes for part in part_sizes(Checkpoint(sd3_folder), FULL).values())
    mixing = mixing_of(policy, Card(), config)
    source = mixing.mix(torch.full((1, 2, mixing.features_ND.shape[1]), 0.5))
    row = source.parts[0] if isinstance(source, Mixture) else source
    with PeakMeter() as meter:
        trial(policy, row)(4)
    judges = api.examine(config.model_dump(mode="json") | {"kind": "fuse"}).rewards
    peak = weights + meter.peak + sum(judges.values())
    assert peak / NEAR <= found.peak <= peak * NEAR
    assert (found.rollout_batch, found.train_batch) == (4, None)


def test_a_mixture_shows_a_picture_beside_words(tmp_path: Path) -> None:
    """Of which each pass has the picture's tokens too."""
    picture = tmp_path / "crab.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    words = recipe("toy:flux", "velocity", concepts=["owl", "crab"])
    shown = recipe("toy:flux", "velocity", concepts=["owl", f"crab={picture}"])
    folder = models.load("toy:flux", device="cpu")
    assert isinstance(folder, FluxPolicy)
    place = folder.checkpoint.folder
    alone, beside = estimated(place, words), estimated(place, shown)
    assert beside.drawing.each >= alone.drawing.each  # at 64 pixels the decoder takes the most
    assert beside.pass_operations > 1.3 * alone.pass_operations


def card(free: int) -> Gpu:
    return replace(CARDS["4090"], gib=(free + RESERVED) / 2**30)


@pytest.mark.parametrize(("kind", "rows"), [("columns", 5), ("velocity", 4)])
def test_fewer_pictures_at_a_time_where_a_batch_does_not_fit(sd3_folder: Path, kind: str, rows: int) -> None:
    """As many whole children as fit, an averaged one counting once for each concept; one setting says so."""
    config = recipe(sd3_folder, kind, dtype="float32")
    whole = plan_fusion(config, CARDS["4090"]).plans[0]
    assert (whole.changes, whole.rollout_batch) == ((), 16 if kind == "columns" else 32)
    found = estimated(sd3_folder, config)
    beside = whole.peak - found.drawing.bytes(whole.rollout_batch)
    small = card(beside + int(found.drawing.bytes(5) / doctor.SAFE_SHARE) + found.drawing.each // 4)
    plan = plan_fusion(config, small).plans[0]
    assert plan.fits
    assert (plan.changes, plan.rollout_batch) == ((f"memory.rollout_batch={rows}",), rows)
    asked = recipe(sd3_folder, kind, dtype="float32", memory={"rollout_batch": rows})
    assert plan_fusion(asked, small).plans[0] == replace(plan, changes=())
    tiny = plan_fusion(config, card(1000))
    assert tiny.chosen is None
    least = 1 if kind == "columns" else 2
    assert {one.rollout_batch for one in tiny.plans} == {least}


def test_the_plans_are_in_order_and_timed(sd3_folder: Path) -> None:
    found = plan_fusion(recipe(sd3_folder, budget=32), CARDS["4090"])
    parts = "memory.offload=parts"
    assert [plan.changes for plan in found.plans] == [
        (),
        (parts,),
        (parts, "memory.base=int8"),
        (parts, "memory.base=nf4"),
        ("memory.offload=sequential",),
    ]
    as_is, offloaded, int8, nf4, slow = found.plans
    assert as_is.peak > offloaded.peak > max(int8.peak, nf4.peak)
    assert offloaded.peak > slow.peak
    assert as_is.seconds < offloaded.seconds < slow.seconds
    assert found.chosen is as_is
    estimate = estimated(sd3_folder, recipe(sd3_folder))
    rate = 0.4 * CARDS["4090"].half
    assert as_is.seconds == pytest.approx(16 * estimate.operations(estimate.passes) / rate)
    pictures = 32 + 2 * 4  # and the exemplars
    assert as_is.hours * 3600 == pytest.approx(pictures * estimate.operations(estimate.passes) / rate)


class Counting(FakeRenderer):
    """Says how many rows it was given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def sample(self, conditioning: Conditioning, seeds: Any) -> torch.Tensor:
        self.sizes.append(len(seeds))
        return super().sample(conditioning, seeds)

    def sample_mixture(self, mixture: Mixture, seeds: Any) -> torch.Tensor:
        self.sizes.append(len(seeds) * len(mixture.parts))
        return super().sample(mixture.parts[0], seeds)


def test_a_world_draws_so_many_at_a_time() -> None:
    whole, few = (FusionWorld(Counting(), FakeScorer(), Card(), at_once=most) for most in (None, 3))
    for world in (whole, few):
        row = world.renderer.encode(["owl", "snail"] * 4)
        seeds = list(range(8))
        mixture = Mixture((row, row), (torch.full((8, 2, 1, 1), 0.5),))
        drawn = [world.draw(row, seeds), world.draw(mixture, seeds), world.exemplars("owl", 4).images_MCHW]
        if world is whole:
            expected = drawn
    assert all(agree(b, a, PICTURE) for a, b in zip(expected, drawn, strict=True))
    assert isinstance(whole.renderer, Counting) and isinstance(few.renderer, Counting)
    assert whole.renderer.sizes == [8, 16, 4]
    assert few.renderer.sizes == [3, 3, 2, *[2] * 8, 3, 1]


def test_a_recipe_draws_so_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its run's recipe says so, where others say nothing."""
    sizes: list[int] = []
    sample = SD3Policy.sample

    def counted(self: SD3Policy, conditioning: Conditioning, seeds: Any) -> torch.Tensor:
        sizes.append(len(seeds))
        return sample(self, conditioning, seeds)

    monkeypatch.setattr(SD3Policy, "sample", counted)
    settings = {
        "concepts": ["owl", "snail"],
        "model": "toy:sd3",
        "sampler": "random",
        "budget": 4,
        "batch": 4,
    }
    memory = {"rollout_batch": 2}
    config = FuseConfig.model_validate(settings | {"memory": memory, "exemplars": 1, "device": "cpu"})
    run = api.run_fuse(config, tmp_path / "run").run
    assert sizes == [1, 1, 2, 2]
    assert "rollout_batch: 2" in (run / "recipe.yaml").read_text()
    assert "rollout_batch" not in json.dumps(FuseConfig(concepts=OWL_SNAIL).model_dump(mode="json"))


def test_the_doctor_says_how_many_fit(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(sd3_folder, dtype="float32", device="cpu")
    found = examine_fusion(config)
    assert found.drawing is not None and found.needed is not None
    rest = found.needed - found.drawing.bytes(16)
    free = rest + int(found.drawing.bytes(5) / doctor.SAFE_SHARE) + found.drawing.each // 4
    monkeypatch.setattr("pixrl.doctor.estimate.free_bytes", lambda device: free)
    lack = [problem.message for problem in examine_fusion(config).problems if "are needed" in problem.message]
    assert len(lack) == 1 and "Save memory with memory.rollout_batch=5," in lack[0]
    fits = examine_fusion(config.model_copy(update={"memory": FusionMemory(rollout_batch=5)}))
    assert not any("are needed" in problem.message for problem in fits.problems)
    assert fits.batches is not None and fits.batches.reasons == ("rollout: 5 at a time, the recipe says so",)
    many = examine_fusion(config.model_copy(update={"memory": FusionMemory(rollout_batch=10**6)}))
    assert many.batches == examine_fusion(config).batches, "the generator takes no more at a time than suits"
    monkeypatch.setattr("pixrl.doctor.estimate.free_bytes", lambda device: rest)
    (lack,) = [
        problem.message for problem in examine_fusion(config).problems if "are needed" in problem.message
    ]
    assert "memory.rollout_batch" not in lack


def test_the_command_line(sd3_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "toy/fuse", "--gpu", "4090"])
    assert result.exit_code == 0
    assert result.stdout.endswith("It fits. Type: pixrl fuse CONCEPT CONCEPT --recipe toy/fuse\n")
    mine = tmp_path / "mine.json"
    mine.write_text(
        json.dumps({"concepts": ["bird of the night", "snail"], "model": str(sd3_folder), "kind": "fuse"})
    )
    (tmp_path / "mine.yaml").write_text(mine.read_text())
    result = CliRunner().invoke(cli.app, ["doctor", str(tmp_path / "mine.yaml"), "--gpu", "24", "--json"])
    found = json.loads(result.stdout)
    assert found["fits"] and found["trained"] is None and found["plans"][0]["train_batch"] is None
    plans = api.plan_card(str(tmp_path / "mine.yaml"), "24")
    assert list(plans.lines("mine.yaml"))[-1].startswith(
        "It fits. Type: pixrl fuse 'bird of the night' snail --recipe"
    )
    with pytest.raises(ConfigError, match="One process draws a fusion: leave --processes out"):
        api.plan_card("toy/fuse", "24", processes=2)
    with pytest.raises(InputError, match="cannot attend by region"):
        plan_fusion(recipe(tiny_language.z_image(tmp_path / "z"), "regions"), CARDS["4090"])
