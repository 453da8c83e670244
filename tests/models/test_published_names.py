"""The authors' names that messages expect are the ones that the files have and diffusers' converters read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from tests import published, tiny

from pixrl.models.lora.published_names import authors_names

UNET, VAE = "model.diffusion_model.", "first_stage_model."


def named(model: torch.nn.Module, prefix: str) -> set[str]:
    found = authors_names(type(model).__name__, model.config, model.state_dict())
    assert len(found) == len(model.state_dict())
    return {prefix + name for name in found.values()}


@pytest.mark.parametrize(
    ("make", "write", "part", "kind"),
    [
        (tiny.sd3, published.sd3, "transformer", SD3Transformer2DModel),
        (lambda p: tiny.sd3(p, dual=True), published.sd3, "transformer", SD3Transformer2DModel),
        (tiny.sdxl, published.sdxl, "unet", UNet2DConditionModel),
    ],
)
def test_the_names_in_the_files(
    make: Callable[[Path], Path], write: Callable[[Path, Path], Path], part: str, kind: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model")
    with safe_open(write(folder, tmp_path / "model.safetensors"), "pt") as file:
        keys = set(file.keys())
    backbone = named(kind.from_pretrained(folder / part), UNET)
    vae = named(AutoencoderKL.from_pretrained(folder / "vae"), VAE)
    assert keys == backbone | vae


@pytest.mark.parametrize("guided", [False, True])
def test_the_names_that_diffusers_reads_of_flux(guided: bool) -> None:
    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guided,
    )
    rows = 7 * 3072  # diffusers cuts the single blocks' linear1 at the published width
    file = {name: torch.zeros(rows, 1) for name in named(model, "")}
    assert set(convert_flux_transformer_checkpoint_to_diffusers(file)) == set(model.state_dict())
    assert not file  # every weight was asked for by its name


def test_other_classes_have_no_names() -> None:
    assert authors_names("T5EncoderModel", {}, ["shared.weight"]) == {}
