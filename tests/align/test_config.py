"""Recipes: the shipped ones load, bad ones are refused with what to type."""

from pathlib import Path
from typing import Any

import pytest

from pixrl import config
from pixrl.errors import ConfigError, InputError
from pixrl.runs.config import AlignConfig
from pixrl.runs.record import differences

METHODS = ["flow-grpo", "flow-grpo-fast", "dance-grpo", "mix-grpo", "diffusion-nft", "e2po", "e2po-grpo"]
REWARD = {"rewards": [{"name": "python", "options": {"function": "m:f"}}]}


@pytest.mark.parametrize("scale", ["toy", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_shipped_recipes_load_and_survive_being_written_down(scale: str, method: str, tmp_path: Path) -> None:
    found = config.load(AlignConfig, f"{scale}/{method}", kind="align")
    file = tmp_path / "recipe.yaml"
    file.write_text(config.dump(found))
    assert config.load(AlignConfig, file, kind="align") == found
    assert differences(found.model_dump(mode="json"), found.model_dump(mode="json")) == []


def test_toy_methods_draw_equally_many_pictures() -> None:
    sizes = set()
    for method in METHODS:
        found = config.load(AlignConfig, f"toy/{method}")
        variants = found.exploration.variants if found.exploration.kind == "perturbed" else 1
        sizes.add((found.steps, found.prompts.per_step, found.exploration.noises * variants))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": []}, "No reward is given"),
        ({"loss": {"kind": "clipped"}}, "loss: clipped needs rollouts with a density: set sampling.noise"),
        (
            {"loss": {"kind": "clipped", "clip": 1.5}, "sampling": {"noise": "cps"}},
            r"loss.*clip.*less than 1",
        ),
        (
            {"loss": {"kind": "clipped", "clip": 0}, "sampling": {"noise": "cps"}},
            r"loss.*clip.*greater than 0",
        ),
        (
            {"loss": {"kind": "clipped", "clip": 1e-4}, "sampling": {"noise": "cps"}},
            r"loss\.clip has no effect with optimizer\.updates: 1, where every ratio is 1: remove it",
        ),
        (
            {"loss": {"kind": "clipped"}, "sampling": {"noise": "cps"}, "optimizer": {"updates": 3}},
            r"optimizer\.updates: 3 needs the range of ratios that it trusts: set loss\.clip",
        ),
        ({"sampling": {"noise": "flow_sde", "eta": -0.1}}, r"sampling\.eta.*greater than 0"),
        ({"sampling": {"noise": "cps", "eta": 1.2}}, r"eta of cps must be in \(0, 1\]"),
        ({"sampling": {"eta": 0.7}}, "eta has no effect without noise"),
        ({"loss": {"kind": "nft", "timesteps": 30}}, "10 sampling steps have only as many noise levels"),
        (
            {"loss": {"kind": "rpo"}, "advantage": {"skip_flat": True}},
            "skip_flat has no effect with loss: rpo",
        ),
        ({"loss": {"kind": "nft", "timesteps": 3, "levels": [0, 11]}}, "ends at 11, but 10 sampling steps"),
        ({"loss": {"kind": "nft", "timesteps": 4, "levels": [1, 4]}}, "has not the 4 noise levels"),
        ({"loss": {"kind": "nft", "clip": 1e-4}}, r"Unknown setting loss\.nft\.clip.*Allowed here: beta"),
        ({"exploration": {"kind": "noise", "variants": 4}}, r"Unknown setting exploration\.noise\.variants"),
        ({"exploration": {"kind": "nose"}}, "nose"),
        ({"exploration": {"kind": "noise", "noises": 1}}, "groups of one sample"),
        (
            {"loss": {"kind": "clipped", "kl_form": "exact"}, "sampling": {"noise": "cps"}},
            "kl_form has no effect",
        ),
        ({"advantage": {"scale": "none", "eps": 0.1}}, "eps has no effect with scale: none"),
        (
            {"exploration": {"kind": "noise", "shared_start": True}},
            "all samples of a group would be the same picture",
        ),
        (
            {"steps": 5, "optimizer": {"decay_steps": 4}},
            "steps 4 to 5 would learn nothing. Give 5 or more, or all",
        ),
        (
            {"loss": {"kind": "sft"}, "exploration": {"kind": "perturbed", "noises": 2, "variants": 2}},
            "perturbed has no effect with loss: sft",
        ),
        (
            {"loss": {"kind": "dpo"}, "exploration": {"kind": "noise", "noises": 3}},
            "noises is 3, but loss: dpo .* give an even number",
        ),
        (
            {"loss": {"kind": "dpo"}, "exploration": {"kind": "perturbed", "noises": 2, "variants": 2}},
            "perturbed has no effect with loss: dpo",
        ),
        ({"loss": {"kind": "dpo"}, "advantage": {"clamp": 3.0}}, "advantage has no effect with loss: dpo"),
        ({"loss": {"kind": "dpo"}, "sampling": {"noise": "cps"}}, "loss: dpo, which draws nothing"),
        ({"loss": {"kind": "dpo", "timesteps": 30}}, "10 sampling steps have only as many noise levels"),
        ({"optimizer": {"decay_steps": "some"}}, r"optimizer\.decay_steps"),
        ({"optimiser": {"lr": 1}}, "Unknown setting optimiser. Did you mean 'optimizer'"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_recipes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(AlignConfig, {**REWARD, **settings})


def test_a_recipe_of_another_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="recipe for 'fuse', not for 'align'"):
        config.load(AlignConfig, "toy/fuse", kind="align")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompts"), (b"an owl\n\xff\xfe\n", "UTF-8"), (b"an owl\n\n", "line 2")],
)
def test_bad_prompt_files(tmp_path: Path, content: bytes, message: str) -> None:
    from pixrl.data.prompts import load_prompts

    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_prompts(file)
