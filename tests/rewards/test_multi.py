"""A set of rewards: kept apart, weighted by stage, and stopped with the reasons when too many scores fail."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pixrl import config, rewards
from pixrl.errors import ConfigError, InputError, RunError, ShapeError
from pixrl.rewards.base import Reward
from pixrl.rewards.set import Failures, RewardSet, RewardSetting, Stage
from pixrl.types import RewardBatch, Scores

BATCH = RewardBatch(torch.rand(4, 3, 8, 8), ["a", "b", "c", "d"])


class Double(Reward):
    """Gives what it is told to."""

    name = "double"

    def __init__(self, answer: Callable[[], Scores]) -> None:
        self.answer = answer

    def score(self, batch: RewardBatch) -> Scores:
        return self.answer()


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        monkeypatch.setitem(rewards.REWARDS, name, f"{__name__}:Double")
    monkeypatch.setattr(rewards, "load", lambda name, answer: Double(answer))


def gives(*values: float, **more: object) -> Callable[[], Scores]:
    reasons = tuple("it is nan" if value != value else None for value in values)
    return lambda: Scores(torch.tensor(values), reasons, provenance={"model": "m"}, **more)  # type: ignore[arg-type]


def one(answer: Callable[[], Scores], share: float = 1.0, limit: float | None = None) -> RewardSet:
    return RewardSet(
        [RewardSetting(name="one", options={"answer": answer})], time_limit=limit, max_failed_share=share
    )


def settings(*names: str, **more: object) -> list[RewardSetting]:
    return [RewardSetting(name=name, options={"answer": gives(1, 2, 3, 4)}, **more) for name in names]  # type: ignore[arg-type]


def make(rewards: Sequence[RewardSetting], stages: Sequence[Stage] = ()) -> RewardSet:
    return RewardSet(rewards, stages, time_limit=None, max_failed_share=0.5)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_stay_apart_and_keep_detail_and_provenance() -> None:
    detail = {"count": torch.arange(4)}
    both = make(
        [
            RewardSetting(name="one", options={"answer": gives(1, 2, 3, 4, detail=detail)}),
            RewardSetting(name="other", kind="two", held_out=True, options={"answer": gives(4, 3, 2, 1)}),
        ]
    )
    assert both.names == ("one", "other")
    scores = both.score(BATCH)
    assert list(scores) == ["one", "other"]
    assert scores["one"].values_B.tolist() == [1, 2, 3, 4]
    assert scores["other"].values_B.tolist() == [4, 3, 2, 1]
    assert scores["one"].detail == detail
    assert scores["one"].provenance == {"model": "m"}


@pytest.mark.parametrize("limit", [None, 60.0])
def test_a_reward_that_raises_fails_and_is_never_zero(limit: float | None) -> None:
    def broken() -> Scores:
        raise RuntimeError("out of memory")

    scores = one(broken, limit=limit).score(BATCH)["one"]
    assert scores.values_B.isnan().all()
    assert scores.values_B.shape == (4,)
    assert all(reason is not None and "RuntimeError: out of memory" in reason for reason in scores.reasons)
    assert scores.provenance["model"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (gives(1, 2, 3), "scores [3] with 3 reasons for 4 pictures"),
        (lambda: Scores(torch.zeros(4, 1), (None,) * 4), "scores [4, 1]"),
        (lambda: Scores(torch.zeros(4), (None,) * 3), "with 3 reasons"),
    ],
)
def test_the_wrong_number_of_scores_fails(answer: Callable[[], Scores], reason: str) -> None:
    scores = one(answer).score(BATCH)["one"]
    assert scores.values_B.isnan().all()
    assert reason in str(scores.reasons[0])


def test_inf_and_unexplained_nan_get_a_reason() -> None:
    values = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf])
    scores = one(lambda: Scores(values, (None,) * 4)).score(BATCH)["one"]
    assert scores.reasons == (None, *["the score is not finite"] * 3)
    assert scores.values_B.isnan().tolist() == [False, True, True, True]


def test_a_hanging_reward_fails_and_the_others_do_not() -> None:
    free = threading.Event()

    def hang() -> Scores:
        free.wait()
        return gives(1, 2, 3, 4)()

    both = RewardSet(
        [RewardSetting(name="one", options={"answer": hang}), *settings("two")],
        time_limit=0.05,
        max_failed_share=1.0,
    )
    scores = both.score(BATCH)
    free.set()
    assert scores["one"].reasons == ("no answer within 0.05 s",) * 4


# --- the failed share ------------------------------------------------------------------------------------------------


def test_past_the_failed_share_the_run_stops_with_the_reasons() -> None:
    nan = float("nan")
    assert one(gives(nan, nan, 1, 2), share=0.5).score(BATCH)["one"].values_B.isnan().sum() == 2
    with pytest.raises(RunError) as caught:
        one(gives(nan, nan, nan, 2), share=0.5).score(BATCH)
    for part in (
        "'one' failed for 3 of 4",
        "share 0.5 that scoring.max_failed_share allows",
        "3 x it is nan",
    ):
        assert part in str(caught.value)


def test_the_commonest_reasons_are_told() -> None:
    reasons = ("a", "a", "b", "c")
    shares = one(lambda: Scores(torch.full((4,), torch.nan), reasons), share=0.0)
    with pytest.raises(RunError, match=r"2 x a\n  1 x b\n  1 x c$"):
        shares.score(BATCH)


def test_the_share_is_that_of_all_processes() -> None:
    """A process whose pictures all failed goes on where the others' did not; a clean one stops with the others."""
    nan = float("nan")
    failing, clean = gives(nan, nan, nan, nan)(), gives(1, 2, 3, 4)()
    rewards = one(gives(1), share=0.4)
    bad, good, none = (
        {"one": Failures.of(scores)} for scores in (failing, clean, Scores(torch.zeros(0), ()))
    )
    rewards.require_enough([bad, good, good, none])  # 4 of 12
    with pytest.raises(RunError, match=r"'one' failed for 4 of 8 pictures.*\n  4 x it is nan"):
        rewards.require_enough([good, bad])
    rewards.require_enough([none])


