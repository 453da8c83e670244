"""FLUX.2 [klein] learns a subject from its pictures: a run, export into its own pipeline, own shapes, the doctor."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import Flux2KleinPipeline

import pixrl
from pixrl import api, models
from pixrl.models.flux2 import Flux2KleinPolicy
from pixrl.report.export import Format, export
from pixrl.runs import checkpoint
from pixrl.runs.config import load_recipe
from tests import tiny_language
from tests.models.test_flux2 import patches, pictures
from tests.personalize.test_job import recipe
from tests.tolerance import PICTURE, agree

METHOD: dict[str, Any] = {
    "sampling": {"steps": 3, "solver": "dpm"},
    "loss": {"kind": "nft", "timesteps": 2},
    "references": {"count": 1, "side": 64},
    "guidance": 2.0,
    "optimizer": {"lr": 0.05, "ema": 0.5},
    "evaluation": {"prompts": 1, "per_prompt": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.flux2_klein(tmp_path_factory.mktemp("flux2") / "klein")


def test_its_pipeline_draws_what_was_trained(folder: Path, subjects: Path, tmp_path: Path) -> None:
    done = pixrl.personalize(recipe(folder, subjects, **METHOD), out=tmp_path / "run")
    policy = models.load(folder, device="cpu", dtype="float32", guidance=2.0)
    assert isinstance(policy, Flux2KleinPolicy)
    shown = policy.show(policy.encode(["a red dog"]), [pictures(1, 0)], ["a red dog"])
    base = policy.sample(shown, [1])
    slots = policy.attach_lora(rank=4, alpha=8)
    tensors, _ = checkpoint.load(checkpoint.latest(done.run) or done.run)
    slots.load_state({k.removeprefix("slots/"): x for k, x in tensors.items() if k.startswith("slots/")})
    with policy.slot("ema"):
        ours = policy.sample(shown, [1])
    file = export(done.run, layout=Format.DIFFUSERS, out=tmp_path / "out").file
    assert "takes reference pictures as `image=`" in (file.parent / "README.md").read_text()
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    processor = pipeline.image_processor
    theirs = pipeline(
        image=processor.numpy_to_pil(processor.pt_to_numpy(pictures(1, 0))),
        prompt="a red dog",
        latents=patches(policy, policy.initial_noise([1])),
        num_inference_steps=policy.settings.steps,
        guidance_scale=2.0,
        max_sequence_length=policy.text_length,
        height=32,
        width=32,
        output_type="pt",
    ).images
    assert agree(ours, theirs, PICTURE)
    assert not agree(base, ours, PICTURE)


def test_the_doctor_knows_it(folder: Path, subjects: Path) -> None:
    found, more = (
        api.examine(
            recipe(
                folder, subjects, **METHOD | {"references": {"count": count, "side": 64}}, kind="personalize"
            )
        )
        for count in (1, 2)
    )
    assert not found.problems
    pipeline = models.load(folder, device="cpu", dtype="float32").pipeline  # type: ignore[attr-defined]
    for part, known in found.parts.items():
        tensors = pipeline.components[part].state_dict().values()
        # the text encoder's first layer is its last one
        shared_once = {x.data_ptr(): x.nbytes for x in tensors}
        assert known.bytes == sum(shared_once.values()), part
    assert found.training is not None and more.training is not None
    assert more.training.each > found.training.each


def test_the_recipe_is_that_of_qwen_image_edit_but_for_the_model() -> None:
    ours, known = (load_recipe(name).model_dump() for name in ("subject/flux2-klein", "subject/qwen-edit"))
    assert {name for name in ours if ours[name] != known[name]} == {"model"}
