"""SARS and TDW with each loss raise two rewards on a tiny random model that is shown references."""

from dataclasses import replace
from typing import Any

import pytest

from pixrl.algorithms.advantages import AdvantageSettings
from pixrl.algorithms.customized_grpo import SynergySettings, TimeSettings
from pixrl.algorithms.exploration import NoiseOnly
from pixrl.algorithms.grpo import GRPOSettings
from pixrl.algorithms.loss import LossSettings
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.models.flux import FluxPolicy
from tests.align.parts import aligner, perturbed, scored
from tests.personalize.test_baselines import WEIGHTS, subject_groups

SHAPED = AdvantageSettings(synergy=SynergySettings(), time=TimeSettings(identity=("identity",)))
NFT = NFTSettings(timesteps=3, certain=1.5, old_policy="constant", old_decay=0.3)
METHODS: dict[str, tuple[LossSettings, dict[str, Any], bool]] = {
    "customized-grpo": (GRPOSettings(clip=1e-2), {"noise": "flow_sde"}, False),
    "customized-nft": (NFT, {"solver": "dpm"}, False),
    "e2po-sars": (NFT, {"solver": "dpm"}, True),
}


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_the_rewards_rise_in_sum(policy: FluxPolicy, name: str) -> None:
    loss, sampling, exploring = METHODS[name]
    found = aligner(
        policy,
        loss,
        RolloutSettings(steps=5, **sampling),
        exploration=perturbed(2) if exploring else NoiseOnly(),
        advantage=SHAPED,
        micro=(32, 32),
        noises=6 if exploring else 12,
        lr=3e-3,
    )
    means: dict[str, list[float]] = {reward: [] for reward in WEIGHTS}
    spread: dict[str, float] = {}
    for step in range(25):
        rollouts = found.collect([replace(group, epoch=step) for group in subject_groups()], step)
        channels_BC = rollouts.x0_B.mean(dim=(2, 3))
        rewards = {reward: channels_BC[:, number] for number, reward in enumerate(WEIGHTS)}
        for reward, values_B in rewards.items():
            means[reward].append(values_B.mean().item())
            spread.setdefault(reward, values_B.view(2, -1).std(dim=1).mean().item())
        found.update(rollouts, {key: scored(x, key)[key] for key, x in rewards.items()}, WEIGHTS)
    gains = {reward: (sum(row[-5:]) / 5 - sum(row[:3]) / 3) / spread[reward] for reward, row in means.items()}
    assert sum(gains.values()) > 1, (
        gains
    )  # in units of a group's spread; one may pay for the other in a random model
