"""The methods, one file each. Names are resolved through these tables; nothing is registered by importing."""

from importlib import import_module

FUSION_SAMPLERS = {
    "rmler": "pixrl.algorithms.fusion.rmler:RMLer",
    "ppo": "pixrl.algorithms.fusion.baselines:FusionPPO",
    "grpo": "pixrl.algorithms.fusion.baselines:FusionGRPO",
    "random": "pixrl.algorithms.fusion.baselines:RandomMix",
    "mean": "pixrl.algorithms.fusion.baselines:MeanMix",
    "bass": "pixrl.algorithms.fusion.baselines:BASS",
    "agswap": "pixrl.algorithms.fusion.baselines:AGSwap",
    "golden": "pixrl.algorithms.fusion.baselines:GoldenSection",
    "search": "pixrl.algorithms.fusion.baselines:RewardSearch",
}
"""Every way to propose mixing coefficients, for `pixrl fuse --sampler`."""


def load(reference: str) -> type:
    """The class that a table's entry `module:Class` names."""
    module, _, name = reference.partition(":")
    found = vars(import_module(module))[name]
    assert isinstance(found, type)
    return found
