"""The package's fixed surface: names, signatures, documentation, and what it may import."""

import ast
import inspect
from pathlib import Path

import pytest

import pixrl.equations as equations

FOLDER = Path(equations.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "equations.md"
MODULES = ["flow", "sde", "surrogate", "advantage", "shaping", "nft", "preference", "perturbation", "fusion"]

SIGNATURES = {
    "interpolate": "x0, noise, t",
    "predict_x0": "x_t, velocity, t",
    "predict_noise": "x_t, velocity, t",
    "flow_sde_step": "x, velocity, sigma, sigma_next, eta=0.7, *, sigma_max, noise=None, next_x=None",
    "dance_step": "x, velocity, sigma, sigma_next, eta=0.3, *, sigma_max=None, noise=None, next_x=None",
    "cps_step": "x, velocity, sigma, sigma_next, eta=0.8, *, sigma_max=None, noise=None, next_x=None",
    "clipped_surrogate": "log_prob, old_log_prob, advantage, clip",
    "gaussian_kl": "mean, ref_mean, std, *, form='exact', dt=None",
    "group_advantages": "rewards_PG, scale='group', eps=0.0001, clip=None",
    "leave_one_out": "rewards_PG",
    "synergy": "a_id, a_prompt, kind",
    "shape_advantage": "a_id, a_prompt, w_id, w_prompt, alpha=0.5, kind='tanh', *, recenter=False, valid=None",
    "prompt_weight": "step, num_steps=25, w_max=0.7, w_min=0.3, start=6, end=22, steepness=0.8, center=14.0, "
    "inverted=False",
    "optimality": "advantage, clip=5.0",
    "implicit_velocities": "v, v_old, beta",
    "nft_loss": "x_t, t, x0, v, v_old, r, beta",
    "old_policy_decay": "step, kind",
    "dpo_loss": "won, lost, won_ref, lost_ref, beta",
    "content_mask": "input_ids, special_ids",
    "perturb": "embeddings_LD, delta, mask",
    "diversity_loss": "h_KD",
    "anchor_loss": "h_KD, h0_D, target=0.8, margin=0.01",
    "perturbation_objective": "h_KD, h0_D, weight=50.0, *, weighted='diversity', target=0.8, margin=0.01",
    "project_delta": "delta, max_norm=0.05, embeddings_LD=None",
    "variant_weight": "t, perturbation_range=0.4",
    "fuse": "embeddings_NLD, coefficients_ND",
    "fusion_reward": "similarities_BN, alpha=5.0",
    "is_candidate": "similarities_BN, presence=0.63, balance=0.05",
    "select": "similarities_BN, k=1, presence=0.63, balance=0.05",
    "shortfall": "similarities_BN, presence=0.63, balance=0.05",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_fixed(name: str) -> None:
    signature = inspect.signature(getattr(equations, name))
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    wanted = SIGNATURES[name]
    assert str(inspect.Signature(bare)) == f"({wanted})"


def test_everything_public_is_exported_once() -> None:
    assert equations.__all__ == sorted(equations.__all__)
    assert set(equations.__all__) == {*SIGNATURES, "Preference", "SDEStep", "Shortfall"}
    homes = {equations.__dict__[name].__module__ for name in equations.__all__}
    assert homes == {f"pixrl.equations.{module}" for module in MODULES}


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_equation_is_documented_with_its_source(name: str) -> None:
    text = inspect.getdoc(getattr(equations, name)) or ""
    assert "Source: " in text
    assert "Raises:" in text or "errors as in" in text
    assert f"`{name}(" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_torch_alone_is_imported(path: Path) -> None:
    allowed = {"torch", "math", "typing", "collections", "pixrl"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert module.split(".")[0] in allowed
            if module.startswith("pixrl"):
                assert module == "pixrl.errors" or module.startswith("pixrl.equations")
