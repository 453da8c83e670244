"""The FLUX.2 [klein] adapter equals diffusers' pipeline: tokens, positions, schedule, velocity, latents of the VAE."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny_language
from tests.tolerance import MODEL, PICTURE, agree
from torch import Tensor

from pixrl import models
from pixrl.errors import InputError
from pixrl.models.base import Conditioning
from pixrl.models.flux import pack_latents
from pixrl.models.flux2 import Flux2KleinPolicy
from pixrl.models.memory.plan import MemoryPlan

OWL, LONG = "a red owl", "two blue snails on a table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.flux2_klein(tmp_path_factory.mktemp("flux2") / "klein")


@pytest.fixture
def policy(folder: Path) -> Flux2KleinPolicy:
    return load(folder)


def load(folder: Path) -> Flux2KleinPolicy:
    found = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(found, Flux2KleinPolicy)
    return found


def patches(policy: Flux2KleinPolicy, latents: Tensor) -> Tensor:
    found: Tensor = policy.pipeline._patchify_latents(latents)
    return found


def published(policy: Flux2KleinPolicy, guidance: float, output: str = "pt", side: int = 32) -> Tensor:
    found: Tensor = policy.pipeline(
        prompt=[OWL, LONG],
        latents=patches(policy, policy.initial_noise([1, 2])),
        num_inference_steps=policy.settings.steps,
        guidance_scale=guidance,
        max_sequence_length=policy.text_length,
        height=side,
        width=side,
        output_type=output,
    ).images
    return found


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_pictures_equal_the_published_pipeline(policy: Flux2KleinPolicy, guidance: float) -> None:
    policy.settings = replace(policy.settings, guidance=guidance)
    assert agree(policy.sample(policy.encode([OWL, LONG]), [1, 2]), published(policy, guidance), PICTURE)


def pictures(count: int, seed: int, height: int = 96, width: int = 64) -> Tensor:
    """Pictures in 8 bits, no side below 64, as the pipeline takes them; it does not change this shape."""
    drawn = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return (drawn * 255).round() / 255


def with_references(policy: Flux2KleinPolicy, prompt: str, own: list[Tensor], guidance: float) -> Tensor:
    """The latents that the pipeline draws from seed 1 with these pictures [3, H, W] of one prompt."""
    processor = policy.pipeline.image_processor
    latents: Tensor = policy.pipeline(
        image=processor.numpy_to_pil(processor.pt_to_numpy(torch.stack(own))),
        prompt=prompt,
        latents=patches(policy, policy.initial_noise([1])),
        num_inference_steps=policy.settings.steps,
        guidance_scale=guidance,
        max_sequence_length=policy.text_length,
        height=32,
        width=32,
        output_type="latent",
    ).images
    spread = torch.sqrt(policy.vae.bn.running_var.view(1, -1, 1, 1) + policy.vae.config.batch_norm_eps)
    normal = (
        policy.pipeline._patchify_latents(latents) - policy.vae.bn.running_mean.view(1, -1, 1, 1)
    ) / spread
    found: Tensor = policy.pipeline._unpatchify_latents(normal)
    return found


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_latents_with_references_equal_the_published_pipeline(
    policy: Flux2KleinPolicy, guidance: float, count: int
) -> None:
    """Of two prompts with their own references in one batch; the pipeline draws one at a time."""
    policy.settings = replace(policy.settings, guidance=guidance)
    references = [pictures(2, seed) for seed in range(count)]
    shown = policy.show(policy.encode([OWL, LONG]), references, [OWL, LONG])
    with torch.no_grad():
        ours = policy._integrate(shown, [1, 1])
    for row, prompt in enumerate((OWL, LONG)):
        theirs = with_references(policy, prompt, [images[row] for images in references], guidance)
        assert agree(ours[[row]], theirs, PICTURE)
        alone = with_references(policy, prompt, [images[1 - row] for images in references], guidance)
        assert not agree(ours[[row]], alone, PICTURE)


def test_references_of_two_shapes_in_one_batch_are_each_shown_as_they_are(policy: Flux2KleinPolicy) -> None:
    rows = [
        policy.show(policy.encode([prompt]), [images], [prompt])
        for prompt, images in ((OWL, pictures(1, 0)), (LONG, pictures(1, 1, 16, 32)))
    ]
    x_t, t_B = policy.initial_noise([1, 2]), torch.tensor([0.75, 0.5])
    with torch.no_grad():
        found = policy.velocity(x_t, t_B, Conditioning.cat(rows))
        for row, own in enumerate(rows):
            assert agree(found[[row]], policy.velocity(x_t[[row]], t_B[[row]], own), MODEL)


def test_rows_are_the_pipelines_padding_and_all(policy: Flux2KleinPolicy) -> None:
    found = policy.encode([OWL, LONG])
    theirs, _ = policy.pipeline.encode_prompt([OWL, LONG], max_sequence_length=policy.text_length)
    assert found.mask_BL is None and found.tokens_BLD.shape == (2, *policy.blank().tokens_BLD.shape[1:])
    assert agree(found.tokens_BLD, theirs, MODEL)


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("resolution", [32, 64])
def test_the_schedule_is_the_pipelines(folder: Path, steps: int, resolution: int) -> None:
    policy = models.load(folder, device="cpu", dtype="float32", steps=steps, resolution=resolution)
    assert isinstance(policy, Flux2KleinPolicy)
    ours = policy.schedule(steps)
    published(policy, 0.0, "latent", resolution)
    assert agree(ours, policy.pipeline.scheduler.sigmas, 4)


@pytest.mark.parametrize("tokens", [256, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [4, 50, 200])
def test_the_shift_is_the_pipelines(
    policy: Flux2KleinPolicy, monkeypatch: pytest.MonkeyPatch, tokens: int, steps: int
) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    monkeypatch.setattr(policy, "_shift_tokens", lambda: tokens)
    assert policy._shift_mu(steps) == pytest.approx(compute_empirical_mu(tokens, steps))


def test_the_velocity_of_a_perfect_network_is_noise_minus_data(
    policy: Flux2KleinPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is asked at t, at the pipeline's own positions, and predicts noise - data."""
    data, noise = torch.randn(2, 2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).unbind()
    asked = []
    img_ids = policy.pipeline._prepare_latent_ids(patches(policy, noise))
    txt_ids = policy.pipeline._prepare_text_ids(policy.blank().tokens_BLD)

    def answer(hidden_states: Tensor, timestep: Tensor, **given: Tensor) -> tuple[Tensor]:
        asked.extend(timestep.tolist())
        assert torch.equal(given["img_ids"], img_ids[0]) and torch.equal(given["txt_ids"], txt_ids[0])
        assert torch.equal(hidden_states, policy.pipeline._pack_latents(patches(policy, x_t)))
        return (pack_latents(noise - data),)

    monkeypatch.setattr(policy.denoiser, "forward", answer)
    t_B = torch.tensor([0.25, 0.75])
    x_t = torch.lerp(data, noise, t_B.view(-1, 1, 1, 1))
    assert torch.equal(policy.velocity(x_t, t_B, policy.encode([OWL, LONG])), noise - data)
    assert asked == [0.25, 0.75]


