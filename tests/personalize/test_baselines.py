"""SFT and RPO as losses of the common loop."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.exploration import Group
from pixrl.algorithms.loss import LossSettings
from pixrl.algorithms.rpo import RPOLoss, RPOSettings, class_prompt, harmonic_scores
from pixrl.algorithms.sft import SFTSettings
from pixrl.algorithms.trainer import Aligner
from pixrl.errors import InputError
from pixrl.models.flux import FluxPolicy
from pixrl.models.slots import Slot
from pixrl.types import Scores
from tests.align.parts import ODE, aligner, same, scored, weights_of
from tests.tolerance import GRADIENT, MODEL, PICTURE, agree, agree_after_adam, rounding

WEIGHTS = {"identity": 1.0, "prompt": 1.0}
SFT = SFTSettings(timesteps=3)
RPO = RPOSettings(timesteps=2, beta=50)


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


def subject_groups(count: int = 2, *, target: bool = True) -> list[Group]:
    texts = ("a red dog", "a cat in snow", "an old owl")
    return [
        Group(
            place,
            0,
            place,
            texts[place],
            {
                "class": "dog",
                "shown": [picture(place, (40, 24))],
                **({"target": picture(10 + place)} if target else {}),
            },
        )
        for place in range(count)
    ]


def make(policy: FluxPolicy, loss: LossSettings, **changes: object) -> Aligner:
    return aligner(policy, loss, ODE, **{"noises": 4, **changes})  # type: ignore[arg-type]


def two(count: int, seed: int = 0) -> dict[str, Scores]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scored(torch.rand(count, generator=generator), name)[name] for name in WEIGHTS}


# --- references in the loop ------------------------------------------------------------------------------------------


def test_rollouts_and_updates_are_shown_the_same_references(policy: FluxPolicy) -> None:
    from tests.align.parts import NFT

    rollouts = make(policy, NFT).collect(subject_groups(), 0)
    condition = rollouts.conditioning([0, 5])
    assert [tuple(one.shape) for one in condition.references] == [(2, 4, 8, 8)]
    assert torch.equal(condition.references[0], rollouts.anchor.references[0])
    plain = [replace(group, metadata={}) for group in subject_groups()]
    other = make(policy, NFT).collect(plain, 0)
    assert not agree(rollouts.images_BCHW, other.images_BCHW, PICTURE)
    assert other.anchor.references == ()


def test_references_of_any_sizes_and_numbers(policy: FluxPolicy) -> None:
    from tests.align.parts import NFT

    policy.place(side=16)
    pictures = [picture(1, (20, 64)), picture(2, (100, 30))]
    groups = [
        replace(group, metadata={"shown": pictures[::step]})
        for group, step in zip(subject_groups(), (1, -1), strict=True)
    ]
    rollouts = make(policy, NFT).collect(groups, 0)
    assert [tuple(one.shape) for one in rollouts.anchor.references] == [(2, 4, 4, 4)] * 2
    groups[0] = replace(groups[0], metadata={"shown": pictures[:1]})
    with pytest.raises(InputError, match=r"1 and 2 reference pictures.*--set references\.count=1"):
        make(policy, NFT).collect(groups, 0)


# --- SFT -------------------------------------------------------------------------------------------------------------


def test_sft_learns_its_targets(policy: FluxPolicy) -> None:
    found = make(policy, SFT, lr=3e-3, ema=None)
    losses = []
    for step in range(12):
        rollouts = found.collect(subject_groups(), 0)
        losses.append(found.update(replace(rollouts, step=step), two(8), WEIGHTS)["loss"])
    assert agree(rollouts.images_BCHW[:4], picture(10).expand(4, -1, -1, -1), 4)
    assert losses[-1] < 0.9 * losses[0]


def test_sft_takes_nothing_from_scores(policy: FluxPolicy) -> None:
    start = weights_of(policy)
    ends = []
    for scores in (two(8), two(8, seed=1), {name: scored([math.nan] * 8, name)[name] for name in WEIGHTS}):
        assert policy.lora is not None
        policy.lora.load_state(start)
        found = make(policy, SFT)
        found.update(found.collect(subject_groups(), 0), scores, WEIGHTS)
        ends.append(weights_of(policy))
    assert not same(start, ends[0])
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_sft_needs_targets(policy: FluxPolicy) -> None:
    with pytest.raises(InputError, match=r"'a red dog' has none.*image_tgt_path"):
        make(policy, SFT).collect(subject_groups(target=False), 0)


# --- RPO -------------------------------------------------------------------------------------------------------------


def test_the_harmonic_mean_wants_both() -> None:
    identity = torch.tensor([[2.0, 1.0, -2.0, 0.0, -1.0]])
    prompt = torch.tensor([[-2.0, 1.0, 2.0, 0.0, -1.0]])
    scores = harmonic_scores({"identity": identity, "prompt": prompt}, WEIGHTS, AdvantageSettings())[0]
    assert scores.argmax() == 1
    assert bool((scores > 0).all()) and bool((scores < 1).all())
    assert scores[3] == pytest.approx(0.5, abs=rounding(torch.float32, 64))  # both average
    assert scores[0] == pytest.approx(scores[2].item(), abs=rounding(torch.float32, 64))
    assert scores[0] < scores[3]  # a specialist is worse than an average one
    scaled = harmonic_scores({"identity": identity * 100, "prompt": prompt}, WEIGHTS, AdvantageSettings())[0]
    assert torch.allclose(scores, scaled, atol=1e-3)  # eps beside a standard deviation of about 1


def test_pairs_are_best_and_worst_of_a_group() -> None:
    loss = RPOLoss(RPO)
    good = torch.tensor(
        [[0.0, 3.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [math.nan, 2.0, 5.0, 9.0], [math.nan] * 4]
    )
    judged = loss.advantages(
        {"identity": good, "prompt": good}, WEIGHTS, GroupAdvantage(AdvantageSettings()), 3
    )
    table, rival = judged.advantage_TPS, judged.rival_PS
    assert table.shape == (3, 4, 4) and rival is not None
    winners = [[place for place, value in enumerate(row) if value == 1.0] for row in table[0].tolist()]
    assert winners == [[1], [], [3], []]
    assert rival[0, 1] == 0 and rival[2, 3] == 1
    assert int((~table[0].isnan()).sum()) == 2


def test_rpo_starts_at_log_two_and_learns_to_tell_winners(policy: FluxPolicy) -> None:
    found = make(policy, RPO, lr=3e-3, ema=None)
    found.method.loss.settings = RPOSettings(timesteps=2, beta=50, similarity=0)  # type: ignore[attr-defined]
    groups = subject_groups()
    rollouts = found.collect(groups, 0)
    scores = two(8)
    figures = [found.update(rollouts, scores, WEIGHTS) for _ in range(10)]
    assert figures[0]["loss"] == pytest.approx(math.log(2), abs=rounding(torch.float32, MODEL))
    assert figures[-1]["loss"] < figures[0]["loss"] - 0.02
    assert figures[-1]["pair_accuracy"] > 0.9


def test_rpo_candidates_are_those_of_the_frozen_base_from_the_prompt_alone(policy: FluxPolicy) -> None:
    groups = subject_groups()
    found = make(policy, RPO)
    rollouts = found.collect(groups, 0)
    assert len(rollouts.anchor.references) == 1  # the update is shown them all the same
    from tests.align.parts import NFT

    plain = make(policy, NFT)
    with policy.slot(Slot.REFERENCE):
        alone = plain.collect([replace(group, metadata={}) for group in groups], 0)
    assert agree(rollouts.images_BCHW, alone.images_BCHW, PICTURE)
    shown = make(policy, RPOSettings(timesteps=2, shown=True)).collect(groups, 0)
    assert not agree(shown.images_BCHW, rollouts.images_BCHW, PICTURE)


@pytest.mark.parametrize("micro", [(1, 1), (3, 2)])
def test_rpo_does_not_depend_on_the_micro_batch(policy: FluxPolicy, micro: tuple[int, int]) -> None:
    assert policy.lora is not None
    start, ends = weights_of(policy), []
    for size in ((99, 99), micro):
        policy.lora.load_state(start)
        found = make(policy, RPO, micro=size)
        found.update(found.collect(subject_groups(3), 0), two(12), WEIGHTS)
        ends.append(weights_of(policy))
    assert agree_after_adam(*ends, start, GRADIENT)


def test_the_similarity_loss_pulls_toward_the_reference(policy: FluxPolicy) -> None:
    settings = RPOSettings(timesteps=3, beta=1e-6, similarity=1.0)
    found = make(policy, settings, lr=3e-3, ema=None)
    rollouts = found.collect(subject_groups(), 0)
    figures = [found.update(rollouts, two(8), WEIGHTS)["similarity_loss"] for _ in range(12)]
    assert figures[-1] < 0.95 * figures[0]


def test_what_the_similarity_loss_asks_for() -> None:
    group = subject_groups()[0]
    assert class_prompt(group) == "a photo of a dog"
    assert class_prompt(replace(group, metadata={"class": "owl"})) == "a photo of an owl"
    pair = {
        "subjects": [{"class": "cat"}, {"class": "dog"}]
    }  # a UNO list with classes: no class of the whole
    assert class_prompt(replace(group, metadata=pair)) == "a photo of a cat"
    with pytest.raises(InputError, match=r"'a red dog' has no class word.*loss\.similarity to 0"):
        class_prompt(replace(group, metadata={}))


def test_references_smaller_than_the_pictures(policy: FluxPolicy) -> None:
    policy.place(side=16)
    found = make(policy, RPO)
    with pytest.raises(InputError, match="as large as the pictures"):
        found.update(found.collect(subject_groups(), 0), two(8), WEIGHTS)
