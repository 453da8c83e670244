"""A Z-Image is trained by every method, goes on as it was, and diffusers draws with what it exports."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import ZImagePipeline

import pixrl
from pixrl import api, models
from pixrl.doctor.diagnosis import Diagnosis
from pixrl.doctor.examine import examine_training
from pixrl.errors import CheckpointError
from pixrl.jobs import align as align_job
from pixrl.models.z_image import ZImagePolicy
from pixrl.report.export import Format, export
from pixrl.runs import checkpoint
from pixrl.runs.config import AlignConfig, load_recipe
from tests import tiny
from tests.align.parts import E2PO, GRPO, final, recipe, same
from tests.tolerance import PICTURE, agree

OWL = "a red owl"
LANGUAGE: dict[str, Any] = {"exploration": E2PO["exploration"] | {"encoders": "language", "norm": "relative"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.z_image(tmp_path_factory.mktemp("z") / "base", shift=6.0)


@pytest.fixture(scope="module")
def run(folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = recipe(folder, prompt_file, steps=2, optimizer={"lr": 0.05, "ema": 0.5}, guidance=1.5)
    return pixrl.align(made, out=tmp_path_factory.mktemp("runs") / "bright").run


@pytest.mark.parametrize("method", [{}, GRPO, LANGUAGE], ids=["nft", "grpo", "e2po"])
def test_it_goes_on_as_it_was(
    folder: Path, prompt_file: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    settings = recipe(folder, prompt_file, **method, evaluation={"prompts": 1, "per_prompt": 1})
    whole = pixrl.align(settings | {"steps": 2}, out=tmp_path / "whole")
    pixrl.align(settings | {"steps": 1}, out=tmp_path / "cut")
    align_job.go_on(tmp_path / "cut", overrides=["steps=2"])
    assert same(final(whole.run), final(tmp_path / "cut"))
    assert any(x.any() for name, x in final(whole.run).items() if "lora_B" in name)


def test_diffusers_draws_what_was_trained(folder: Path, run: Path, tmp_path: Path) -> None:
    policy = models.load(folder, device="cpu", dtype="float32", guidance=1.5)
    assert isinstance(policy, ZImagePolicy)
    slots = policy.attach_lora(rank=4, alpha=8)
    base = policy.sample(policy.encode([OWL]), [1])
    tensors, _ = checkpoint.load(checkpoint.latest(run) or run)
    slots.load_state({k.removeprefix("slots/"): x for k, x in tensors.items() if k.startswith("slots/")})
    with policy.slot("ema"):
        ours = policy.sample(policy.encode([OWL]), [1])
    file = export(run, layout=Format.DIFFUSERS, out=tmp_path / "out").file
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    theirs = pipeline(
        OWL,
        latents=policy.initial_noise([1]),
        num_inference_steps=policy.settings.steps,
        guidance_scale=1.5,
        max_sequence_length=policy.text_length,
        height=32,
        width=32,
        output_type="pt",
    ).images
    assert agree(ours, theirs, PICTURE)
    assert not agree(base, ours, PICTURE)
    again = models.load(folder, device="cpu", dtype="float32", guidance=1.5, lora=file)
    assert agree(again.sample(again.encode([OWL]), [1]), ours, PICTURE)


def test_comfyui_reads_the_layout_of_diffusers(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"Export diffusers' layout .ComfyUI reads that too, for .*Z-Image"
    ):
        export(run, layout=Format.COMFYUI, out=tmp_path / "out")


def test_the_doctor_knows_it(folder: Path, prompt_file: Path) -> None:
    found = api.examine(recipe(folder, prompt_file, guidance=1.5))
    assert not found.problems and not any("distilled" in note for note in found.notes)
    policy = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(policy, ZImagePolicy)
    for name, part in found.parts.items():
        tensors = policy.pipeline.components[name].state_dict().values()
        assert part.bytes == sum(x.nbytes for x in tensors), name
    assert found.drawing is not None and found.training is not None


def before_a_run(*given: Any, **changes: Any) -> Diagnosis:
    """What a run looks at before it begins: a small model's memory is not weighed, which takes seconds."""
    return examine_training(AlignConfig(**recipe(*given, **changes)), about_to_run=True)


def test_the_doctor_counts_a_prompt_with_the_chat_around_it(folder: Path, tmp_path: Path) -> None:
    """The frame takes 19 of the 64 tokens, and each letter of a prompt one."""
    long = tmp_path / "long.txt"
    long.write_text(f"{'o' * 45}\n{'w' * 46}\n")
    found = before_a_run(folder, long)
    assert any("1 of 2 prompts are longer than the 64 tokens" in note for note in found.notes), found.notes
    assert any("'www" in note for note in found.notes)


def test_a_text_encoder_of_another_model_is_told(folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cap_feat_dim": 24}))
    said = " ".join(problem.message for problem in before_a_run(other, prompt_file).problems)
    assert (
        "cap_feat_dim of the ZImageTransformer2DModel is 24, but the rows of the language model give 16"
        in said
    )


def test_a_distilled_checkpoint_is_told(prompt_file: Path, tmp_path: Path) -> None:
    turbo = tiny.z_image(tmp_path / "turbo")
    (turbo / "pixrl.json").unlink()
    said = " ".join(before_a_run(turbo, prompt_file, resolution=32).notes)
    assert (
        "was distilled to 8 steps. Reinforcement learning moves it off what the distillation taught" in said
    )


def test_the_recipe_of_paper_scale_is_the_papers_but_for_the_model() -> None:
    ours, papers = (load_recipe(name).model_dump() for name in ("z-image/e2po", "paper/e2po"))
    same = {"advantage", "loss", "optimizer", "lora", "seed"}
    assert {name: ours[name] for name in same} == {name: papers[name] for name in same}
    own, paper = ours["exploration"], papers["exploration"]
    assert {name for name in own if own[name] != paper[name]} == {
        "noises", "variants", "encoders", "weighted", "norm", "max_norm"
    }  # fmt: skip
    assert (own["noises"], own["variants"], ours["steps"]) == (8, 3, 750)
