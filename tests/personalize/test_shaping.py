"""SARS and TDW as parts of the loop: Eq. 11 for two rewards, its pairwise form for more, looked up by the true step."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixrl import models
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage, conflict_metrics
from pixrl.algorithms.customized_grpo import SynergySettings, TimeSettings
from pixrl.algorithms.grpo import GRPOLoss
from pixrl.algorithms.loss import Rollouts, noise_levels
from pixrl.equations import group_advantages, prompt_weight, shape_advantage, synergy
from pixrl.errors import ConfigError
from pixrl.models.sd3 import SD3Policy
from pixrl.runs.config import AlignConfig, load_recipe
from pixrl.types import Scores
from tests import tiny
from tests.align.parts import CLIPPED, NFT, ODE, SDE, aligner, groups, scored, weights_of
from tests.personalize.conftest import STUDIED
from tests.tolerance import GRADIENT, PICTURE, agree, agree_after_adam, agree_in_norm, rounding

NAN = math.nan
KINDS = ("tanh", "min", "max", "harmonic")
WEIGHTS = {"identity": 1.0, "prompt": 1.0}
TERMS = 64
"""Of an advantage: the mean and the spread of a small group, and a dozen operations."""
TIME = TimeSettings(identity=("identity",))
CUSTOMIZED = AdvantageSettings(synergy=SynergySettings(), time=TIME)


def advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], settings: AdvantageSettings, steps: int = 1
) -> Tensor:
    return GroupAdvantage(settings)(rewards, weights, steps)


def draw(seed: int = 0, groups: int = 3, size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(groups, size, generator=generator) for name in ("identity", "prompt")}
    return {"identity": found["identity"] * 0.1, "prompt": found["prompt"] * 20 + 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recenter", [False, True])
def test_two_rewards_are_the_papers_equation(kind: str, recenter: bool) -> None:
    rewards = draw()
    rewards["prompt"][0, 2] = NAN
    settings = AdvantageSettings(synergy=SynergySettings(kind=kind, alpha=0.7, recenter=recenter), clamp=None)
    found = advantages(rewards, {"identity": 0.4, "prompt": 0.6}, settings)
    valid = ~rewards["prompt"].isnan()
    one, other = (group_advantages(x.masked_fill(~valid, NAN)) for x in rewards.values())
    expected = shape_advantage(
        one, other, 0.4, 0.6, 0.7, kind, recenter=recenter, valid=valid if recenter else None
    )
    assert found.shape == (1, 3, 6)
    assert found[0, 0, 2].isnan()
    assert agree(found[0][valid], expected[valid], TERMS)


@pytest.mark.parametrize("steps", [10, 25])
def test_time_weights_are_those_of_the_true_step(steps: int) -> None:
    rewards = draw(1)
    found = advantages(rewards, WEIGHTS, AdvantageSettings(time=TIME, clamp=None), steps)
    one, other = (group_advantages(x) for x in rewards.values())
    for step in range(steps):
        weight = prompt_weight(step, steps, steepness=0.8 * 25 / steps)
        assert agree(found[step], (1 - weight) * one + weight * other, TERMS)
    assert prompt_weight(0, steps) == pytest.approx(0.7)
    assert agree(found[0], 0.3 * one + 0.7 * other, TERMS)
    assert agree(found[-1], 0.7 * one + 0.3 * other, TERMS)


def test_inverted_time_weights_run_backwards() -> None:
    weights = TIME.prompt_weights(25)
    inverted = TimeSettings(identity=("identity",), inverted=True).prompt_weights(25)
    assert weights[0] == pytest.approx(0.7) and weights[-1] == pytest.approx(0.3)
    assert inverted[0] == pytest.approx(0.3) and inverted[-1] == pytest.approx(0.7)
    assert agree(weights + inverted, torch.ones(25), 8)
    assert bool((weights.diff() <= rounding(torch.float32, 8)).all())


def test_equal_bounds_are_no_time_weights() -> None:
    even = TimeSettings(identity=("identity",), w_max=0.5, w_min=0.5)
    rewards = draw(2)
    timed = advantages(rewards, WEIGHTS, AdvantageSettings(synergy=SynergySettings(), time=even), 10)
    static = advantages(
        rewards, {"identity": 0.5, "prompt": 0.5}, AdvantageSettings(synergy=SynergySettings())
    )
    assert agree(timed, static.expand_as(timed), TERMS)


def test_more_rewards_are_shaped_pairwise() -> None:
    rewards = {**draw(3), "second": torch.randn(3, 6, generator=torch.Generator().manual_seed(9))}
    weights = dict.fromkeys(rewards, 1.0)
    settings = AdvantageSettings(synergy=SynergySettings(alpha=1.0), clamp=None)
    plain = AdvantageSettings(clamp=None)
    found = advantages(rewards, weights, settings) - advantages(rewards, weights, plain)
    parts = [group_advantages(x) for x in rewards.values()]
    terms = []
    for one, other in itertools.combinations(parts, 2):
        s = synergy(one, other, "tanh")
        terms.append(torch.where((one > 0) | (other > 0), s, -s))
    assert agree(found[0], sum(terms) / 3, TERMS)
    turned = dict(reversed(rewards.items()))
    assert agree(advantages(turned, weights, settings), advantages(rewards, weights, settings), TERMS)


def test_several_rewards_of_one_role_share_its_weight() -> None:
    rewards = {**draw(4), "second": draw(5)["identity"]}
    time = TimeSettings(identity=("identity", "second"))
    found = advantages(
        rewards,
        {"identity": 3.0, "second": 1.0, "prompt": 1.0},
        AdvantageSettings(time=time, clamp=None),
        25,
    )
    a, prompt, b = (group_advantages(rewards[name]) for name in ("identity", "prompt", "second"))
    assert agree(found[0], 0.3 * (0.75 * a + 0.25 * b) + 0.7 * prompt, TERMS)


def test_the_clamp_is_the_last_word() -> None:
    rewards = {"identity": torch.tensor([[0.0] * 30 + [1.0]]), "prompt": torch.tensor([[0.0] * 30 + [1.0]])}
    found = advantages(rewards, WEIGHTS, AdvantageSettings(synergy=SynergySettings(), clamp=2.0), 3)
    assert found.max() == 2.0


def test_conflict_and_correlation_stand_side_by_side() -> None:
    generator = torch.Generator().manual_seed(0)
    one, noise = (torch.randn(50, 24, generator=generator) for _ in range(2))
    shares, correlations = [], []
    for other in (noise, one, -one, (one + noise) / 2):
        rewards = {"identity": one, "prompt": other}
        figures = conflict_metrics(rewards, WEIGHTS, CUSTOMIZED)
        shares.append(figures["conflict_share"])
        correlations.append(figures["reward_correlation"])
    assert shares[0] == pytest.approx(0.5, abs=0.03) and correlations[0] == pytest.approx(0, abs=0.05)
    assert shares[1] == 0 and correlations[1] == pytest.approx(1, abs=rounding(torch.float32, one.numel()))
    assert shares[2] == 1 and correlations[2] == pytest.approx(-1, abs=rounding(torch.float32, one.numel()))
    assert 0.1 < shares[3] < 0.4 and 0.5 < correlations[3] < 0.9


def test_synergy_moves_the_mean_of_a_group() -> None:
    """About -0.11 alpha / 0.5 for independent rewards, as EQUATIONS.md says, and 0 where it is taken out."""
    generator = torch.Generator().manual_seed(0)
    rewards = {name: torch.randn(400, 24, generator=generator) for name in WEIGHTS}
    means = {}
    for recenter in (False, True):
        settings = AdvantageSettings(synergy=SynergySettings(recenter=recenter), clamp=None)
        judged = GRPOLoss(CLIPPED).advantages(rewards, WEIGHTS, GroupAdvantage(settings), 2)
        means[recenter] = judged.figures["advantage_mean"]
    assert means[False] == pytest.approx(-0.11, abs=0.03)
    assert means[True] == pytest.approx(0, abs=rounding(torch.float32, 24, scale=10))


def test_one_reward_has_no_conflict() -> None:
    rewards = {"identity": draw()["identity"]}
    assert conflict_metrics(rewards, {"identity": 1.0}, AdvantageSettings()) == {}


# --- in the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd3(tmp_path_factory.mktemp("tiny") / "sd3", card=tiny.SD3_CARD)


def load(folder: Path) -> SD3Policy:
    policy = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(policy, SD3Policy)
    policy.attach_lora(rank=4, alpha=8)
    return policy


def two_scores(count: int) -> dict[str, Scores]:
    generator = torch.Generator().manual_seed(3)
    return {name: scored(torch.randn(count, generator=generator), name)[name] for name in WEIGHTS}


def turned(rollouts: Rollouts, order: tuple[int, ...]) -> Rollouts:
    return replace(rollouts, transitions=tuple(rollouts.transitions[place] for place in order))


@pytest.mark.parametrize("order", [(2, 0, 1), (2, 1, 0)])
def test_permuting_the_stored_steps_changes_nothing(sd3_folder: Path, order: tuple[int, ...]) -> None:
    results = []
    for own in ((0, 1, 2), order):
        policy = load(sd3_folder)
        found = aligner(policy, CLIPPED, SDE, advantage=CUSTOMIZED, noises=4, grad_clip=1e9)
        rollouts = turned(found.collect(groups(), 0), own)
        found.update(rollouts, two_scores(len(rollouts)), WEIGHTS)
        results.append(torch.cat([p.grad.flatten() for p in found.parameters if p.grad is not None]))
    assert results[0].norm() > 0
    assert agree(*results, GRADIENT)


def test_the_step_matters(sd3_folder: Path) -> None:
    """The trap of the released code would pass the test above if weights did not differ from step to step."""
    gradients = []
    for inverted in (False, True):
        policy = load(sd3_folder)
        time = TimeSettings(identity=("identity",), inverted=inverted)
        found = aligner(policy, CLIPPED, SDE, advantage=AdvantageSettings(time=time), noises=4, grad_clip=1e9)
        rollouts = found.collect(groups(), 0)
        found.update(rollouts, two_scores(len(rollouts)), WEIGHTS)
        gradients.append(torch.cat([p.grad.flatten() for p in found.parameters if p.grad is not None]))
    assert not agree_in_norm(*gradients, PICTURE)


def test_nft_takes_the_weight_of_each_trained_noise_level(
    sd3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load(sd3_folder)
    found = aligner(policy, NFT, ODE, advantage=CUSTOMIZED, noises=4, micro=(3, 3))
    rollouts = found.collect(groups(), 0)
    scores = two_scores(len(rollouts))
    rewards = {name: one.values_B.view(2, 4) for name, one in scores.items()}
    table = advantages(rewards, WEIGHTS, CUSTOMIZED, 4).flatten(1)
    loss, seen = found.method.loss, []
    terms = loss.terms

    def spied(policy, rollouts, rows, advantage_B, part, with_kl):  # type: ignore[no-untyped-def]
        seen.append((list(rows), advantage_B, part))
        return terms(policy, rollouts, rows, advantage_B, part, with_kl)

    monkeypatch.setattr(loss, "terms", spied)
    found.update(rollouts, scores, WEIGHTS)
    assert len(seen) == 3 * 3
    for rows, advantage_B, part in seen:
        levels = noise_levels(rollouts, rows, part)
        assert torch.equal(advantage_B, table[levels, rows])
    assert len({tuple(noise_levels(rollouts, [row], part)[0] for part in range(3)) for row in range(8)}) > 1


@pytest.mark.parametrize("micro", [(2, 2), (8, 5)])
def test_shaping_does_not_depend_on_the_micro_batch(sd3_folder: Path, micro: tuple[int, int]) -> None:
    results = []
    for size in ((99, 99), micro):
        policy = load(sd3_folder)
        start = weights_of(policy)
        found = aligner(policy, NFT, ODE, advantage=CUSTOMIZED, noises=4, micro=size)
        rollouts = found.collect(groups(), 0)
        figures = found.update(rollouts, two_scores(len(rollouts)), WEIGHTS)
        assert {"advantage_mean", "conflict_share", "reward_correlation"} <= figures.keys()
        results.append(weights_of(policy))
    assert agree_after_adam(*results, start, GRADIENT)


# --- recipes ---------------------------------------------------------------------------------------------------------

TWO = [{"name": "a", "kind": "python"}, {"name": "b", "kind": "python"}]
GRPO = {"sampling": {"steps": 4, "noise": "flow_sde"}, "loss": {"kind": "clipped"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": TWO[:1], "advantage": {"synergy": {}}}, "two trained rewards or more, and only a"),
        (
            {"advantage": {"time": {"identity": ["c"]}}},
            "names 'c', which is not trained on; trained are a, b",
        ),
        ({"advantage": {"time": {"identity": ["a", "b"]}}}, "none is left to judge the prompt"),
        ({"advantage": {"time": {"identity": []}}}, "at least 1 item"),
        ({"advantage": {"time": {"identity": ["a"], "w_max": 0.2}}}, "w_min 0.3 is above w_max 0.2"),
        ({"advantage": {"time": {"identity": ["a"], "start": 23}}}, "ends before, at 22"),
        ({"advantage": {"synergy": {"alpha": -1}}}, "greater than 0"),
        ({"advantage": {"synergy": {"kind": "tan"}}}, "Did you mean 'tanh'"),
        (
            {"advantage": {"time": {"identity": ["a"]}}, "rewards": [TWO[0] | {"weight": 2}, TWO[1]]},
            "the weight of 'a' would have no effect",
        ),
        (
            {
                "advantage": {"synergy": {}},
                "stages": [{"until": 5, "weights": {"a": 1, "b": 1}}, {"weights": {"b": 1}}],
            },
            "only b is trained",
        ),
        (
            {"loss": {"kind": "sft"}, "sampling": {"steps": 10}, "advantage": {"synergy": {}}},
            "no effect with loss: sft",
        ),
        ({"loss": {"kind": "sft"}, "sampling": {"steps": 10, "noise": "cps"}}, "which draws nothing"),
        (
            {
                "loss": {"kind": "rpo"},
                "sampling": {"steps": 10},
                "advantage": {"time": {"identity": ["a"]}},
            },
            "ranks by the harmonic mean",
        ),
    ],
)
def test_recipes_that_contradict_themselves(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe({"rewards": TWO, **GRPO, **change})


@pytest.mark.parametrize("name", STUDIED)
def test_the_recipes_are_of_the_same_size(name: str) -> None:
    main, other = (load_recipe(f"toy/{one}") for one in ("customized-grpo", name))
    for part in ("model", "steps", "prompts", "evaluation", "lora"):
        assert other.__dict__[part] == main.__dict__[part], part
    assert [r.name for r in other.rewards] == [r.name for r in main.rewards]


def test_an_align_recipe_can_be_shaped_too() -> None:
    values = {"advantage.synergy": {"alpha": 0.3}}
    rewards = [{"name": "a", "kind": "python"}, {"name": "b", "kind": "python"}]
    found = load_recipe("toy/e2po", settings={**values, "rewards": rewards})
    assert type(found) is AlignConfig
    assert found.advantage.synergy is not None
