"""The methods, one file each. Names are resolved through these tables; nothing is registered by importing."""

from importlib import import_module

FUSION_SAMPLERS = {
    "rmler": "pixrl.algorithms.rmler:RMLer",
    "ppo": "pixrl.algorithms.policy_baselines:PPO",
    "grpo": "pixrl.algorithms.policy_baselines:GRPO",
    "random": "pixrl.algorithms.fusion_samplers:RandomMix",
    "mean": "pixrl.algorithms.fusion_samplers:MeanMix",
    "bass": "pixrl.algorithms.swap_samplers:BASS",
    "agswap": "pixrl.algorithms.swap_samplers:AGSwap",
    "golden": "pixrl.algorithms.fusion_samplers:GoldenSection",
    "search": "pixrl.algorithms.fusion_samplers:RewardSearch",
}
"""Every way to propose mixing coefficients, for `pixrl fuse --sampler`."""


def load(reference: str) -> type:
    """The class that a table's entry `module:Class` names."""
    module, _, name = reference.partition(":")
    found = vars(import_module(module))[name]
    assert isinstance(found, type)
    return found
