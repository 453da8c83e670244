"""References of FLUX against diffusers' own FluxKontextPipeline, and whose references a group is shown."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from tests import tiny
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl import models
from pixrl.algorithms.exploration import Group, Variants, shown_to
from pixrl.models.base import on_square
from pixrl.models.flux import FluxPolicy, Preset, pack_latents, position_ids


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> FluxPolicy:
    folder = tiny.flux(tmp_path_factory.mktemp("tiny") / "flux", guidance_embeds=True)
    found = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(found, FluxPolicy)
    return found


@pytest.fixture(scope="module")
def kontext(policy: FluxPolicy) -> FluxKontextPipeline:
    """The same parts as diffusers assembles them."""
    return FluxKontextPipeline(
        **{**policy.pipeline.components, "image_encoder": None, "feature_extractor": None}
    )


def pictures(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def published(kontext: FluxKontextPipeline, images: Tensor) -> tuple[Tensor, ...]:
    """Image tokens, the target's ids and the reference's, from pictures in [0, 1]."""
    with torch.no_grad():
        pixels = kontext.image_processor.preprocess(images)
        _, tokens, own, others = kontext.prepare_latents(
            pixels,
            len(images),
            4,
            32,
            32,
            torch.float32,
            torch.device("cpu"),
            torch.Generator().manual_seed(0),
        )
    return tokens, own, others


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_latents_of_references_are_the_published_pipelines(
    policy: FluxPolicy, kontext: FluxKontextPipeline, size: tuple[int, int]
) -> None:
    """Shift factor, scale and range of pixels; of a picture that is not square too."""
    images = pictures(2, *size)
    tokens, _, _ = published(kontext, images)
    assert agree(pack_latents(policy.encode_images(images)), tokens, MODEL)
    assert not agree(tokens[:1], tokens[1:], MODEL)


def test_ids_are_the_published_pipelines(kontext: FluxKontextPipeline) -> None:
    _, own, others = published(kontext, pictures(1, 48, 16))
    found, (reference,) = position_ids((4, 4), [(6, 2)], "kontext")
    assert torch.equal(found, own) and torch.equal(reference, others)


def test_the_velocity_is_the_published_transformers_on_those_tokens(
    policy: FluxPolicy, kontext: FluxKontextPipeline
) -> None:
    images = pictures(2)
    tokens, own, others = published(kontext, images)
    x_t, t_B = policy.initial_noise([1, 2]), torch.tensor([0.9, 0.3])
    text = policy.encode(["a red owl", "a cat"])
    policy.place(preset=Preset.KONTEXT)
    with torch.no_grad():
        found = policy.velocity(x_t, t_B, policy.with_references(text, [images]))
        packed = kontext._pack_latents(x_t, 2, 4, 8, 8)
        expected = policy.denoiser(
            hidden_states=torch.cat([packed, tokens], dim=1),
            timestep=t_B,
            guidance=torch.full((2,), policy.settings.guidance),
            pooled_projections=text.pooled_BE,
            encoder_hidden_states=text.tokens_BLD,
            txt_ids=torch.zeros(text.tokens_BLD.shape[1], 3),
            img_ids=torch.cat([own, others]),
            return_dict=False,
        )[0][:, :16]
    policy.place(preset=Preset.UNO)
    unpacked = kontext._unpack_latents(expected, 32, 32, kontext.vae_scale_factor)
    assert agree(found, unpacked, MODEL)


def test_kontexts_folder_is_placed_as_kontext_and_fluxs_as_uno(policy: FluxPolicy, tmp_path: Path) -> None:
    assert policy.preset is Preset.UNO
    folder = tmp_path / "kontext"
    shutil.copytree(policy.checkpoint.folder, folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxKontextPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    found = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(found, FluxPolicy) and found.preset is Preset.KONTEXT


def test_each_group_is_shown_its_own_references_in_their_order(policy: FluxPolicy) -> None:
    """Two subjects of two pictures; what rewards look at is another picture still."""
    shown = [list(pictures(4, 40, 24)[at : at + 2]) for at in (0, 2)]
    groups = [
        Group(place, 0, place, f"a {word}", {"shown": shown[place], "reference": [torch.zeros(3, 32, 32)]})
        for place, word in enumerate(("cat", "dog"))
    ]
    policy.place(side=16)
    anchor = policy.encode([group.prompt for group in groups])
    found = shown_to(policy, Variants(anchor), groups).anchor
    assert torch.equal(found.tokens_BLD, anchor.tokens_BLD) and len(found.references) == 2
    for place in range(2):
        for group in range(2):
            alone = policy.encode_images(on_square(shown[group][place], 16)[None])
            assert agree(found.references[place][group : group + 1], alone, MODEL)
    policy.place(side=32)


def test_a_reference_matters_where_it_stands(policy: FluxPolicy) -> None:
    first, second = (policy.encode_images(pictures(2)[at : at + 1]) for at in (0, 1))
    text = policy.encode(["a cat"])
    x_t, t_B = policy.initial_noise([3]), torch.tensor([0.7])

    def velocity(*references: Tensor, preset: Preset) -> Tensor:
        policy.place(preset=preset)
        with torch.no_grad():
            return policy.velocity(x_t, t_B, replace(text, references=references))

    found = [
        velocity(*shown, preset=preset)
        for preset in Preset
        for shown in ((first,), (second,), (first, second))
    ]
    found.append(velocity(second, first, preset=Preset.UNO))  # kontext places all references alike
    policy.place(preset=Preset.UNO)
    for place, one in enumerate(found):
        assert not any(agree(one, other, MODEL) for other in found[:place])


def test_a_reference_lies_in_the_middle_of_white() -> None:
    square = on_square(torch.zeros(3, 16, 8), 32)
    assert torch.equal(
        square, torch.cat([torch.ones(3, 32, 8), torch.zeros(3, 32, 16), torch.ones(3, 32, 8)], dim=2)
    )