def test_a_held_out_reward_that_fails_stops_the_run_too() -> None:
    failing = RewardSetting(name="two", held_out=True, options={"answer": gives(*[float("nan")] * 4)})
    with pytest.raises(RunError, match="'two' failed for 4 of 4"):
        make([*settings("one"), failing]).score(BATCH)


def test_no_failed_score_is_allowed_at_share_zero() -> None:
    assert one(gives(1, 2, 3, 4), share=0.0).score(BATCH)
    with pytest.raises(RunError):
        one(gives(1, 2, 3, float("nan")), share=0.0).score(BATCH)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_the_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        one(gives(1, 2, 3, 4), share=share)


def test_bad_batches() -> None:
    with pytest.raises(ShapeError, match="4 pictures needs 4 prompts"):
        one(gives(1)).score(RewardBatch(BATCH.images_BCHW, ["a"]))
    with pytest.raises(ShapeError, match="4 metadata or none; got 4 and 1"):
        one(gives(1)).score(RewardBatch(BATCH.images_BCHW, BATCH.prompts, [{}]))
    with pytest.raises(InputError, match="no picture"):
        one(gives(1)).score(RewardBatch(torch.zeros(0, 3, 8, 8), []))


# --- weights and stages ----------------------------------------------------------------------------------------------


def weights(of: RewardSet, *steps: int) -> list[Mapping[str, float]]:
    return [of.weights(step) for step in steps]


def test_weights_without_stages_leave_held_out_ones_out() -> None:
    made = make([*settings("one", weight=2.0), *settings("two", held_out=True), *settings("three")])
    assert weights(made, 0, 10**9) == [{"one": 2.0, "three": 1.0}] * 2


def test_stages_by_step() -> None:
    stages = [
        Stage(until=3, weights={"one": 1.0}),
        Stage(until=5, weights={"two": 0.5, "one": 0.0}),
        Stage(weights={"two": 1.0, "one": 3.0}),
    ]
    made = make(settings("one", "two"), stages)
    assert weights(made, 0, 2) == [{"one": 1.0}] * 2
    assert weights(made, 3, 4) == [{"two": 0.5}] * 2
    assert weights(made, 5, 100) == [{"one": 3.0, "two": 1.0}] * 2
    assert list(made.weights(5)) == ["one", "two"]


@pytest.mark.parametrize(
    ("given", "stages", "message"),
    [
        ([], [], "No reward is given"),
        (settings("onne"), [], "Unknown reward 'onne'. Did you mean 'one'?"),
        ([RewardSetting(name="x", kind="onne")], [], "Did you mean 'one'?"),
        (settings("one", "one"), [], "{name: one_2, kind: one, ...}"),
        (settings("one", "two", held_out=True), [], "nothing would be trained"),
        (settings("one", held_out=True, weight=2.0) + settings("two"), [], "held out, so never trained on"),
        (settings("one", weight=2.0), [Stage(weights={"one": 1})], "weighted by the stages"),
        (settings("one"), [Stage(weights={"onee": 1})], "not among the rewards. Did you mean 'one'?"),
        (
            settings("one") + settings("two", held_out=True),
            [Stage(weights={"one": 1, "two": 1})],
            "which is held out",
        ),
        (settings("one", "two"), [Stage(weights={"one": 1, "two": 0})], "No stage trains on 'two'"),
        (settings("one"), [Stage(weights={"one": 1})] * 2, "Stage 1 has no end"),
        (
            settings("one"),
            [
                Stage(until=5, weights={"one": 1}),
                Stage(until=5, weights={"one": 2}),
                Stage(weights={"one": 1}),
            ],
            "Stages 1 and 2 overlap: one ends at step 5, the next at 5",
        ),
        (settings("one"), [Stage(until=5, weights={"one": 1})], "The last stage ends at step 5"),
    ],
)
def test_contradictions(given: list[RewardSetting], stages: list[Stage], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(given, stages)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (RewardSetting, {"name": "one", "weight": 0}, "held_out: true"),
        (RewardSetting, {"name": "one", "weight": -1}, "above 0"),
        (RewardSetting, {"name": "one", "weight": float("inf")}, "finite"),
        (RewardSetting, {"name": ""}, "name"),
        (RewardSetting, {"name": "one", "wieght": 1}, "Did you mean 'weight'"),
        (Stage, {"weights": {"one": 0, "two": 0}}, "every weight is 0"),
        (Stage, {"weights": {}}, "every weight is 0"),
        (Stage, {"weights": {"one": -1}}, "from 0 up"),
        (Stage, {"until": 0, "weights": {"one": 1}}, "until"),
        (Stage, {"until": 3}, "weights is missing"),
    ],
)
def test_settings_refuse(model: type[Stage], values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(model, values)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        settings("one")[0].weight = 3.0  # type: ignore[misc]


def test_a_bad_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="time_limit"):
        one(gives(1), limit=0)


def test_settings_load_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, pixrl.rewards.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
