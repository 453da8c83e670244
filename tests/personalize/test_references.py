"""FLUX with reference pictures: the rule, packing, guidance, one schedule, pictures of any size."""

import math

import pytest
import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from pixrl.errors import InputError, ShapeError
from pixrl.models.base import Conditioning, on_square
from pixrl.models.flux import FluxPolicy, Preset, Shift
from tests.tolerance import MODEL, PICTURE, agree, rounding


def by_hand(latents: Tensor) -> Tensor:
    """Tokens of latents [B, C, H, W], entry by entry: channel first, then the row and the column within a block."""
    batch, channels, height, width = latents.shape
    rows = []
    for i in range(height // 2):
        for j in range(width // 2):
            block = latents[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            rows.append(block.reshape(batch, channels * 4))
    return torch.stack(rows, dim=1)


def ids_by_hand(sizes: list[tuple[int, int]], preset: str) -> Tensor:
    """EQUATIONS.md: uno's staircase begins at the target's size and goes on by each reference's; kontext is plane 1."""
    found, top, left = [], 0, 0
    for number, (rows, columns) in enumerate(sizes):
        uno = preset == "uno"
        first = (0, top, left) if uno or number == 0 else (1, 0, 0)
        found += [[first[0], first[1] + i, first[2] + j] for i in range(rows) for j in range(columns)]
        top, left = top + rows, left + columns
    return torch.tensor(found, dtype=torch.float32)


@pytest.mark.parametrize("preset", ["uno", "kontext"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_output_is_that_of_the_rule(bare: FluxPolicy, preset: str, count: int) -> None:
    bare.place(preset=Preset(preset))
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 8), (4, 6), (8, 2), (6, 6)][: count + 1]
    latents = [torch.randn(2, 4, *size, generator=generator) for size in sizes]
    text = bare.encode(["a red owl", "a cat"])
    condition = Conditioning(text.tokens_BLD, text.pooled_BE, tuple(latents[1:]))
    t_B = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        found = bare.velocity(latents[0], t_B, condition)
        tokens = bare.pipeline.transformer(
            hidden_states=torch.cat([by_hand(one) for one in latents], dim=1),
            timestep=t_B,
            guidance=torch.full((2,), 3.5),
            pooled_projections=text.pooled_BE,
            encoder_hidden_states=text.tokens_BLD,
            txt_ids=torch.zeros(text.tokens_BLD.shape[1], 3),
            img_ids=ids_by_hand([(h // 2, w // 2) for h, w in sizes], preset),
            return_dict=False,
        )[0]
    assert agree(by_hand(found), tokens[:, :16], MODEL)


def test_references_change_the_picture_and_their_order_too(bare: FluxPolicy) -> None:
    one, other = (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    text = bare.encode(["a cat"])
    shown = [
        bare.sample(bare.with_references(text, references), [0])
        for references in ([], [one], [other], [one, other], [other, one])
    ]
    for i in range(len(shown)):
        for j in range(i):
            assert not agree(shown[i], shown[j], PICTURE), (i, j)


def test_latents_do_not_depend_on_the_batch(bare: FluxPolicy, flux_folder: object) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = bare.encode_images(images)
    assert together.shape == (3, 4, 8, 8)
    assert torch.equal(bare.encode_images(images[1:2]), together[1:2])
    assert bare.decode(together).isfinite().all()


def test_latents_are_those_of_diffusers_own_pipeline(bare: FluxPolicy) -> None:
    """Range, shift and scale of `FluxKontextPipeline`, on a checkpoint whose shift is not 0."""
    assert bare.pipeline.vae.config.shift_factor
    kontext = FluxKontextPipeline(**bare.pipeline.components)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    own = kontext._encode_vae_image(kontext.image_processor.preprocess(images), generator=None)
    assert agree(bare.encode_images(images), own, MODEL)


def test_another_number_of_references_than_prompts(bare: FluxPolicy) -> None:
    with pytest.raises(ShapeError, match="2 reference pictures for 1 prompts"):
        bare.with_references(bare.encode(["a cat"]), [torch.rand(2, 3, 32, 32)])


def test_one_schedule_with_the_published_shift(bare: FluxPolicy) -> None:
    bare.latent_shape = (4, 64, 64)  # 512 x 512 of FLUX's own VAE: 1024 tokens
    shifted = {}
    for shift, mu in ((Shift.FLUX, 0.63), (Shift.UNO, 0.459)):
        bare.place(shift=shift)
        assert bare._shift_mu(1) == pytest.approx(mu, abs=5e-4)
        t = 0.5
        expected = math.exp(bare._shift_mu(1)) / (math.exp(bare._shift_mu(1)) + (1 / t - 1))
        shifted[shift] = bare.schedule(4)
        assert shifted[shift][2].item() == pytest.approx(expected, abs=rounding(torch.float32, 16))
        assert shifted[shift][0] == 1 and shifted[shift][-1] == 0
    assert shifted[Shift.UNO][2] < shifted[Shift.FLUX][2]


def test_what_cannot_be_placed(bare: FluxPolicy) -> None:
    with pytest.raises(InputError, match="multiple of 8"):
        bare.place(side=20)
    bare.pipeline.scheduler.register_to_config(use_dynamic_shifting=False)
    with pytest.raises(InputError, match="shift uno has no effect"):
        bare.place(shift=Shift.UNO)


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (32, 32), (7, 100), (64, 48)])
def test_any_size_fits_on_the_square(size: tuple[int, int]) -> None:
    square = on_square(torch.zeros(3, *size), 32)
    assert square.shape == (3, 32, 32)
    black = square[0] < 0.5
    height, width = (max(1, round(side * 32 / max(size))) for side in size)
    assert black.any(dim=1).sum() == height and black.any(dim=0).sum() == width
    assert torch.equal(black, black.flip(0)) or (32 - height) % 2 == 1
    assert set(square.unique().tolist()) <= {0.0, 1.0}


def test_a_picture_of_that_size_is_kept_as_it_is() -> None:
    image = torch.rand(3, 32, 32)
    assert torch.equal(on_square(image, 32), image)
    with pytest.raises(ShapeError, match=r"\[3, H, W\]"):
        on_square(torch.rand(1, 32, 32), 32)
