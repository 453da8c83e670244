"""The methods, one file each. Names are resolved through these tables; nothing is registered by importing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixrl.plugins import Registry

if TYPE_CHECKING:
    from pixrl.algorithms.advantages import AdvantageEstimator, EstimatorSettings
    from pixrl.algorithms.exploration import Exploration, ExplorationSettings
    from pixrl.algorithms.fusion.mixing import Mixing, MixingSettings, Pooled
    from pixrl.algorithms.loss import Loss, LossSettings
    from pixrl.models.base import Conditioning
    from pixrl.rewards.base import DifferentiableReward

LOSSES = Registry(
    "loss",
    "pixrl.losses",
    {
        "clipped": "pixrl.algorithms.grpo:GRPOLoss",
        "nft": "pixrl.algorithms.nft:NFTLoss",
        "sft": "pixrl.algorithms.sft:SFTLoss",
        "dpo": "pixrl.algorithms.dpo:DPOLoss",
        "rpo": "pixrl.algorithms.rpo:RPOLoss",
        "draft": "pixrl.algorithms.draft:DRaFTLoss",
    },
)
"""The losses that an update can minimize, for `loss.kind`; each has its `Settings`."""

EXPLORATIONS = Registry(
    "exploration",
    "pixrl.explorations",
    {
        "noise": "pixrl.algorithms.exploration:NoiseOnly",
        "perturbed": "pixrl.algorithms.e2po:PerturbedEmbeddings",
    },
)
"""The ways in which a group's samples can differ, for `exploration.kind`; each has its `Settings`."""

ADVANTAGES = Registry(
    "advantage", "pixrl.advantages", {"group": "pixrl.algorithms.advantages:GroupAdvantage"}
)
"""The advantage estimators, for `advantage.kind`; each has its `Settings`."""

SAMPLERS = Registry(
    "sampler",
    "pixrl.samplers",
    {
        "rmler": "pixrl.algorithms.fusion.rmler:RMLer",
        "ppo": "pixrl.algorithms.fusion.baselines:FusionPPO",
        "grpo": "pixrl.algorithms.fusion.baselines:FusionGRPO",
        "random": "pixrl.algorithms.fusion.baselines:RandomMix",
        "mean": "pixrl.algorithms.fusion.baselines:MeanMix",
        "bass": "pixrl.algorithms.fusion.baselines:BASS",
        "agswap": "pixrl.algorithms.fusion.baselines:AGSwap",
        "golden": "pixrl.algorithms.fusion.baselines:GoldenSection",
        "search": "pixrl.algorithms.fusion.baselines:RewardSearch",
        "bisect": "pixrl.algorithms.fusion.search:Bisection",
        "cmaes": "pixrl.algorithms.fusion.search:EvolutionStrategy",
    },
)
"""Every way to propose mixing coefficients, for `pixrl fuse --sampler`."""

MIXINGS = Registry(
    "mixing",
    "pixrl.mixings",
    {
        "columns": "pixrl.algorithms.fusion.mixing:Columns",
        "tokens": "pixrl.algorithms.fusion.mixing:Tokens",
        "steps": "pixrl.algorithms.fusion.mixing:Steps",
        "velocity": "pixrl.algorithms.fusion.mixing:Velocity",
        "spatial": "pixrl.algorithms.fusion.mixing:Spatial",
        "regions": "pixrl.algorithms.fusion.mixing:Regions",
    },
)
"""What of the concepts can be mixed, for `mixing.kind`; each has its `Settings`."""


def make_loss(settings: LossSettings, rewards: Mapping[str, DifferentiableReward] | None = None) -> Loss:
    """Return the loss that the settings describe; `rewards` are those that it may differentiate."""
    made: Loss = LOSSES.find(settings.kind).make(settings, rewards or {})
    return made


def make_exploration(settings: ExplorationSettings) -> Exploration:
    """Return the exploration that the settings describe."""
    made: Exploration = EXPLORATIONS.find(settings.kind).make(settings)
    return made


def make_advantage(settings: EstimatorSettings) -> AdvantageEstimator:
    """Return the advantage estimator that the settings describe."""
    made: AdvantageEstimator = ADVANTAGES.find(settings.kind)(settings)
    return made


def make_mixing(settings: MixingSettings, sources: Conditioning, steps: int, pooled: Pooled) -> Mixing[Any]:
    """Return the mixing that the settings describe, for the concepts of `sources`."""
    made: Mixing[Any] = MIXINGS.find(settings.kind)(settings, sources, steps=steps, pooled=pooled)
    return made
