"""Pictures of averaged predictions: equal to a plain loop, and to a single prompt's where it has all the weight."""

import re
from dataclasses import replace

import pytest
import torch
from tests.tolerance import PICTURE, agree
from torch import Tensor

from pixrl.errors import InputError, ShapeError
from pixrl.models.base import Conditioning, Mixture, Renderer
from pixrl.models.sd3 import SD3Policy
from pixrl.models.sdxl import SDXLPolicy

OWL, SNAIL = "a photo of an owl", "a photo of a snail"
SEEDS = [1, 2, 3]


def parts_of(renderer: Renderer) -> tuple[Conditioning, Conditioning]:
    return renderer.encode([OWL] * 3), renderer.encode([SNAIL] * 3)


def weights(*first: float) -> Tensor:
    """[B, 2, 1, 1] from the first part's weights."""
    a_B = torch.tensor(first)
    return torch.stack((a_B, 1 - a_B), dim=1)[:, :, None, None]


def mixture(renderer: Renderer, *steps: Tensor) -> Mixture:
    count = renderer.settings.steps
    return Mixture(parts_of(renderer), steps if len(steps) > 1 else steps * count)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_the_whole_weight_on_one_prompt_is_that_prompts_picture(
    name: str, guidance: float, request: pytest.FixtureRequest
) -> None:
    renderer = request.getfixturevalue(name)
    renderer.settings = replace(renderer.settings, steps=3, guidance=guidance)
    mixed = renderer.sample_mixture(mixture(renderer, weights(1, 0, 1)), SEEDS)
    alone = renderer.sample(renderer.encode([OWL, SNAIL, OWL]), SEEDS)
    assert agree(mixed, alone, PICTURE)


def test_sd3_takes_the_average_velocity_at_every_step(sd3: SD3Policy) -> None:
    sd3.settings = replace(sd3.settings, steps=3, guidance=0.0)
    steps = (weights(0.3, 0.5, 0.9), weights(1.0, 0.2, 0.4), weights(0.0, 0.6, 0.7))
    ours = sd3.sample_mixture(mixture(sd3, *steps), SEEDS)
    owl, snail = parts_of(sd3)
    x, sigmas = sd3.initial_noise(SEEDS), sd3.schedule(3)
    with torch.no_grad():
        for step in range(3):
            a_B111 = steps[step][:, :1]
            t_B = sigmas[step].expand(3)
            v = a_B111 * sd3.velocity(x, t_B, owl) + (1 - a_B111) * sd3.velocity(x, t_B, snail)
            x = x + (sigmas[step + 1] - sigmas[step]) * v
        theirs = sd3.decode(x)
    assert agree(ours, theirs, PICTURE)


