"""Qwen-Image-Edit learns a subject: runs, resume, dropped text encoders, export into its own pipeline, the doctor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as published_code

import pixrl
from pixrl import api, models
from pixrl.errors import PixrlError
from pixrl.jobs import align as align_job
from pixrl.models.flux import pack_latents
from pixrl.models.qwen_edit import QwenImageEditPolicy
from pixrl.report.export import Format, export
from pixrl.runs import checkpoint
from pixrl.runs.config import load_recipe
from tests import tiny_language
from tests.align.parts import final, same
from tests.models.test_qwen_edit import PictureProcessor, pictures, pils
from tests.personalize.test_job import recipe
from tests.tolerance import PICTURE, agree

SIDE = 64
METHOD: dict[str, Any] = {
    "sampling": {"steps": 3, "solver": "dpm"},
    "loss": {"kind": "nft", "timesteps": 2},
    "references": {"count": 1, "side": SIDE},
    "guidance": 2.0,
    "optimizer": {"lr": 0.05, "ema": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.qwen_edit(tmp_path_factory.mktemp("edit") / "plus")


@pytest.fixture(scope="module")
def whole(folder: Path, subjects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = recipe(folder, subjects, **METHOD, evaluation={"prompts": 1, "per_prompt": 1})
    return pixrl.personalize(settings, out=tmp_path_factory.mktemp("runs") / "whole").run


def test_it_goes_on_as_it_was(folder: Path, subjects: Path, whole: Path, tmp_path: Path) -> None:
    settings = recipe(folder, subjects, **METHOD, evaluation={"prompts": 1, "per_prompt": 1})
    pixrl.personalize(settings | {"steps": 1}, out=tmp_path / "cut")
    align_job.go_on(tmp_path / "cut", overrides=["steps=2"])
    assert same(final(whole), final(tmp_path / "cut"))
    assert any(x.any() for name, x in final(whole).items() if "lora_B" in name)


def test_dropped_text_encoders_change_nothing(
    folder: Path, subjects: Path, whole: Path, tmp_path: Path
) -> None:
    """Every prompt is read with its subject's pictures at the start, and with no others."""
    settings = recipe(folder, subjects, **METHOD, evaluation={"prompts": 1, "per_prompt": 1})
    settings["machine"] |= {"drop_text_encoders": True}
    dropped = pixrl.personalize(settings, out=tmp_path / "dropped")
    assert same(final(whole), final(dropped.run))


def test_its_pipeline_draws_what_was_trained(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_code, "VAE_IMAGE_SIZE", SIDE**2)
    policy = models.load(folder, device="cpu", dtype="float32", guidance=2.0)
    assert isinstance(policy, QwenImageEditPolicy)
    slots = policy.attach_lora(rank=4, alpha=8)
    shown = policy.show(policy.encode(["a red dog"]), [pictures(1)], ["a red dog"])
    base = policy.sample(shown, [1])
    tensors, _ = checkpoint.load(checkpoint.latest(whole) or whole)
    slots.load_state({k.removeprefix("slots/"): x for k, x in tensors.items() if k.startswith("slots/")})
    with policy.slot("ema"):
        ours = policy.sample(shown, [1])
    file = export(whole, layout=Format.DIFFUSERS, out=tmp_path / "out").file
    assert "takes reference pictures as `image=`" in (file.parent / "README.md").read_text()
    again = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(again, QwenImageEditPolicy)
    processor = PictureProcessor(again._patches, again.pipeline.tokenizer)
    pipeline = QwenImageEditPlusPipeline(**(again.pipeline.components | {"processor": processor}))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    theirs = pipeline(
        image=pils(policy, pictures(1)),
        prompt="a red dog",
        negative_prompt=" ",
        true_cfg_scale=2.0,
        latents=pack_latents(policy.initial_noise([1])),
        num_inference_steps=policy.settings.steps,
        height=32,
        width=32,
        output_type="pt",
    ).images
    assert agree(ours, theirs, PICTURE)
    assert not agree(base, ours, PICTURE)


def test_the_doctor_knows_it(folder: Path, subjects: Path) -> None:
    found = api.examine(recipe(folder, subjects, **METHOD, kind="personalize"))
    assert not found.problems
    pipeline = models.load(folder, device="cpu", dtype="float32").pipeline  # type: ignore[attr-defined]
    for part, known in found.parts.items():
        assert known.bytes == sum(x.nbytes for x in pipeline.components[part].state_dict().values()), part
    assert found.drawing is not None and found.training is not None


@pytest.mark.parametrize(("setting", "value"), [("preset", "kontext"), ("shift", "uno")])
def test_what_is_fluxs_alone_is_refused(folder: Path, subjects: Path, setting: str, value: str) -> None:
    references = {"count": 1, setting: value}
    settings = recipe(folder, subjects, **METHOD | {"references": references}, kind="personalize")
    found = api.examine(settings)
    assert any(
        f"references.{setting} has no effect on" in problem.message and "it is FLUX.1's" in problem.message
        for problem in found.problems
    )


def test_a_prompt_with_pictures_that_were_not_there_is_refused(folder: Path) -> None:
    policy = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(policy, QwenImageEditPolicy)
    policy.drop_text(["a dog"], [[pictures(1)[0]]])
    rows = policy.encode(["a dog"])
    assert policy.show(rows, [pictures(1)], ["a dog"]).away is not None
    with pytest.raises(PixrlError, match="was not among those that were encoded before"):
        policy.show(rows, [pictures(1, seed=3)], ["a dog"])
    assert torch.equal(policy.encode(["a dog"]).tokens_BLD, rows.tokens_BLD)


def test_the_recipe_is_kontexts_but_for_the_model() -> None:
    ours, known = (load_recipe(name).model_dump() for name in ("subject/qwen-edit", "subject/flux-kontext"))
    changed = {name for name in ours if ours[name] != known[name]}
    assert changed == {"model", "guidance"}
