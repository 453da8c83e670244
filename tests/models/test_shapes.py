"""Pictures that are not square: every adapter draws what its pipeline of diffusers does with that height and width."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny, tiny_language
from tests.tolerance import PICTURE, agree
from torch import Tensor

from pixrl import models
from pixrl.config import parse_resolution, plain_resolution
from pixrl.conformance import check_policy
from pixrl.errors import InputError
from pixrl.models.base import SamplingSettings, on_canvas, on_square
from pixrl.models.flux import pack_latents, unpack_latents
from pixrl.models.pipeline import FlowPipelinePolicy, latent_size, micro_batch_for

WIDE, HIGH = "48x32", "32x48"
OWL, SNAIL = "a photo of an owl", "a photo of a red snail"


@dataclass(frozen=True)
class Family:
    """How a tiny checkpoint is made, and how its pipeline is asked for latents beyond prompts, steps and size."""

    make: Callable[[Path], Path]
    guidance: float
    call: Callable[[FlowPipelinePolicy, float], dict[str, Any]]
    pack: Callable[[FlowPipelinePolicy, Tensor], Tensor] = lambda policy, latents: latents
    pictures: bool = False


FAMILIES = {
    "sd3": Family(
        lambda folder: tiny.sd3(folder, card=tiny.SD3_CARD),
        5.0,
        lambda _, scale: {"guidance_scale": scale, "negative_prompt": [""] * 2, "max_sequence_length": 0},
    ),
    "sdxl": Family(tiny.sdxl_base, 4.0, lambda _, scale: {"guidance_scale": scale}),
    "flux": Family(
        lambda folder: tiny.flux(folder, guidance_embeds=True),
        3.5,
        lambda policy, scale: {"guidance_scale": scale, "max_sequence_length": policy.text_length},
        lambda _, latents: pack_latents(latents),
    ),
    "flux2-klein": Family(
        tiny_language.flux2_klein,
        4.0,
        lambda policy, scale: {"guidance_scale": scale, "max_sequence_length": policy.text_length},
        lambda policy, latents: policy.pipeline._patchify_latents(latents),
        pictures=True,
    ),
    "z-image": Family(
        tiny_language.z_image,
        2.5,
        lambda policy, scale: {"guidance_scale": scale, "max_sequence_length": policy.text_length},
    ),
    "qwen-image": Family(
        tiny_language.qwen_image,
        4.0,
        lambda policy, scale: {
            "true_cfg_scale": scale,
            "negative_prompt": [" "] * 2,
            "max_sequence_length": policy.text_length,
        },
        lambda _, latents: pack_latents(latents),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.make(root / name) for name, family in FAMILIES.items()}


def load(folder: Path | str, resolution: int | str, guidance: float | None = None) -> FlowPipelinePolicy:
    found = models.load(folder, device="cpu", dtype="float32", resolution=resolution, guidance=guidance)
    assert isinstance(found, FlowPipelinePolicy)
    return found


def published(policy: FlowPipelinePolicy, family: Family, width: int, height: int, **more: Any) -> Tensor:
    """What the pipeline draws: latents, or the pictures of FLUX.2, which gives out no latents as it draws them."""
    found: Tensor = policy.pipeline(
        prompt=[OWL, SNAIL],
        latents=family.pack(policy, policy.initial_noise([1, 2])),
        num_inference_steps=policy.settings.steps,
        width=width,
        height=height,
        output_type="pt" if family.pictures else "latent",
        **family.call(policy, family.guidance) | more,
    ).images
    return unpack_latents(found, (height // 8, width // 8)) if found.ndim == 3 else found


@torch.no_grad()
def drawn(policy: FlowPipelinePolicy, family: Family) -> Tensor:
    """The same by the adapter."""
    rows = policy.encode([OWL, SNAIL])
    return policy.sample(rows, [1, 2]) if family.pictures else policy._integrate(rows, [1, 2])


@pytest.mark.parametrize("resolution", [WIDE, HIGH])
@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_equal_the_published_pipeline(folders: dict[str, Path], name: str, resolution: str) -> None:
    """With guidance, so both passes see the size; SDXL's UNet reads it, FLUX's and Qwen-Image's schedules follow it."""
    family, (width, height) = FAMILIES[name], parse_resolution(resolution)
    policy = load(folders[name], resolution, family.guidance)
    theirs = published(policy, family, width, height)
    assert policy.latent_shape == (4, height // 4, width // 4)
    assert agree(drawn(policy, family), theirs, PICTURE)
    assert policy.sample(policy.encode([OWL]), [1]).shape == (1, 3, height, width)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_adapter_keeps_its_promises_of_pictures_that_are_not_square(
    folders: dict[str, Path], name: str
) -> None:
    """Trained, coded and decoded too; the same pictures in any micro-batch."""
    check_policy(load(folders[name], HIGH), [OWL, SNAIL])


@pytest.mark.parametrize("ref", ["toy:sd3", "toy:flux"])
def test_the_toy_world_draws_them_within_its_positions(ref: str) -> None:
    policy = load(ref, "64x48")
    (picture,) = policy.sample(policy.encode(["a photo of an owl"]), [3])
    assert picture.shape == (3, 48, 64) and picture.std() > 0.1
    latents = policy.encode_images(picture[None])
    assert latents.shape[1:] == policy.latent_shape


def test_the_schedule_is_shifted_by_the_pictures_tokens(folders: dict[str, Path]) -> None:
    """As many tokens, the same levels; more of them, more noise."""
    wide, high, small, large = (load(folders["flux"], it).schedule(4) for it in (WIDE, HIGH, 32, "48x64"))
    assert torch.equal(wide, high)
    assert (small[1:-1] < wide[1:-1]).all() and (wide[1:-1] < large[1:-1]).all()


@pytest.mark.parametrize(
    ("given", "sides", "plain"),
    [
        (512, (512, 512), 512),
        ("512", (512, 512), 512),
        ("512x512", (512, 512), 512),
        ("832x1216", (832, 1216), "832x1216"),
        ("16384x1", (16384, 1), "16384x1"),
    ],
)
def test_a_resolution_is_a_side_or_width_by_height(
    given: int | str, sides: tuple[int, int], plain: int | str
) -> None:
    assert parse_resolution(given) == sides
    assert plain_resolution(given) == plain and plain_resolution(plain) == plain
    settings = SamplingSettings(steps=1, guidance=0.0, resolution=plain)
    assert (settings.width, settings.height, settings.longest) == (*sides, max(sides))


@pytest.mark.parametrize(
    "given", [0, -8, True, 512.0, 16385, "16385x8", "x", "832x", "832 x 1216", "832X1216", "832×1216", "08", [8, 16]]
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(given: object) -> None:
    with pytest.raises(InputError, match=r"no size of pictures.*width x height \(832x1216\)"):
        parse_resolution(given)


def test_both_sides_are_whole_tokens_and_the_nearest_size_is_named() -> None:
    settings = SamplingSettings(steps=1, guidance=0.0, resolution="832x1216")
    assert latent_size(settings, 8, 2) == (152, 104)
    with pytest.raises(
        InputError, match=r"850x1210 must be width and height each a multiple of 16.*848x1216"
    ):
        latent_size(replace(settings, resolution="850x1210"), 8, 2)
    with pytest.raises(InputError, match=r"63 must be a multiple of 8 for.*nearest is 64"):
        latent_size(replace(settings, resolution=63), 4, 2)
    with pytest.raises(InputError, match="nearest is 16x1216"):
        latent_size(replace(settings, resolution="1x1216"), 8, 2)


def test_sd3_refuses_a_side_beyond_its_positions_whichever_it_is(folders: dict[str, Path]) -> None:
    for resolution in ("32x512", "512x32"):
        with pytest.raises(InputError, match=rf"resolution {resolution} is beyond the table of positions"):
            load(folders["sd3"], resolution)


def test_a_micro_batch_goes_by_pixels() -> None:
    assert micro_batch_for(torch.device("cuda", 0), 832, 1216) == 64 * 512 * 512 // (832 * 1216)
    assert micro_batch_for(torch.device("cpu"), 32, 128) == 32


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_a_picture_is_laid_on_any_canvas_whole(size: tuple[int, int]) -> None:
    width, height = size
    black = torch.zeros(3, 20, 10)
    canvas = on_canvas(black, width, height)
    assert canvas.shape == (3, height, width)
    dark = canvas[0] < 0.5
    rows, columns = dark.any(dim=1).sum().item(), dark.any(dim=0).sum().item()
    assert rows == height and columns == height // 2, "as high as the canvas, twice as high as wide"
    assert torch.equal(dark, dark.flip(0)) and torch.equal(dark, dark.flip(1)), "in the middle"
    assert torch.equal(on_square(black, 32), on_canvas(black, 32, 32))
