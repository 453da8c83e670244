"""The methods, one file each. Names are resolved through these tables; nothing is registered by importing."""

from importlib import import_module

FUSION_SAMPLERS = {
    "rmler": "pixrl.algorithms.fusion.rmler:RMLer",
    "ppo": "pixrl.algorithms.fusion.policy_baselines:PPO",
    "grpo": "pixrl.algorithms.fusion.policy_baselines:GRPO",
    "random": "pixrl.algorithms.fusion.samplers:RandomMix",
    "mean": "pixrl.algorithms.fusion.samplers:MeanMix",
    "bass": "pixrl.algorithms.fusion.swap_samplers:BASS",
    "agswap": "pixrl.algorithms.fusion.swap_samplers:AGSwap",
    "golden": "pixrl.algorithms.fusion.samplers:GoldenSection",
    "search": "pixrl.algorithms.fusion.samplers:RewardSearch",
}
"""Every way to propose mixing coefficients, for `pixrl fuse --sampler`."""


def load(reference: str) -> type:
    """The class that a table's entry `module:Class` names."""
    module, _, name = reference.partition(":")
    found = vars(import_module(module))[name]
    assert isinstance(found, type)
    return found