def test_pictures_are_encoded_as_the_pipeline_encodes_them(policy: Flux2KleinPolicy) -> None:
    """The VAE's mean in patches, less the batch norm's mean and in its deviation."""
    pictures = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    found = policy.encode_images(pictures)
    with torch.no_grad():
        theirs = policy.pipeline._encode_vae_image(pictures * 2 - 1, None)
    assert agree(patches(policy, found), theirs, MODEL)


def test_decoding_undoes_encoding_but_for_the_vae(
    policy: Flux2KleinPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        policy.vae, "decode", lambda z, return_dict: (seen.append(z), torch.zeros(1, 3, 32, 32))[1:]
    )
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    policy.decode(policy.encode_images(picture))
    with torch.no_grad():
        assert agree(seen[0], policy.pipeline.vae.encode(picture * 2 - 1).latent_dist.mean, MODEL)


def test_the_vae_decodes_in_tiles(folder: Path, policy: Flux2KleinPolicy) -> None:
    tiled = models.load(folder, device="cpu", dtype="float32", plan=MemoryPlan(vae_tiling=16))
    latents = policy.initial_noise([1])
    with torch.no_grad():
        whole, parts = policy.decode(latents), tiled.decode(latents)  # type: ignore[attr-defined]
    assert parts.shape == whole.shape and not agree(parts, whole, PICTURE)


def test_the_attention_of_every_block_is_trained(policy: Flux2KleinPolicy) -> None:
    slots = policy.attach_lora(rank=2, alpha=4)
    named = {name.rpartition(".lora_")[0] for name in slots.state() if name.startswith("current/")}
    double = "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    wanted = {f"current/transformer_blocks.0.attn.{one}" for one in double}
    assert named == wanted | {"current/single_transformer_blocks.0.attn.to_qkv_mlp_proj"}
    both = policy.encode([OWL, LONG])
    policy.sample(both, [1, 2])
    x = policy.initial_noise([1, 2])
    policy.velocity(x, torch.full((2,), 0.5), both).square().mean().backward()
    used = [p.grad is not None and bool(p.grad.any()) for p in slots.parameters()]
    assert sum(used) == len(used) / 2, "of down and up, the down has none as long as the up is zero"


def test_a_distilled_checkpoint_draws_without_guidance(tmp_path: Path) -> None:
    folder = tiny_language.flux2_klein(tmp_path / "distilled", distilled=True)
    (folder / "pixrl.json").unlink()
    policy = load(folder)
    settings = policy.settings
    assert (settings.steps, settings.guidance, settings.resolution, policy.distilled_steps) == (
        4,
        0.0,
        1024,
        4,
    )
    with pytest.raises(InputError, match=r"guidance 4 has no effect: .* is distilled to few steps"):
        models.load(folder, device="cpu", guidance=4.0)


def test_the_layout_is_the_published_one(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert {name: one[1] for name, one in index.items() if isinstance(one, list)} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
    }
    card = folder / "pixrl.json"
    card.rename(folder / "away.json")
    try:
        plain = load(folder)
    finally:
        (folder / "away.json").rename(card)
    assert (plain.settings.steps, plain.settings.guidance, plain.distilled_steps) == (50, 4.0, None)
