"""Parts of the loop that no recipe of the reference trainer reaches, on its model of a few hundred numbers."""

import torch

from pixrl.algorithms import make_loss
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.customized_grpo import TimeSettings
from pixrl.algorithms.exploration import Group, NoiseOnly
from pixrl.algorithms.loss import noise_levels
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import RolloutSettings, _differing_rows
from pixrl.algorithms.trainer import Aligner, Method, MicroBatches, OptimizerSettings
from pixrl.models.base import Conditioning
from tests.reference.world import PROMPTS, TinyPolicy


def test_with_chosen_levels_the_time_weights_are_those_of_the_levels_trained_at() -> None:
    policy = TinyPolicy()
    time = TimeSettings(identity=("identity",))
    loss = make_loss(NFTSettings(timesteps=2, levels=(3, 7)))
    method = Method(
        NoiseOnly(),
        RolloutSettings(steps=8),
        GroupAdvantage(AdvantageSettings(time=time)),
        loss,
        OptimizerSettings(),
        noises=3,
    )
    aligner = Aligner(policy, policy.lora, method, MicroBatches(4, 4), seed=1)
    groups = [Group(place, 0, place, PROMPTS[place]) for place in range(2)]
    rollouts = aligner.collect(groups, 0)
    rows = range(len(rollouts))
    for part in range(2):
        trained = noise_levels(rollouts, rows, part, (3, 7))
        assert loss.steps(rollouts, rows, part) == trained
        assert set(trained) <= {3, 4, 5, 6} and len(set(trained)) > 1


def test_conditions_differ_in_tokens_or_in_pooled_features() -> None:
    """FLUX's variants differ in the pooled features alone: theirs too must be scored again under the prompt."""
    tokens, pooled = torch.zeros(4, 2, 3), torch.zeros(4, 5)
    other_tokens, other_pooled = tokens.clone(), pooled.clone()
    other_tokens[1, 1, 2] = other_tokens[3, 0, 0] = other_pooled[2, 4] = other_pooled[3, 0] = 1
    one, other = Conditioning(tokens, pooled), Conditioning(other_tokens, other_pooled)
    assert _differing_rows(one, other) == [1, 2, 3]
    assert _differing_rows(Conditioning(tokens), Conditioning(other_tokens)) == [1, 3]
    assert _differing_rows(one, one) == []
