"""The papers' equations as pure tensor functions, one paper equation each. Imports torch alone.

Everything is importable from here or from its module. `docs/equations.md` lists each with formula and source.

Axes, as suffixes of tensors that cross functions: B batch, P prompts, G samples of one prompt, K semantic
variants, N concepts, L tokens, D embedding columns, T sampling steps. All compute in at least float32 and
return what they computed in; float64 stays float64. Shapes are checked, never broadcast in silence: a
`ShapeError` says what came.
"""

from pixrl.equations.advantage import group_advantages, leave_one_out
from pixrl.equations.flow import interpolate, predict_noise, predict_x0
from pixrl.equations.fusion import Shortfall, fuse, fusion_reward, is_candidate, select, shortfall
from pixrl.equations.nft import implicit_velocities, nft_loss, old_policy_decay, optimality
from pixrl.equations.perturbation import (
    anchor_loss,
    content_mask,
    diversity_loss,
    perturb,
    perturbation_objective,
    project_delta,
    variant_weight,
)
from pixrl.equations.preference import Preference, dpo_loss
from pixrl.equations.sde import SDEStep, cps_step, dance_step, flow_sde_step
from pixrl.equations.shaping import prompt_weight, shape_advantage, synergy
from pixrl.equations.surrogate import clipped_surrogate, gaussian_kl

__all__ = [
    "Preference",
    "SDEStep",
    "Shortfall",
    "anchor_loss",
    "clipped_surrogate",
    "content_mask",
    "cps_step",
    "dance_step",
    "diversity_loss",
    "dpo_loss",
    "flow_sde_step",
    "fuse",
    "fusion_reward",
    "gaussian_kl",
    "group_advantages",
    "implicit_velocities",
    "interpolate",
    "is_candidate",
    "leave_one_out",
    "nft_loss",
    "old_policy_decay",
    "optimality",
    "perturb",
    "perturbation_objective",
    "predict_noise",
    "predict_x0",
    "project_delta",
    "prompt_weight",
    "select",
    "shape_advantage",
    "shortfall",
    "synergy",
    "variant_weight",
]
