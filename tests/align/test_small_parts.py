"""Prompt sampler, planner, spread, figures over processes, monitor."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pixrl.algorithms import world
from pixrl.algorithms.sampling import Samples
from pixrl.algorithms.world import Alone, Tally, disagreement
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.errors import InputError, RunError
from pixrl.metrics.diversity import group_diversity, mean_pairwise_distance, pixel_features
from pixrl.models.memory.placement import PipelinePart, Placement
from pixrl.models.memory.plan import MemoryPlan
from pixrl.models.sd3 import SD3Policy
from pixrl.rewards.set import Failures, RewardSet
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.data import PromptSampler, share
from pixrl.runs.display import Extent, LiveView, PlainLines
from pixrl.runs.loaded import placed
from pixrl.runs.planner import evened, largest, plan
from tests.align.parts import JUDGE, groups
from tests.tolerance import rounding

AnyT = TypeVar("AnyT")
PROMPTS = PromptSet("letters", tuple(Prompt(letter) for letter in "abcdefg"))


@dataclass(frozen=True)
class Beside:
    """This process, and others that gave their values before."""

    others: Sequence[Any]
    rank: int = 0

    @property
    def size(self) -> int:
        return 1 + len(self.others)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: AnyT) -> list[AnyT]:
        return [value, *self.others]


def test_failed_scores_are_judged_over_all_processes() -> None:
    setting = RewardSetting(name="python", options={"function": f"{JUDGE}:raises"})
    rewards = RewardSet([setting], time_limit=None, max_failed_share=0.5)
    samples, images = Samples.of(groups(1), 3, 1, 0), torch.rand(3, 3, 8, 8)
    with pytest.raises(RunError, match="failed for 3 of 3"):
        rewards.score(samples.batch(images), Alone().gather)
    clean = {"python": Failures(9, Counter())}
    found = rewards.score(samples.batch(images), Beside([clean]).gather)
    assert bool(found["python"].values_B.isnan().all())  # 3 of 12 are within the share
    broken = {"python": Failures(9, Counter({"it broke": 9}))}
    with pytest.raises(RunError, match="failed for 9 of 9"):
        rewards.score(
            Samples.of([], 3, 1, 0).batch(images[:0]), Beside([broken]).gather
        )  # without a picture of its own


@pytest.mark.parametrize("per_step", [1, 3, 7, 10])
def test_every_epoch_takes_every_prompt_once(per_step: int) -> None:
    sampler = PromptSampler(PROMPTS, per_step=per_step, seed=0)
    groups = [group for step in range(21) for group in sampler.groups(step)]
    whole = len(groups) // 7
    for epoch in range(whole):
        assert sorted(g.prompt for g in groups if g.epoch == epoch) == list("abcdefg")
    assert len({(g.epoch, g.index) for g in groups}) == len(groups)
    assert len({"".join(g.prompt for g in groups if g.epoch == epoch) for epoch in range(whole)}) > 1
    assert PromptSampler(PROMPTS, per_step=per_step, seed=0).groups(5) == sampler.groups(5)


@pytest.mark.parametrize(("count", "size"), [(8, 1), (8, 3), (7, 2), (2, 5), (0, 2)])
def test_shares_are_whole_even_and_in_order(count: int, size: int) -> None:
    parts = [list(range(count))[share(count, rank, size)] for rank in range(size)]
    assert [one for part in parts for one in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("count", "most", "size"), [(24, 10, 8), (7, 3, 3), (1, 99, 1), (13, 1, 1), (0, 4, 1)]
)
def test_pieces_are_evened(count: int, most: int, size: int) -> None:
    assert evened(count, most) == size


def test_the_largest_batch_is_reckoned_from_two_trials() -> None:
    gib = 2**30
    assert largest(3 * gib, 5 * gib, free=20 * gib).size == 7  # 16 may be used: 1 beside pictures, 2 each
    assert largest(3 * gib, 5 * gib, free=1 * gib).size == 1
    alone = largest(3 * gib, None, free=4 * gib)
    assert (alone.size, "two run out of memory, 4.0 GiB free" in alone.because) == (1, True)
    with pytest.raises(InputError, match=r"One picture alone.*4\.0 GiB.*gradient_checkpointing=true"):
        largest(None, None, free=4 * gib)


def test_the_plan_says_why(policy: SD3Policy) -> None:
    found = plan(policy, policy.encode(["an owl"]), rollouts=17, trained=17, train_batch=5)
    assert found.micro_batches.train == 5
    assert "5 for 17" in found.reasons[1] and "the recipe says so" in found.reasons[1]
    assert "cache" in found.reasons[0]


def test_spread() -> None:
    same = torch.rand(1, 3, 32, 32).expand(4, -1, -1, -1)
    assert group_diversity(same, 4).item() == pytest.approx(0, abs=rounding(torch.float32, 3 * 32 * 32))
    features = torch.eye(3)[None]
    assert mean_pairwise_distance(features).item() == pytest.approx(1)
    brute = pixel_features(torch.rand(5, 3, 32, 32))
    pairs = [1 - (brute[i] @ brute[j]).item() for i in range(5) for j in range(i)]
    assert mean_pairwise_distance(brute[None]).item() == pytest.approx(
        sum(pairs) / len(pairs), abs=rounding(torch.float32, 3 * 32 * 32)
    )
    assert math.isnan(group_diversity(torch.rand(2, 3, 8, 8), 1)[0].item())
    broken = torch.full((2, 3, 8, 8), torch.nan)
    assert group_diversity(broken, 2).isfinite().all()
    assert len(group_diversity(torch.zeros(0, 3, 8, 8), 4)) == 0


@dataclass(frozen=True)
class Pair:
    """Two processes of which the other one's values are known."""

    others: Sequence[object]
    rank: int = 0
    size: int = 2

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: AnyT) -> list[AnyT]:
        return [value, *self.others]  # type: ignore[list-item]


