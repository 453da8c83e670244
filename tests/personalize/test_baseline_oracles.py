"""SFT's and RPO's losses against their formulas, written out here: signs, factors, and what each term is of."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.customized_grpo import TimeSettings
from pixrl.algorithms.loss import Rollouts, noised
from pixrl.algorithms.rpo import RPOLoss, RPOSettings, harmonic_scores
from pixrl.algorithms.sft import SFTLoss
from pixrl.models.flux import FluxPolicy
from pixrl.models.slots import Slot
from tests.personalize.test_baselines import RPO, SFT, WEIGHTS, make, picture, subject_groups, two
from tests.tolerance import MODEL, PICTURE, agree, rounding

ROWS = (1, 6)
LOSERS = (3, 4)


def moved(policy: FluxPolicy) -> None:
    """Weights that differ from the base's."""
    assert policy.lora is not None
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.lora.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def judged(rollouts: Rollouts) -> Rollouts:
    rival_B = torch.zeros(len(rollouts.x0_B), dtype=torch.long)
    rival_B[list(ROWS)] = torch.tensor(LOSERS)
    return replace(rollouts, rival_B=rival_B)


def squared(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).flatten(1).mean(dim=1)


def test_the_targets_are_each_prompts_own(policy: FluxPolicy) -> None:
    rollouts = make(policy, SFT).collect(subject_groups(), 0)
    for group, rows in enumerate((rollouts.x0_B[:4], rollouts.x0_B[4:])):
        with torch.no_grad():
            target = policy.encode_images(picture(10 + group)[None])
        assert agree(rows, target.expand_as(rows), MODEL)


def test_sft_is_flow_matching(policy: FluxPolicy) -> None:
    """v is to be noise - x0, the velocity of the straight path from x0 at t = 0 to the noise at t = 1."""
    found = make(policy, SFT)
    rollouts = found.collect(subject_groups(), 0)
    moved(policy)
    x_t, t_B, x0, noise = noised(policy, rollouts, ROWS, 0)
    t = t_B.view(-1, 1, 1, 1)
    assert agree(x_t, (1 - t) * x0 + t * noise, 8)
    loss = found.method.loss
    assert isinstance(loss, SFTLoss)
    with torch.no_grad():
        terms = loss.terms(policy, rollouts, ROWS, torch.ones(2), 0, False)
        expected = squared(policy.velocity(x_t, t_B, rollouts.conditioning(ROWS)), noise - x0)
    assert agree(terms.loss_B, expected, MODEL)


@pytest.mark.parametrize("similarity", [0.0, 0.25])
def test_rpo_is_dpo_on_regression_errors_plus_the_weighted_similarity_loss(
    policy: FluxPolicy, similarity: float
) -> None:
    found = make(policy, RPO)
    rollouts = judged(found.collect(subject_groups(), 0))
    moved(policy)
    loss = RPOLoss(RPOSettings(timesteps=2, beta=50, similarity=similarity))
    _, t_B, won, noise = noised(policy, rollouts, ROWS, 0)
    lost = rollouts.x0_B[list(LOSERS)]
    t = t_B.view(-1, 1, 1, 1)
    condition = rollouts.conditioning(ROWS)
    with torch.no_grad():
        terms = loss.terms(policy, rollouts, ROWS, torch.ones(2), 0, False)
        gains = []
        for x0 in (won, lost):
            x_t, wanted = (1 - t) * x0 + t * noise, noise - x0
            own = squared(policy.velocity(x_t, t_B, condition), wanted)
            with policy.slot(Slot.REFERENCE):
                gains.append(own - squared(policy.velocity(x_t, t_B, condition), wanted))
        margin = -50 / 2 * (gains[0] - gains[1])
        expected = -torch.log(torch.sigmoid(margin))
        size = float(50 / 2 * own.max())  # of what cancels in the margin
        # The pair is told apart, so a sign shows.
        assert (margin.abs() > 10 * rounding(torch.float32, MODEL, size)).all()
        reference = condition.references[0]
        asked = replace(policy.encode(["a photo of a dog"] * 2), references=condition.references)
        x_t = (1 - t) * reference + t * noise
        kept = squared(policy.velocity(x_t, t_B, asked), noise - reference)
    assert agree(terms.loss_B, expected + similarity * kept, MODEL, scale=size)
    assert torch.equal(terms.figures["pair_accuracy"] > 0, margin > 0)


