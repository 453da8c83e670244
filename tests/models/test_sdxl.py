"""The SDXL adapter equals diffusers' pipeline, and as a flow policy it is the diffusion model that it wraps."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from tests import tiny
from tests.align.parts import NFT, aligner, groups
from tests.tolerance import MODEL, PICTURE, agree

from pixrl import models
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.conformance import check_policy
from pixrl.equations import cps_step
from pixrl.errors import CheckpointError, ShapeError
from pixrl.models.base import Conditioning
from pixrl.models.memory.sharding import transformer_blocks
from pixrl.models.sdxl import SDXLPolicy
from pixrl.runs import measure

OWL, SNAIL = "a photo of an owl", "a photo of a snail"


def diffusers_picture(renderer: SDXLPolicy, prompt: str, seed: int, guidance: float) -> torch.Tensor:
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
def test_pictures_equal_the_published_pipeline(sdxl: SDXLPolicy, guidance: float) -> None:
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


def test_ancestral_noise_is_seeded_per_picture(sdxl: SDXLPolicy) -> None:
    sdxl.settings = replace(sdxl.settings, steps=4)
    conditioning = sdxl.encode([OWL] * 5)
    together = sdxl.sample(conditioning, [1, 2, 3, 4, 5])
    sdxl.micro_batch = 2
    assert agree(sdxl.sample(conditioning, [1, 2, 3, 4, 5]), together, PICTURE)
    assert agree(sdxl.sample(conditioning[[0]], [3]), together[[2]], PICTURE)


def test_text_encoders_run_once_a_prompt(sdxl: SDXLPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    original = sdxl.pipeline.text_encoder_2.forward
    monkeypatch.setattr(
        sdxl.pipeline.text_encoder_2, "forward", lambda *a, **kw: calls.append(1) or original(*a, **kw)
    )
    conditioning = sdxl.encode([OWL, SNAIL] * 8)
    sdxl.sample(conditioning, range(16))
    assert len(calls) == 2


def test_the_schedulers_state_does_not_leak(sdxl: SDXLPolicy) -> None:
    conditioning = sdxl.encode([OWL])
    fresh = copy.deepcopy(sdxl.pipeline.scheduler)
    first = sdxl.sample(conditioning, [1])
    sdxl.sample(conditioning, [2])
    assert torch.equal(sdxl.sample(conditioning, [1]), first)
    sdxl.pipeline.scheduler = fresh
    assert torch.equal(sdxl.sample(conditioning, [1]), first)


def test_pooled_features_are_needed(sdxl: SDXLPolicy) -> None:
    with pytest.raises(ShapeError, match="pooled"):
        sdxl.sample(Conditioning(sdxl.encode([OWL]).tokens_BLD), [1])


BASES = [
    ("epsilon", "trailing"),
    ("v_prediction", "trailing"),
    ("epsilon", "leading"),
    ("v_prediction", "linspace"),
]


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> SDXLPolicy:
    prediction, spacing = getattr(request, "param", BASES[0])
    policy = models.load(
        tiny.sdxl_base(tmp_path / "base", prediction=prediction, spacing=spacing),
        device="cpu",
        dtype="float32",
        steps=3,
    )
    assert isinstance(policy, SDXLPolicy)
    return policy


@pytest.mark.parametrize("base", BASES, indirect=True, ids=map("-".join, BASES))
def test_the_base_model_is_a_flow_policy(base: SDXLPolicy) -> None:
    check_policy(base, (OWL, SNAIL))


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("base", BASES[:2], indirect=True, ids=map("-".join, BASES[:2]))
def test_eulers_steps_on_the_velocity_are_the_schedulers(base: SDXLPolicy, guidance: float) -> None:
    """Trailing timesteps begin at the highest level times the noise, as the flow does."""
    base.settings = replace(base.settings, guidance=guidance)
    theirs = torch.cat(
        [diffusers_picture(base, OWL, 1, guidance), diffusers_picture(base, SNAIL, 2, guidance)]
    )
    both, sigmas = base.encode([OWL, SNAIL]), base.schedule(3)
    x = sigmas[0] * base.initial_noise([1, 2])
    with torch.no_grad():
        for here, after in pairwise(sigmas.unbind()):
            x = x + (after - here) * base.velocity(x, here.expand(2), both)
        ours = base.decode(x)
    assert agree(ours, theirs, PICTURE)
    assert agree(base.sample(both, [1, 2]), theirs, PICTURE)


@pytest.mark.parametrize("base", BASES[:2], indirect=True, ids=map("-".join, BASES[:2]))
def test_rollouts_and_evaluations_begin_where_a_picture_does(base: SDXLPolicy) -> None:
    base.attach_lora(rank=2, alpha=4)
    rollouts = aligner(base, NFT, RolloutSettings(steps=3, solver="euler")).collect(groups(1), 0)
    prompts, seeds = base.encode(rollouts.samples.prompts), rollouts.samples.seeds
    pictures = base.sample(prompts, seeds)
    assert agree(rollouts.images_BCHW, pictures, PICTURE)
    assert agree(measure.sample(base, prompts, seeds), pictures, PICTURE)


@pytest.mark.parametrize("timestep", [1, 250, 999])
@pytest.mark.parametrize("base", BASES[:2], indirect=True, ids=map("-".join, BASES[:2]))
def test_the_velocity_of_a_perfect_network_is_noise_minus_data(
    base: SDXLPolicy, timestep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle knows data and noise, and answers at the level that its timestep stands for."""
    kept = base.pipeline.scheduler.alphas_cumprod.double()
    alpha, s = kept[timestep].sqrt(), (1 - kept[timestep]).sqrt()
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 2, *base.latent_shape, generator=generator, dtype=torch.float64).unbind()
    asked: list[float] = []

    def answer(x: torch.Tensor, t_B: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        asked.extend(t_B.tolist())
        assert agree(x, alpha * data + s * noise, 2)
        of_v = base.pipeline.scheduler.config.prediction_type == "v_prediction"
        return ((alpha * noise - s * data if of_v else noise).float(),)

    monkeypatch.setattr(base.denoiser, "forward", answer)
    t = s / (alpha + s)
    x_t = ((1 - t) * data + t * noise).float()
    found = base.velocity(x_t, t.float().expand(2), base.encode([OWL, SNAIL]))
    assert asked == [timestep] * 2
    amplified = 1 / (1 - float(t))  # the prediction of the noise is divided by it
    assert (found - (noise - data)).abs().max() < 64 * amplified * torch.finfo(torch.float32).eps * 8


def test_every_level_between_two_timesteps_has_one_of_its_own(base: SDXLPolicy) -> None:
    levels = base._levels
    between = (levels[10] + levels[11]) / 2
    given = torch.stack((levels[10], between, levels[11], levels[0] / 2, levels[-1] * 9))
    assert base._timesteps_at(given).tolist() == pytest.approx([10, 10.5, 11, 0, 999])
    for steps in (1, 3, 50):
        ratios = base.schedule(steps) / (1 - base.schedule(steps))
        base.pipeline.scheduler.set_timesteps(steps)
        assert agree(
            ratios, base.pipeline.scheduler.sigmas, 16
        )  # a level near 1 magnifies rounding by 1 / (1 - t)
        assert base._timesteps_at(ratios[:-1].double()).tolist() == base.pipeline.scheduler.timesteps.tolist()


def test_the_coefficient_preserving_step_is_ddims() -> None:
    """DDIM's random step (Song et al. 2021, Eq. 12, eta 1), divided by alpha + s."""
    scheduler = DDIMScheduler(**tiny.SDXL_LEVELS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    now, after = int(scheduler.timesteps[3]), int(scheduler.timesteps[4])
    (a, s), (a_next, s_next) = (
        (scheduler.alphas_cumprod[t].double().sqrt(), (1 - scheduler.alphas_cumprod[t].double()).sqrt())
        for t in (now, after)
    )
    generator = torch.Generator().manual_seed(0)
    data, noise, fresh = torch.randn(3, 2, 4, 4, 4, generator=generator, dtype=torch.float64).unbind()
    theirs = scheduler.step(noise, now, a * data + s * noise, eta=1.0, variance_noise=fresh).prev_sample
    spread = scheduler._get_variance(now, after).double().sqrt()
    t, t_next = s / (a + s), s_next / (a_next + s_next)
    ours = cps_step(
        (1 - t) * data + t * noise,
        noise - data,
        t.expand(2),
        t_next.expand(2),
        eta=float(torch.asin(spread / s_next) * 2 / torch.pi),
        noise=fresh,
    )
    assert agree(
        (ours.next_x * (a_next + s_next)).float(), theirs.float(), 16
    )  # it keeps its levels in float32


def test_another_kind_of_prediction_is_refused(base: SDXLPolicy) -> None:
    base.pipeline.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(CheckpointError, match="prediction_type 'sample'; SDXL is read as epsilon or v_pred"):
        base.velocity(base.initial_noise([1]), torch.tensor([0.5]), base.encode([OWL]))


def test_the_empty_prompt_is_zeros_where_the_checkpoint_says_so(base: SDXLPolicy) -> None:
    zeros = base._unconditional(2)
    base.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    empty = base._unconditional(2)
    assert zeros.pooled_BE is not None and not zeros.tokens_BLD.any() and not zeros.pooled_BE.any()
    assert agree(empty.tokens_BLD, base.encode(["", ""]).tokens_BLD, MODEL)


def test_its_repeated_blocks_are_those_of_the_attention(base: SDXLPolicy) -> None:
    blocks = transformer_blocks(base.denoiser)
    assert {type(one).__name__ for one in blocks} == {"BasicTransformerBlock"}
    assert len(blocks) == sum(
        "attn1" in name and name.endswith("to_q") for name, _ in base.denoiser.named_modules()
    )