def test_figures_over_processes() -> None:
    one, other = Tally(), Tally()
    one.add({"ratio": torch.tensor([1.0, 2.0])})
    one.add({"ratio": torch.tensor([3.0])})
    other.add({"ratio": torch.tensor([6.0]), "kl": torch.tensor([0.5])})
    whole = one.over(Pair([other.figures])).figures
    assert whole["ratio"].mean == 3
    assert whole["ratio"].std == pytest.approx(math.sqrt(3.5))
    assert (whole["ratio"].least, whole["ratio"].greatest) == (1, 6)
    assert whole["kl"].mean == 0.5
    assert Tally().over(Alone()).means() == {}


class Twice:
    """A world of two whose other process has the same gradients, twice."""

    rank, size = 0, 2

    def sum(self, values: Tensor) -> Tensor:
        return 3 * values

    def gather(self, value: AnyT) -> list[AnyT]:
        return [value, value]


def test_gradients_are_summed_bucket_by_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor over a bucket's size, one without a gradient; the flag is counted once."""
    monkeypatch.setattr(world, "BUCKET", 4)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in ((3,), (1,), (2, 3), (2,), (1,))]
    for number, parameter in enumerate(parameters[:-1]):
        parameter.grad = torch.arange(parameter.numel()).view_as(parameter) + 10.0 * number
    given = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in parameters]
    assert world.sum_gradients(Twice(), parameters, 2.0) == 6.0
    for parameter, before in zip(parameters, given, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, 3 * before)


def test_disagreement_is_noticed() -> None:
    x = torch.randn(100)
    assert disagreement(Alone(), [x]) == 0
    assert disagreement(Pair([[0.0, 1.0, 2.0]]), [x]) > 0.01
    assert disagreement(Alone(), [torch.zeros(0)]) == 0 == disagreement(Alone(), [])


def test_displays_take_everything(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "reward/geneval/mean": 0.5,
        "group_std": 0.1,
        "failed_share": 0.25,
        "seconds/collect": 2.0,
        "images_per_second": 9.0,
        "kl": math.nan,
    }
    console = Console(force_terminal=True, width=100, record=True)
    for display in (PlainLines(), LiveView(console)):
        display.begin("run", Extent(2))
        display.say("planned: [red]no markup[/x]")
        display.evaluation(0, {"geneval/mean": 0.4, "geneval/failed_share": 0.0})
        for _ in range(2):
            display.step(4, metrics)
        display.evaluation(2, {"geneval/mean": 0.6, "geneval/failed_share": 0.0})
        display.end()
    printed = capsys.readouterr().err
    assert "2/2  geneval 0.500  group std 0.100" in printed
    shown = console.export_text()
    assert "0.400 → 0.600" in shown and "planned: [red]no markup[/x]" in shown


def test_offloading_on_a_cpu_has_no_effect_and_says_so(policy: SD3Policy) -> None:
    with pytest.raises(InputError, match="no effect on a CPU"):
        Placement(policy.pipeline, policy.denoiser, policy.device, MemoryPlan(offload="parts"))


def test_parts_are_fetched_and_sent_away_again(policy: SD3Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[PipelinePart, str]] = []
    placement = policy.placement
    monkeypatch.setattr(placement, "_move", lambda part, device: moves.append((part, device.type)))
    monkeypatch.setattr(placement, "device", torch.device("meta"))
    placement.on_device.clear()
    with policy.present(PipelinePart.VAE):
        assert moves == [(PipelinePart.VAE, "meta")]
    assert moves == [(PipelinePart.VAE, "meta"), (PipelinePart.VAE, "cpu")]
    placement.on_device.add(PipelinePart.TEXT)
    with policy.text_present():
        assert len(moves) == 2


def test_rewards_compute_where_the_process_does() -> None:
    clip = RewardSetting(name="clip_text", options={"model": "toy:clip"})
    assert placed(clip, "cuda:1").options == {"model": "toy:clip", "device": "cuda:1"}
    own = RewardSetting(name="clip_text", options={"model": "toy:clip", "device": "cpu"})
    assert placed(own, "cuda:1") == own
    python = RewardSetting(name="python", options={"function": "m:f"})
    assert placed(python, "cuda:1") == python
