"""An SDXL is trained by every method, goes on as it was, and diffusers draws with what it exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from typer.testing import CliRunner

import pixrl
from pixrl import cli, models
from pixrl.jobs import align as align_job
from pixrl.models.sdxl import SDXLPolicy
from pixrl.report.export import Format, export
from pixrl.runs import checkpoint
from pixrl.runs.config import load_recipe
from tests import tiny
from tests.align.parts import E2PO, GRPO, final, recipe, same
from tests.align.test_processes import write_recipe
from tests.tolerance import PICTURE, agree

OWL = "a red owl"
DDIM: dict[str, Any] = GRPO | {"sampling": {"steps": 4, "noise": "cps"}}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sdxl_base(tmp_path_factory.mktemp("sdxl") / "base", prediction=request.param)


@pytest.fixture(scope="module")
def run(folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = recipe(folder, prompt_file, steps=2, optimizer={"lr": 0.05, "ema": 0.5}, guidance=2.0)
    return pixrl.align(made, out=tmp_path_factory.mktemp("runs") / "bright").run


@pytest.mark.parametrize("method", [DDIM, E2PO], ids=["ddim", "e2po"])
def test_it_goes_on_as_it_was(
    folder: Path, prompt_file: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    settings = recipe(folder, prompt_file, **method)
    whole = pixrl.align(settings | {"steps": 2}, out=tmp_path / "whole")
    pixrl.align(settings | {"steps": 1}, out=tmp_path / "cut")
    align_job.go_on(tmp_path / "cut", overrides=["steps=2"])
    assert same(final(whole.run), final(tmp_path / "cut"))
    assert any(x.any() for name, x in final(whole.run).items() if "lora_B" in name)


@pytest.mark.parametrize("layout", [Format.DIFFUSERS, Format.COMFYUI])
def test_diffusers_draws_what_was_trained(layout: Format, folder: Path, run: Path, tmp_path: Path) -> None:
    policy = models.load(folder, device="cpu", dtype="float32", guidance=2.0)
    assert isinstance(policy, SDXLPolicy)
    slots = policy.attach_lora(rank=4, alpha=8)
    base = policy.sample(policy.encode([OWL]), [1])
    tensors, _ = checkpoint.load(checkpoint.latest(run) or run)
    slots.load_state({k.removeprefix("slots/"): x for k, x in tensors.items() if k.startswith("slots/")})
    with policy.slot("ema"):
        ours = policy.sample(policy.encode([OWL]), [1])
    file = export(run, layout=layout, out=tmp_path / "out").file
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    generator = torch.Generator().manual_seed(1)
    theirs = pipeline(
        OWL,
        latents=torch.randn(1, *policy.latent_shape, generator=generator),
        num_inference_steps=policy.settings.steps,
        guidance_scale=2.0,
        height=32,
        width=32,
        output_type="pt",
    ).images
    assert agree(ours, theirs, PICTURE)
    assert not agree(base, ours, PICTURE)


def test_the_doctor_knows_it(run: Path) -> None:
    seen = CliRunner().invoke(cli.app, ["doctor", str(run / "recipe.yaml")])
    assert seen.exit_code == 0 and "It can run." in seen.output, seen.output
    assert "distilled" not in seen.output


def test_a_distilled_checkpoint_is_told(prompt_file: Path, tmp_path: Path) -> None:
    turbo = tiny.sdxl(tmp_path / "turbo")
    (turbo / "pixrl.json").unlink()
    file = write_recipe(tmp_path, recipe(turbo, prompt_file, resolution=32))
    seen = CliRunner().invoke(cli.app, ["doctor", str(file)])
    said = " ".join(seen.output.split())
    assert (
        "was distilled to 4 steps. Reinforcement learning moves it off what the distillation taught" in said
    )


def test_the_recipe_of_paper_scale_is_the_papers_but_for_the_model() -> None:
    ours, papers = (load_recipe(name).model_dump() for name in ("sdxl/e2po", "paper/e2po"))
    same = {"advantage", "loss", "optimizer", "lora", "seed"}
    assert {name: ours[name] for name in same} == {name: papers[name] for name in same}
    assert (ours["exploration"]["noises"], ours["exploration"]["variants"], ours["steps"]) == (8, 3, 750)
