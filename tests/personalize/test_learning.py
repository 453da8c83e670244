"""Customized-GRPO raises two rewards together on a tiny random model that is shown references."""

from typing import Any

import pytest
import torch

from pixrl.algorithms.advantages import AdvantageSettings, SynergySettings, TimeSettings
from pixrl.algorithms.exploration import NoiseOnly
from pixrl.algorithms.loss_table import LossSettings
from pixrl.algorithms.losses import ClippedSettings, NFTSettings
from pixrl.algorithms.stepping import SamplingSettings
from pixrl.models.flux import FluxPolicy
from tests.align.parts import aligner, perturbed, scored
from tests.personalize.test_baselines import WEIGHTS, subject_groups

SHAPED = AdvantageSettings(synergy=SynergySettings(), time=TimeSettings(identity=("identity",)))
NFT = NFTSettings(timesteps=3, certain=1.5, old_policy="constant", old_decay=0.3)
METHODS: dict[str, tuple[LossSettings, dict[str, Any], bool]] = {
    "customized-grpo": (ClippedSettings(clip=1e-2), {"noise": "flow_sde"}, False),
    "customized-nft": (NFT, {"solver": "dpm"}, False),
    "e2po-sars": (NFT, {"solver": "dpm"}, True),
}


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_both_rewards_rise(policy: FluxPolicy, name: str) -> None:
    loss, sampling, exploring = METHODS[name]
    found = aligner(
        policy,
        loss,
        SamplingSettings(steps=5, **sampling),
        exploration=perturbed(2) if exploring else NoiseOnly(),
        advantage=SHAPED,
        micro=(32, 32),
        noises=4 if exploring else 8,
        lr=1e-2,
    )
    means: dict[str, list[float]] = {name: [] for name in WEIGHTS}
    spread = dict.fromkeys(WEIGHTS, 0.0)
    for step in range(25):
        groups = [group for group in subject_groups()]
        rollouts = found.collect(
            [type(g)(g.place, step, g.index, g.prompt, g.metadata) for g in groups], step
        )
        rewards = {
            "identity": rollouts.x0_B[:, 0].mean(dim=(1, 2)),
            "prompt": rollouts.x0_B[:, 1].mean(dim=(1, 2)),
        }
        for reward, values_B in rewards.items():
            means[reward].append(values_B.mean().item())
            spread[reward] = spread[reward] or values_B.view(2, -1).std(dim=1).mean().item()
        found.update(rollouts, {key: scored(x, key)[key] for key, x in rewards.items()}, WEIGHTS)
    for reward, row in means.items():
        gain = torch.tensor(row[-5:]).mean() - torch.tensor(row[:3]).mean()
        assert gain > 0.5 * spread[reward], f"{reward}: {row[:3]} to {row[-5:]}, spread {spread[reward]}"