def test_the_similarity_loss_is_of_the_first_reference(policy: FluxPolicy) -> None:
    groups = [
        replace(group, metadata={**group.metadata, "shown": [picture(place), picture(50 + place)]})
        for place, group in enumerate(subject_groups())
    ]
    found = make(policy, RPOSettings(timesteps=2, similarity=1.0))
    rollouts = judged(found.collect(groups, 0))
    _, t_B, _, noise = noised(policy, rollouts, ROWS, 0)
    first, second = (x for x in rollouts.conditioning(ROWS).references)
    assert not agree(first, second, PICTURE)
    t = t_B.view(-1, 1, 1, 1)
    asked = replace(policy.encode(["a photo of a dog"] * 2), references=(first, second))
    with torch.no_grad():
        terms = found.method.loss.terms(policy, rollouts, ROWS, torch.ones(2), 0, False)
        expected = squared(policy.velocity((1 - t) * first + t * noise, t_B, asked), noise - first)
    assert agree(terms.figures["similarity_loss"], expected, MODEL)


def test_each_winners_rival_is_of_its_own_group(policy: FluxPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(policy, RPO)
    seen: dict[int, int] = {}
    original = RPOLoss.terms

    def spying(self: RPOLoss, policy: FluxPolicy, rollouts: Rollouts, rows, *more):  # type: ignore[no-untyped-def]
        assert rollouts.rival_B is not None
        seen.update({row: int(rollouts.rival_B[row]) for row in rows})
        return original(self, policy, rollouts, rows, *more)

    monkeypatch.setattr(RPOLoss, "terms", spying)
    scores = two(8)
    found.update(found.collect(subject_groups(), 0), scores, WEIGHTS)
    rewards = {name: one.values_B.view(2, 4) for name, one in scores.items()}
    harmonic = harmonic_scores(rewards, WEIGHTS, AdvantageSettings())
    assert seen == {
        4 * group + int(row.argmax()): 4 * group + int(row.argmin()) for group, row in enumerate(harmonic)
    }


def test_candidates_stay_the_frozen_bases_when_the_model_has_moved(policy: FluxPolicy) -> None:
    found = make(policy, RPO)
    before = found.collect(subject_groups(), 0).images_BCHW
    moved(policy)
    assert agree(found.collect(subject_groups(), 0).images_BCHW, before, PICTURE)


def test_the_harmonic_mean_is_weighted_and_a_failed_sample_is_in_no_pair() -> None:
    rewards = {
        "identity": torch.tensor([[0.0, 1.0, 2.0, math.nan]]),
        "prompt": torch.tensor([[2.0, 1.0, 0.0, 9.0]]),
    }
    settings = AdvantageSettings()
    for weights in ({"identity": 3.0, "prompt": 1.0}, {"identity": 1.0, "prompt": 3.0}):
        found = harmonic_scores(rewards, weights, settings)[0]
        assert found[3].isnan()
        z = torch.tensor([-1.0, 0.0, 1.0]) / (torch.tensor([0.0, 1.0, 2.0]).std(correction=0) + settings.eps)
        identity, prompt = z.sigmoid(), z.flip(0).sigmoid()
        expected = 4 / (weights["identity"] / identity + weights["prompt"] / prompt)
        assert agree(found[:3], expected, 64)
        assert (found[2] > found[0]) == (weights["identity"] > weights["prompt"])
    table = (
        RPOLoss(RPO)
        .advantages(rewards, {"identity": 3.0, "prompt": 1.0}, GroupAdvantage(settings), 1)
        .advantage_TPS
    )
    assert table[0, 0, 3].isnan()


def test_the_transition_of_the_time_weights_begins_and_ends_where_it_is_told() -> None:
    """Before `start` and from `end` on the weight is a plateau; given for 25 steps."""
    for start, end in ((6.0, 22.0), (10.0, 16.0)):
        made = TimeSettings(identity=("a",), start=start, end=end, center=(start + end) / 2)
        weights = made.prompt_weights(25).tolist()
        inside = [step for step in range(1, 25) if weights[step] != weights[step - 1]]
        assert inside[0] == start and inside[-1] == end
