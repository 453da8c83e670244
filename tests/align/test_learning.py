"""Every method raises a simple reward on a tiny random model: signs, scales and slots are right together."""

from typing import Any

import pytest
import torch

from pixrl.algorithms.exploration import NoiseOnly
from pixrl.algorithms.grpo import GRPOSettings
from pixrl.algorithms.loss import LossSettings
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.models.sd3 import SD3Policy
from tests.align.parts import aligner, groups, perturbed, scored

NFT = NFTSettings(timesteps=3, certain=1.5, old_policy="constant", old_decay=0.3)
METHODS: dict[str, tuple[LossSettings, dict[str, Any], bool]] = {
    "flow-grpo": (GRPOSettings(clip=1e-2, kl=0.01), {"noise": "flow_sde"}, False),
    "flow-grpo-fast": (
        GRPOSettings(clip=1e-2),
        {"noise": "cps", "where": "random_window", "window": 2},
        False,
    ),
    "dance-grpo": (
        GRPOSettings(clip=1e-2),
        {"noise": "dance", "where": "fraction", "fraction": 0.6},
        False,
    ),
    "mix-grpo": (
        GRPOSettings(clip=1e-2),
        {"noise": "flow_sde", "where": "sliding_window", "window": 2, "every": 5},
        False,
    ),
    "diffusion-nft": (NFT, {"solver": "dpm"}, False),
    "e2po": (NFT, {"solver": "dpm"}, True),
    "e2po-grpo": (GRPOSettings(clip=1e-2), {"noise": "flow_sde"}, True),
}


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_the_reward_rises(policy: SD3Policy, name: str) -> None:
    loss, sampling, exploring = METHODS[name]
    found = aligner(
        policy,
        loss,
        RolloutSettings(steps=5, **sampling),
        exploration=perturbed(2) if exploring else NoiseOnly(),
        micro=(32, 32),
        noises=4 if exploring else 8,
        lr=1e-2,
        updates=1,
    )
    means, spreads = [], []
    for step in range(25):
        rollouts = found.collect(groups(2, epoch=step), step)
        reward_B = rollouts.x0_B[:, 0].mean(dim=(1, 2))  # the first latent channel
        means.append(reward_B.mean().item())
        spreads.append(reward_B.view(2, -1).std(dim=1).mean().item())
        found.update(rollouts, scored(reward_B), {"r": 1.0})
    gain = torch.tensor(means[-5:]).mean() - torch.tensor(means[:3]).mean()
    assert gain > spreads[0], f"{means[:3]} to {means[-5:]}, spread {spreads[0]}"
