"""The SDXL adapter equals diffusers' pipeline, and each picture depends on its own row and seed alone."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tolerance import PICTURE, agree

from pixrl import models
from pixrl.errors import ShapeError
from pixrl.models.base import Conditioning, FlowPolicy
from pixrl.models.sdxl import SDXLRenderer

OWL, SNAIL = "a photo of an owl", "a photo of a snail"


def diffusers_picture(renderer: SDXLRenderer, prompt: str, seed: int, guidance: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    pictures: torch.Tensor = renderer.pipeline(
        prompt=prompt,
        latents=latents,
        generator=[generator],
        num_inference_steps=renderer.settings.steps,
        guidance_scale=guidance,
        height=32,
        width=32,
        output_type="pt",
    ).images
    return pictures


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_pictures_equal_the_published_pipeline(sdxl: SDXLRenderer, guidance: float) -> None:
    sdxl.settings = replace(sdxl.settings, guidance=guidance)
    ours = sdxl.sample(sdxl.encode([OWL, SNAIL]), [1, 2])
    theirs = torch.cat(
        [diffusers_picture(sdxl, OWL, 1, guidance), diffusers_picture(sdxl, SNAIL, 2, guidance)]
    )
    assert agree(ours, theirs, PICTURE)


def test_without_a_card_the_defaults_are_turbos(sdxl_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(sdxl_folder, folder)
    (folder / "pixrl.json").unlink()
    settings = models.load(folder).settings
    assert (settings.steps, settings.guidance, settings.resolution) == (4, 0.0, 512)


def test_it_is_no_flow_policy(sdxl: SDXLRenderer) -> None:
    assert not isinstance(sdxl, FlowPolicy)


def test_ancestral_noise_is_seeded_per_picture(sdxl: SDXLRenderer) -> None:
    sdxl.settings = replace(sdxl.settings, steps=4)
    conditioning = sdxl.encode([OWL] * 5)
    together = sdxl.sample(conditioning, [1, 2, 3, 4, 5])
    sdxl.micro_batch = 2
    assert agree(sdxl.sample(conditioning, [1, 2, 3, 4, 5]), together, PICTURE)
    assert agree(sdxl.sample(conditioning[[0]], [3]), together[[2]], PICTURE)


def test_text_encoders_run_once_a_prompt(sdxl: SDXLRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    original = sdxl.pipeline.text_encoder_2.forward
    monkeypatch.setattr(
        sdxl.pipeline.text_encoder_2, "forward", lambda *a, **kw: calls.append(1) or original(*a, **kw)
    )
    conditioning = sdxl.encode([OWL, SNAIL] * 8)
    sdxl.sample(conditioning, range(16))
    assert len(calls) == 2


def test_the_schedulers_state_does_not_leak(sdxl: SDXLRenderer) -> None:
    conditioning = sdxl.encode([OWL])
    fresh = copy.deepcopy(sdxl.pipeline.scheduler)
    first = sdxl.sample(conditioning, [1])
    sdxl.sample(conditioning, [2])
    assert torch.equal(sdxl.sample(conditioning, [1]), first)
    sdxl.pipeline.scheduler = fresh
    assert torch.equal(sdxl.sample(conditioning, [1]), first)


def test_pooled_features_are_needed(sdxl: SDXLRenderer) -> None:
    with pytest.raises(ShapeError, match="pooled"):
        sdxl.sample(Conditioning(sdxl.encode([OWL]).tokens_BLD), [1])
