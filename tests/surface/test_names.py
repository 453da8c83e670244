"""Public names are pinned: adding one is a decision, taking one away breaks somebody."""

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pixrl
from pixrl import equations

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "pixrl"
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL", "scipy", "tensorboard"}

PIXRL = [
    "AlignResult",
    "FusionResult",
    "PixrlError",
    "__version__",
    "align",
    "draw",
    "equations",
    "fuse",
    "models",
    "personalize",
    "rewards",
]
EQUATIONS = [
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


@pytest.mark.parametrize(("module", "names"), [(pixrl, PIXRL), (equations, EQUATIONS)])
def test_names_are_pinned_and_there(module: object, names: list[str]) -> None:
    assert inspect.ismodule(module)
    assert sorted(module.__all__) == sorted(names)
    assert set(names) <= set(dir(module))
    for name in names:
        assert inspect.getattr_static(module, name, None) is not None or module.__getattr__(name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="fuze"):
        pixrl.fuze  # noqa: B018


def test_the_call_of_the_readme() -> None:
    parameters = inspect.signature(pixrl.fuse).parameters
    assert list(parameters)[:6] == ["concepts", "budget", "seed", "sampler", "model", "out"]
    defaults = {name: p.default for name, p in parameters.items()}
    assert (defaults["budget"], defaults["seed"], defaults["sampler"], defaults["model"]) == (
        128,
        0,
        "rmler",
        "toy:turbo",
    )


def test_one_version() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == pixrl.__version__


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after some code."""
    source = f"import sys\n{code}\nprint('loaded:', *({HEAVY!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment, check=True
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


HELP = "sys.argv = ['pixrl', {}]\nfrom pixrl.cli import main\ntry: main()\nexcept SystemExit as e: assert e.code == 0"


@pytest.mark.parametrize(
    "code",
    [
        "import pixrl, pixrl.config, pixrl.errors, pixrl.cli; pixrl.PixrlError",
        HELP.format("'--help'"),
        HELP.format("'fuse', '--help'"),
        HELP.format("'align', '--help'"),
        HELP.format("'toy', 'build', '--help'"),
        HELP.format("'--version'"),
    ],
)
def test_help_loads_no_torch(code: str) -> None:
    assert loaded_after(code) == set()


def test_settings_load_no_torch() -> None:
    assert "torch" not in loaded_after("import pixrl.config, pixrl.hub, pixrl.data.pairs, pixrl.algorithms")


def test_a_class_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
