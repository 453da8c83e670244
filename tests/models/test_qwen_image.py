"""The Qwen-Image adapter equals diffusers' pipeline: tokens, masks, schedule, sign and time of velocity, guidance."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests import tiny_language
from tests.tolerance import MODEL, PICTURE, agree
from torch import Tensor

from pixrl import models
from pixrl.models.flux import pack_latents, unpack_latents
from pixrl.models.memory.plan import MemoryPlan
from pixrl.models.qwen_image import QwenImagePolicy

OWL, LONG = "a red owl", "two blue snails on a table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.qwen_image(tmp_path_factory.mktemp("qwen") / "image")


@pytest.fixture
def policy(folder: Path) -> QwenImagePolicy:
    return load(folder)


def load(folder: Path) -> QwenImagePolicy:
    found = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(found, QwenImagePolicy)
    return found


def diffusers_latents(
    policy: QwenImagePolicy, prompts: list[str], seeds: list[int], guidance: float
) -> Tensor:
    guided = {"negative_prompt": [" "] * len(prompts)} if guidance > 1 else {}
    found: Tensor = policy.pipeline(
        prompt=list(prompts),
        latents=pack_latents(policy.initial_noise(seeds)),
        num_inference_steps=policy.settings.steps,
        true_cfg_scale=guidance,
        max_sequence_length=policy.text_length,
        height=32,
        width=32,
        output_type="latent",
        **guided,
    ).images
    return unpack_latents(found, (4, 4))


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_latents_equal_the_published_pipeline(policy: QwenImagePolicy, guidance: float) -> None:
    """Of two prompts of different lengths in one batch, and each drawn alone."""
    policy.settings = replace(policy.settings, guidance=guidance)
    theirs = diffusers_latents(policy, [OWL, LONG], [1, 2], guidance)
    both = policy.encode([OWL, LONG])
    with torch.no_grad():
        assert agree(policy._integrate(both, [1, 2]), theirs, PICTURE)
        assert agree(
            policy._integrate(both[:1], [1]), diffusers_latents(policy, [OWL], [1], guidance), PICTURE
        )


def test_pictures_equal_the_published_pipeline(policy: QwenImagePolicy) -> None:
    theirs = policy.pipeline(
        prompt=OWL,
        latents=pack_latents(policy.initial_noise([1])),
        num_inference_steps=policy.settings.steps,
        true_cfg_scale=1.0,
        max_sequence_length=policy.text_length,
        height=32,
        width=32,
        output_type="pt",
    ).images
    assert agree(policy.sample(policy.encode([OWL]), [1]), theirs, PICTURE)


def test_the_schedule_is_the_pipelines(policy: QwenImagePolicy) -> None:
    diffusers_latents(policy, [OWL], [1], 0.0)
    assert agree(policy.schedule(policy.settings.steps), policy.pipeline.scheduler.sigmas, 4)
    assert policy.schedule(4)[-2].item() == pytest.approx(0.02), (
        "the published schedule ends a little above 0"
    )
    assert policy.schedule(1).tolist() == [1, 0]


def test_the_velocity_of_a_perfect_network_is_noise_minus_data(
    policy: QwenImagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is asked at t with the longest prompt's tokens and a mask, and predicts noise - data."""
    data, noise = torch.randn(2, 2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).unbind()
    both, asked = policy.encode([OWL, LONG]), []
    assert both.mask_BL is not None
    longest = int(both.mask_BL[1].sum())

    def answer(hidden_states: Tensor, timestep: Tensor, **given: Tensor) -> tuple[Tensor]:
        asked.extend(timestep.tolist())
        assert given["encoder_hidden_states"].shape[1] == longest
        assert torch.equal(given["encoder_hidden_states_mask"], both.mask_BL[:, :longest])  # type: ignore[index]
        return (pack_latents(noise - data),)

    monkeypatch.setattr(policy.denoiser, "forward", answer)
    t_B = torch.tensor([0.25, 0.75])
    found = policy.velocity(torch.lerp(data, noise, t_B.view(-1, 1, 1, 1)), t_B, both)
    assert torch.equal(found, noise - data)
    assert asked == [0.25, 0.75]


def test_guidance_turns_a_tokens_velocity_and_keeps_its_length(policy: QwenImagePolicy) -> None:
    x, t_B, both = policy.initial_noise([1, 2]), torch.full((2,), 0.6), policy.encode([OWL, LONG])
    with torch.no_grad():
        plain = pack_latents(policy.velocity(x, t_B, both))
        policy.settings = replace(policy.settings, guidance=4.0)
        guided = pack_latents(policy.velocity(x, t_B, both))
    assert agree(guided.norm(dim=-1), plain.norm(dim=-1), MODEL)
    assert not agree(guided, plain, MODEL)


def test_it_can_be_trained_after_it_has_drawn(policy: QwenImagePolicy) -> None:
    """Positions that were made within inference mode could not be trained through."""
    slots = policy.attach_lora(rank=2, alpha=4)
    both = policy.encode([OWL, LONG])
    policy.sample(both, [1, 2])
    x = policy.initial_noise([1, 2])
    policy.velocity(x, torch.full((2,), 0.5), both).square().mean().backward()
    used = [p.grad is not None and bool(p.grad.any()) for p in slots.parameters()]
    # of down and up, the down has none as long as the up is zero; what the last block says of the text nobody reads
    named = {name.rpartition(".lora_")[0] for name in slots.state() if name.startswith("current/")}
    assert len(named) == 16 and sum(used) == 14


def test_references_are_encoded_as_they_are_decoded(policy: QwenImagePolicy) -> None:
    """A clean latent of a picture is the VAE's mean, less its own mean and in its own spread; no axis of frames."""
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = policy.encode_images(picture)
    with torch.no_grad():
        theirs = policy.pipeline.vae.encode(picture[:, :, None] * 2 - 1).latent_dist.mean[:, :, 0]
    mean, std = (
        torch.tensor(policy.pipeline.vae.config[f"latents_{x}"]).view(1, -1, 1, 1) for x in ("mean", "std")
    )
    assert found.shape == (1, *policy.latent_shape)
    assert agree(found, (theirs - mean) / std, MODEL)


def test_the_vae_decodes_in_tiles(folder: Path, policy: QwenImagePolicy) -> None:
    tiled = models.load(
        folder, device="cpu", dtype="float32", plan=MemoryPlan(vae_tiling=16, vae_slicing=True)
    )
    latents = policy.initial_noise([1, 2])
    with torch.no_grad():
        whole, parts = policy.decode(latents), tiled.decode(latents)  # type: ignore[attr-defined]
        corner = policy.decode(latents[:, :, :4, :4])
    assert parts.shape == whole.shape and not agree(parts, whole, PICTURE)
    assert agree(parts[:, :, :12, :12], corner[:, :, :12, :12], MODEL), "three quarters of a tile to the next"


def test_the_layout_is_the_published_one(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert {name: one[1] for name, one in index.items() if isinstance(one, list)} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }
    settings = load(folder)
    (folder / "pixrl.json").rename(folder / "away.json")
    try:
        plain = load(folder).settings
    finally:
        (folder / "away.json").rename(folder / "pixrl.json")
    assert settings.distilled_steps is None and (plain.steps, plain.guidance, plain.resolution) == (
        50,
        4.0,
        1024,
    )
    assert all(a > b for a, b in pairwise(settings.schedule(4).tolist()))