def test_sdxl_steps_the_average_of_noise_predictions(sdxl: SDXLPolicy) -> None:
    """The oracle: diffusers' scheduler stepped by hand on the average of two calls of the UNet."""
    sdxl.settings = replace(sdxl.settings, steps=3, guidance=0.0)
    ours = sdxl.sample_mixture(mixture(sdxl, weights(0.3, 0.5, 0.9)), SEEDS)
    scheduler, unet = sdxl.pipeline.scheduler, sdxl.pipeline.unet
    side = sdxl.settings.resolution
    time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    for row, (seed, a) in enumerate(zip(SEEDS, (0.3, 0.5, 0.9), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(3)
        x = torch.randn(1, *sdxl.latent_shape, generator=generator) * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps:
                model_input = scheduler.scale_model_input(x, t)
                noise = torch.zeros_like(x)
                for share, prompt in ((a, OWL), (1 - a, SNAIL)):
                    text = sdxl.encode([prompt])
                    noise += (
                        share
                        * unet(
                            model_input,
                            t,
                            encoder_hidden_states=text.tokens_BLD,
                            added_cond_kwargs={"text_embeds": text.pooled_BE, "time_ids": time_ids},
                        ).sample
                    )
                x = scheduler.step(noise, t, x, generator=generator).prev_sample
            image = sdxl.pipeline.vae.decode(x / sdxl.vae.config.scaling_factor).sample / 2 + 0.5
        assert agree(ours[row : row + 1], image.clamp(0, 1), PICTURE)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_a_mask_decides_place_by_place(name: str, request: pytest.FixtureRequest) -> None:
    """With a mask at the last step alone, each half of the latents moves as its own prompt moves it."""
    renderer = request.getfixturevalue(name)
    renderer.settings = replace(renderer.settings, steps=2, guidance=0.0)
    side = renderer.latent_shape[-1]
    top = (torch.arange(side) < side // 2).float()[:, None].expand(side, side)
    mask = torch.stack((top, 1 - top)).expand(3, 2, side, side)
    even = weights(0.5, 0.5, 0.5)
    made = {}
    for kind, last in {"mask": mask, "owl": weights(1, 1, 1), "snail": weights(0, 0, 0)}.items():
        latents = []
        original = renderer.decode

        def keep(x0: Tensor, original=original, latents=latents) -> Tensor:
            latents.append(x0)
            return original(x0)

        renderer.decode = keep
        renderer.sample_mixture(mixture(renderer, even, last), SEEDS)
        del renderer.decode
        made[kind] = torch.cat(latents)
    half = side // 2
    assert agree(made["mask"][:, :, :half], made["owl"][:, :, :half], PICTURE)
    assert agree(made["mask"][:, :, half:], made["snail"][:, :, half:], PICTURE)
    assert not torch.allclose(made["owl"], made["snail"], atol=1e-2)


def test_prompts_without_weight_cost_nothing(sd3: SD3Policy) -> None:
    sd3.settings = replace(sd3.settings, steps=2, guidance=0.0)
    mixed = mixture(sd3, weights(1, 0, 0.5), weights(0, 1, 1))
    assert mixed.passes == 4 + 3
    asked = []
    sd3.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    sd3.sample_mixture(mixed, SEEDS)
    assert sum(asked) == 7


def test_a_picture_depends_on_its_own_row_alone(sd3: SD3Policy) -> None:
    sd3.settings = replace(sd3.settings, steps=2, guidance=0.0)
    mixed = mixture(sd3, weights(0.1, 0.5, 0.8))
    together = sd3.sample_mixture(mixed, SEEDS)
    sd3.micro_batch = 1
    assert agree(sd3.sample_mixture(mixed, SEEDS), together, PICTURE)
    assert agree(sd3.sample_mixture(mixed[1:2], SEEDS[1:2]), together[1:2], PICTURE)


def test_masks_still_sum_to_one_when_resized() -> None:
    mask = torch.rand(2, 3, 64, 64).softmax(dim=1)
    part = Conditioning(torch.zeros(2, 1, 1))
    mixed = Mixture((part,) * 3, (mask,))
    for side in (5, 8, 64, 100):
        ones = torch.ones(len(mixed.used(0)[0]), 4, side, side)
        assert agree(mixed.average(0, ones), torch.ones(2, 4, side, side), 64)


def test_what_does_not_fit_is_refused(sd3: SD3Policy) -> None:
    owl, snail = parts_of(sd3)
    with pytest.raises(ShapeError, match=re.escape("needs weights [B, N, H, W] of N parts with B rows")):
        Mixture((owl, snail), (weights(1, 0),))
    with pytest.raises(ShapeError, match="takes 2 steps"):
        sd3.settings = replace(sd3.settings, steps=2)
        sd3.sample_mixture(Mixture((owl, snail), (weights(1, 0, 1),) * 3), SEEDS)

    class Plain(SD3Policy):
        sample_mixture = Renderer.sample_mixture

    with pytest.raises(InputError, match="has no sample_mixture"):
        Plain.sample_mixture(sd3, Mixture((owl, snail), (weights(1, 0, 1),) * 2), SEEDS)
