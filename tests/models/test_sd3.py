"""The SD3 adapter equals diffusers' pipeline where both can do a thing, and keeps its own promises elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.tolerance import PICTURE, STORES, agree, agree_in_norm
from torch import Tensor

from pixrl import models
from pixrl.errors import InputError, RunError, ShapeError, UnknownWordError
from pixrl.models.base import Conditioning
from pixrl.models.sd3 import SD3Policy

OWL, SNAIL = "a photo of an owl", "a photo of a snail"


def diffusers_pictures(
    policy: SD3Policy, prompts: list[str], seeds: list[int], guidance: float
) -> torch.Tensor:
    latents = torch.stack(
        [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    pictures: torch.Tensor = policy.pipeline(
        prompt=prompts,
        negative_prompt=[""] * len(prompts),
        latents=latents,
        num_inference_steps=policy.settings.steps,
        guidance_scale=guidance,
        height=32,
        width=32,
        max_sequence_length=0,
        output_type="pt",
    ).images
    return pictures


@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_pictures_equal_the_published_pipeline(sd3: SD3Policy, guidance: float) -> None:
    sd3.settings = replace(sd3.settings, guidance=guidance)
    ours = sd3.sample(sd3.encode([OWL, SNAIL]), [1, 2])
    theirs = diffusers_pictures(sd3, [OWL, SNAIL], [1, 2], guidance)
    assert agree(ours, theirs, PICTURE)


def test_t5_zero_tokens_follow_the_card(sd3: SD3Policy) -> None:
    assert sd3.encode([OWL]).tokens_BLD.shape == (1, tiny.TEXT_LENGTH, 32)


def test_without_a_card_the_published_defaults_hold(tmp_path: Path) -> None:
    policy = models.load(tiny.sd3(tmp_path), dtype="float32", resolution=32)
    assert (policy.settings.steps, policy.settings.guidance) == (28, 7.0)
    assert policy.encode([OWL]).tokens_BLD.shape == (1, tiny.TEXT_LENGTH + 256, 32)
    assert policy.vocabulary is None


def test_half_precision_files_are_loaded_in_single_precision_on_a_cpu(tmp_path: Path) -> None:
    policy = models.load(tiny.sd3(tmp_path, card=tiny.SD3_CARD, half=True), device="cpu", dtype="bfloat16")
    assert isinstance(policy, SD3Policy)
    assert {p.dtype for p in policy.denoiser.parameters()} == {torch.float32}
    assert policy.sample(policy.encode([OWL]), [1]).dtype is torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_micro_batch_does_not_matter(sd3_folder: Path, dtype: str) -> None:
    """Each picture is that of float32 and one batch, but for rounding; seen before the decoder's end clamps it."""
    policy, exact = (models.load(sd3_folder, dtype=word, device="cpu") for word in (dtype, "float32"))
    assert isinstance(policy, SD3Policy) and isinstance(exact, SD3Policy)
    conditioning, seeds = policy.encode([OWL, SNAIL] * 4), list(range(8))
    expected = unclamped(exact, exact.encode([OWL, SNAIL] * 4), seeds)
    for policy.micro_batch in (1, 3, 8):
        for found, one in zip(unclamped(policy, conditioning, seeds), expected, strict=True):
            if dtype == "float32":
                assert agree(found, one, PICTURE)
            else:
                assert agree_in_norm(found, one, 5 * STORES, dtype=torch.bfloat16)


def unclamped(policy: SD3Policy, conditioning: Conditioning, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """The latents that `sample` decodes, and what the decoder makes of them before that is cut to [0, 1]."""
    latents, pixels = list[Tensor](), list[Tensor]()
    hooks = (
        policy.vae.post_quant_conv.register_forward_pre_hook(lambda _, given: latents.append(given[0])),
        policy.vae.decoder.register_forward_hook(lambda _, given, made: pixels.append(made.float())),
    )
    policy.sample(conditioning, seeds)
    for hook in hooks:
        hook.remove()
    return torch.cat(latents), torch.cat(pixels)


def test_the_schedule_is_the_pipelines(sd3: SD3Policy) -> None:
    sigmas = sd3.schedule(10)
    sd3.pipeline.scheduler.set_timesteps(10)
    assert torch.equal(sigmas, sd3.pipeline.scheduler.sigmas)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0


def test_the_dynamic_shift_is_the_pipelines(sd3: SD3Policy) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    sd3.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    sigmas = sd3.schedule(5)
    sd3.pipeline.scheduler.set_timesteps(5, mu=calculate_shift(16, 256, 4096, 0.5, 1.15))
    assert agree(sigmas, sd3.pipeline.scheduler.sigmas, 8)


def test_the_velocity_is_differentiable_in_the_conditioning(sd3: SD3Policy) -> None:
    conditioning = sd3.encode([OWL])
    tokens = conditioning.tokens_BLD.clone().requires_grad_()
    velocity = sd3.velocity(
        sd3.initial_noise([1]), torch.tensor([0.5]), replace(conditioning, tokens_BLD=tokens)
    )
    velocity.square().mean().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().max() > 0


def test_pictures_can_be_used_in_training(sd3: SD3Policy) -> None:
    assert not sd3.sample(sd3.encode([OWL]), [1]).is_inference()
    assert not sd3.encode([OWL]).tokens_BLD.is_inference()


def test_each_prompt_is_encoded_once(sd3: SD3Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    original = sd3.pipeline.encode_prompt
    monkeypatch.setattr(
        sd3.pipeline, "encode_prompt", lambda **kw: calls.append(kw["prompt"]) or original(**kw)
    )
    sd3.encode([OWL, SNAIL, OWL])
    sd3.encode([SNAIL])
    assert calls == [[OWL], [SNAIL]]


def test_words_outside_the_vocabulary(tmp_path: Path) -> None:
    card = tiny.SD3_CARD | {"vocabulary": ["a", "photo", "of", "owl", "snail"]}
    policy = models.load(tiny.sd3(tmp_path, card=card))
    assert len(policy.encode(["A photo of a snail, owl.", ""])) == 2
    with pytest.raises(
        UnknownWordError, match=r"'snails' of the prompt.*Did you mean 'snail'.*It knows: a, of, owl"
    ):
        policy.encode(["a photo of a owl", "a snails"])


def test_bad_calls(sd3: SD3Policy) -> None:
    conditioning = sd3.encode([OWL, SNAIL])
    with pytest.raises(ShapeError, match="2 conditionings for 1 seeds"):
        sd3.sample(conditioning, [1])
    with pytest.raises(ShapeError, match="0 seeds"):
        sd3.sample(conditioning[:0], [])
    with pytest.raises(ShapeError, match="one t and one row each"):
        sd3.velocity(sd3.initial_noise([1, 2]), torch.tensor([0.5]), conditioning)
    with pytest.raises(ShapeError, match="pooled"):
        sd3.velocity(sd3.initial_noise([1, 2]), torch.full((2,), 0.5), Conditioning(conditioning.tokens_BLD))
    with pytest.raises(InputError, match="one string"):
        sd3.encode(OWL)
    with pytest.raises(InputError, match="no prompts"):
        sd3.encode([])
    with pytest.raises(RunError, match="attach_lora"):
        sd3.slot("old")
    with pytest.raises(InputError, match="Unknown slot 'newest'"):
        sd3.slot("newest")
