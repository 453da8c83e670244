"""Models that read prompts with a language model are trained by every method and go on as they were.

Their own pipelines draw with what they export, and the doctor knows them.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

import pixrl
from pixrl import api, models
from pixrl.doctor.diagnosis import Diagnosis
from pixrl.doctor.examine import examine_training
from pixrl.errors import CheckpointError
from pixrl.jobs import align as align_job
from pixrl.models.flux import pack_latents
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.report.export import Format, export
from pixrl.runs import checkpoint
from pixrl.runs.config import AlignConfig, load_recipe
from tests import tiny_language
from tests.align.parts import E2PO, GRPO, final, recipe, same
from tests.tolerance import PICTURE, agree

OWL = "a red owl"
GUIDANCE = 1.5
LANGUAGE: dict[str, Any] = {"exploration": E2PO["exploration"] | {"encoders": "language", "norm": "relative"}}


@dataclass(frozen=True)
class Kind:
    """A model as its own pipeline draws it, and what is known of it."""

    make: Callable[[Path], Path]
    pipeline: str
    arguments: Callable[[Tensor], dict[str, Any]]
    """Of the latents, which some pipelines take as tokens; with guidance."""
    width: str
    """The option of the denoiser that takes the language model's width."""
    letters: int
    """The longest prompt that is read, a letter a token: what the frame leaves of the tokens."""


KINDS = {
    "flux2-klein": Kind(
        tiny_language.flux2_klein,
        "Flux2KleinPipeline",
        lambda noise: {"latents": pixel_unshuffle(noise, 2), "guidance_scale": GUIDANCE},
        "joint_attention_dim",
        64 - 38,
    ),
    "z-image": Kind(
        lambda folder: tiny_language.z_image(folder, shift=6.0),
        "ZImagePipeline",
        lambda noise: {"latents": noise, "guidance_scale": GUIDANCE},
        "cap_feat_dim",
        64 - 19,
    ),
    "qwen-image": Kind(
        tiny_language.qwen_image,
        "QwenImagePipeline",
        lambda noise: {
            "latents": pack_latents(noise), "true_cfg_scale": GUIDANCE, "negative_prompt": " "
        },
        "joint_attention_dim",
        192 - 128,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[name].make(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def run(folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = recipe(folder, prompt_file, steps=2, optimizer={"lr": 0.05, "ema": 0.5}, guidance=GUIDANCE)
    return pixrl.align(made, out=tmp_path_factory.mktemp("runs") / "bright").run


def load(folder: Path, lora: Path | None = None) -> FlowPipelinePolicy:
    found = models.load(folder, device="cpu", dtype="float32", guidance=GUIDANCE, lora=lora)
    assert isinstance(found, FlowPipelinePolicy)
    return found


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


def test_diffusers_draws_what_was_trained(name: str, folder: Path, run: Path, tmp_path: Path) -> None:
    policy = load(folder)
    slots = policy.attach_lora(rank=4, alpha=8)
    base = policy.sample(policy.encode([OWL]), [1])
    tensors, _ = checkpoint.load(checkpoint.latest(run) or run)
    slots.load_state({k.removeprefix("slots/"): x for k, x in tensors.items() if k.startswith("slots/")})
    with policy.slot("ema"):
        ours = policy.sample(policy.encode([OWL]), [1])
    file = export(run, layout=Format.DIFFUSERS, out=tmp_path / "out").file
    pipeline = getattr(diffusers, KINDS[name].pipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    theirs = pipeline(
        prompt=OWL,
        num_inference_steps=policy.settings.steps,
        max_sequence_length=policy.text_length,
        height=32,
        width=32,
        output_type="pt",
        **KINDS[name].arguments(policy.initial_noise([1])),
    ).images
    assert agree(ours, theirs, PICTURE)
    assert not agree(base, ours, PICTURE)
    again = load(folder, file)
    assert agree(again.sample(again.encode([OWL]), [1]), ours, PICTURE)


def test_comfyui_reads_the_layout_of_diffusers(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"Export diffusers' layout .ComfyUI reads that too, for .*Z-Image"
    ):
        export(run, layout=Format.COMFYUI, out=tmp_path / "out")


def test_the_doctor_knows_it(folder: Path, prompt_file: Path) -> None:
    found = api.examine(recipe(folder, prompt_file, guidance=GUIDANCE))
    assert not found.problems and not any("distilled" in note for note in found.notes)
    for part, known in found.parts.items():
        tensors = load(folder).pipeline.components[part].state_dict().values()
        once = {x.data_ptr(): x.nbytes for x in tensors}  # an output layer may be the table of embeddings
        assert known.bytes == sum(once.values()), part
    assert found.drawing is not None and found.training is not None


def before_a_run(*given: Any, **changes: Any) -> Diagnosis:
    """What a run looks at before it begins: a small model's memory is not weighed, which takes seconds."""
    return examine_training(AlignConfig(**recipe(*given, **changes)), about_to_run=True)


def test_the_doctor_counts_a_prompt_within_its_frame(name: str, folder: Path, tmp_path: Path) -> None:
    most, long = KINDS[name].letters, tmp_path / "long.txt"
    long.write_text(f"{'o' * most}\n{'w' * (most + 1)}\n")
    found = before_a_run(folder, long)
    assert any("1 of 2 prompts are longer" in note and "'www" in note for note in found.notes), found.notes
    whole, cut = load(folder).encode(["o" * most, "w" * (most + 1)]).own_BL
    assert whole.all() and cut.all(), "one fills the tokens, of the other the frame's end is lost"


def test_a_text_encoder_of_another_model_is_told(
    name: str, folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "transformer" / "config.json"
    config = json.loads(file.read_text())
    wide = config[KINDS[name].width]
    file.write_text(json.dumps(config | {KINDS[name].width: 24}))
    said = " ".join(problem.message for problem in before_a_run(other, prompt_file).problems)
    assert (
        f"{KINDS[name].width} of the " in said
        and f"is 24, but the rows of the language model give {wide}" in said
    )


@pytest.mark.parametrize(
    ("make", "steps"),
    [(tiny_language.z_image, 8), (partial(tiny_language.flux2_klein, distilled=True), 4)],
    ids=["z-image", "flux2-klein"],
)
def test_a_distilled_model_is_told(
    make: Callable[[Path], Path], steps: int, prompt_file: Path, tmp_path: Path
) -> None:
    few = make(tmp_path / "few")
    (few / "pixrl.json").unlink()
    said = " ".join(before_a_run(few, prompt_file, resolution=32).notes)
    assert (
        f"was distilled to {steps} steps. Reinforcement learning moves it off what the distillation taught"
        in said
    )


@pytest.mark.parametrize("recipe_name", ["z-image/e2po", "qwen-image/e2po", "flux2-klein/e2po"])
def test_a_recipe_of_paper_scale_is_the_papers_but_for_the_model(recipe_name: str) -> None:
    ours, papers = (load_recipe(name).model_dump() for name in (recipe_name, "paper/e2po"))
    kept = {"advantage", "loss", "optimizer", "lora", "seed"}
    assert {name: ours[name] for name in kept} == {name: papers[name] for name in kept}
    own, paper = ours["exploration"], papers["exploration"]
    assert {name for name in own if own[name] != paper[name]} == {
        "noises", "variants", "encoders", "weighted", "norm", "max_norm"
    }  # fmt: skip
    assert (own["noises"], own["variants"], ours["steps"]) == (8, 3, 750)
