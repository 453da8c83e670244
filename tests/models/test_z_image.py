"""The Z-Image adapter equals diffusers' pipeline: captions, schedule, the sign and time of its velocity, guidance."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny_language
from tests.tolerance import PICTURE, agree
from torch import Tensor

from pixrl import models
from pixrl.errors import CheckpointError
from pixrl.models.base import Conditioning
from pixrl.models.language import chat_frame
from pixrl.models.z_image import ZImagePolicy

OWL, LONG = "a red owl", "two blue snails on a table under a lamp"
BASE_SHIFT = 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.z_image(tmp_path_factory.mktemp("z") / "turbo")


@pytest.fixture
def policy(folder: Path) -> ZImagePolicy:
    return load(folder)


def load(folder: Path) -> ZImagePolicy:
    found = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(found, ZImagePolicy)
    return found


def diffusers_latents(policy: ZImagePolicy, prompts: list[str], seeds: list[int], guidance: float) -> Tensor:
    found: Tensor = policy.pipeline(
        prompt=list(prompts),
        latents=policy.initial_noise(seeds),
        num_inference_steps=policy.settings.steps,
        guidance_scale=guidance,
        max_sequence_length=policy.text_length,
        height=32,
        width=32,
        output_type="latent",
    ).images
    return found


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_latents_equal_the_published_pipeline(policy: ZImagePolicy, guidance: float) -> None:
    """Of two prompts of different lengths in one batch."""
    policy.settings = replace(policy.settings, guidance=guidance)
    theirs = diffusers_latents(policy, [OWL, LONG], [1, 2], guidance)
    with torch.no_grad():
        ours = policy._integrate(policy.encode([OWL, LONG]), [1, 2])
    assert agree(ours, theirs, PICTURE)
    assert agree(policy.sample(policy.encode([OWL, LONG]), [1, 2]), policy.decode(theirs), PICTURE)


@pytest.mark.parametrize("shift", [3.0, BASE_SHIFT])
def test_the_schedule_is_the_pipelines(shift: float, tmp_path: Path) -> None:
    policy = load(tiny_language.z_image(tmp_path / "z", shift=shift))
    diffusers_latents(policy, [OWL], [1], 0.0)
    theirs = policy.pipeline.scheduler.sigmas
    assert agree(policy.schedule(policy.settings.steps), theirs, 4)


def test_the_velocity_of_a_perfect_network_is_noise_minus_data(
    policy: ZImagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is asked at 1 - t with the captions alone, and predicts data - noise."""
    data, noise = torch.randn(2, 2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).unbind()
    asked: list[float] = []
    lengths: list[int] = []

    def answer(x: list[Tensor], t_B: Tensor, captions: list[Tensor], **_: object) -> tuple[list[Tensor]]:
        asked.extend(t_B.tolist())
        lengths.extend(len(caption) for caption in captions)
        return (list((data - noise).unsqueeze(2).unbind()),)

    monkeypatch.setattr(policy.pipeline.transformer, "forward", answer)
    both = policy.encode([OWL, LONG])
    t_B = torch.tensor([0.25, 0.75])
    found = policy.velocity(torch.lerp(data, noise, t_B.view(-1, 1, 1, 1)), t_B, both)
    assert torch.equal(found, noise - data)
    assert asked == [0.75, 0.25]
    assert both.mask_BL is not None and lengths == both.mask_BL.sum(dim=1).tolist()


def test_rows_with_a_mask_mix_and_move_as_their_tokens_do(policy: ZImagePolicy) -> None:
    both = policy.encode([OWL, LONG])
    assert both.mask_BL is not None
    assert torch.equal(both[[1]].own_BL, both.mask_BL[1:])
    assert torch.equal(Conditioning.cat([both[:1], both[1:]]).own_BL, both.mask_BL)
    first = both.mix(torch.tensor([1.0, 0.0]))
    assert torch.equal(first.own_BL, both.mask_BL[:1])
    half = both.mix(torch.tensor([0.5, 0.5]))
    assert torch.equal(half.own_BL, both.mask_BL[:1] | both.mask_BL[1:])
    turned = both[[1, 0]]
    moved = both.lerp(turned, torch.tensor([0.0, 1.0]))
    assert torch.equal(moved.own_BL, both.mask_BL[[0, 0]]) and torch.equal(
        moved.tokens_BLD[1], both.tokens_BLD[0]
    )
    assert torch.equal(both.lerp(turned, 0.5).own_BL, half.own_BL.expand(2, -1))
    own = both.tokens_BLD[0][both.mask_BL[0]]
    assert agree(both.mean_BD[0], own.mean(dim=0), len(own))
    unmasked = replace(both, mask_BL=None)
    mixed = Conditioning.cat([both[:1], unmasked[1:]])
    assert torch.equal(mixed.own_BL[0], both.mask_BL[0]) and mixed.own_BL[1].all()
    narrow = both.to(dtype=torch.bfloat16)
    assert narrow.tokens_BLD.dtype is torch.bfloat16 and narrow.own_BL.dtype is torch.bool


def test_without_a_card_the_schedule_tells_which_model_it_is(tmp_path: Path) -> None:
    found = {}
    for shift in (3.0, BASE_SHIFT):
        place = tiny_language.z_image(tmp_path / str(shift), shift=shift)
        (place / "pixrl.json").unlink()
        policy = load(place)
        settings = policy.settings
        found[shift] = (settings.steps, settings.guidance, settings.resolution, policy.distilled_steps)
    assert found == {3.0: (8, 0.0, 1024, 8), BASE_SHIFT: (50, 5.0, 1024, None)}


def test_a_tokenizer_without_a_chat_is_refused(policy: ZImagePolicy) -> None:
    policy.pipeline.tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="has no chat template, within which this model reads a prompt"):
        policy.text_encoders()
    policy.pipeline.tokenizer.chat_template = "{{ 'hello' }}"
    with pytest.raises(CheckpointError, match="does not hold what the user says: 'hello'"):
        chat_frame(policy.pipeline.tokenizer, thinks=True)


def test_the_attention_of_every_block_is_trained(policy: ZImagePolicy) -> None:
    slots = policy.attach_lora(rank=2, alpha=4)
    blocks = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
    named = {name.rpartition(".lora_")[0] for name in slots.state() if name.startswith("current/")}
    wanted = {f"current/{b}.attention.{p}" for b in blocks for p in ("to_q", "to_k", "to_v", "to_out.0")}
    assert named == wanted
    x = policy.initial_noise([1, 2])
    policy.velocity(x, torch.full((2,), 0.5), policy.encode([OWL, LONG])).square().mean().backward()
    used = [p.grad is not None and bool(p.grad.any()) for p in slots.parameters()]
    assert sum(used) == len(used) / 2, "of down and up, the down has none as long as the up is zero"


def test_the_layout_is_the_published_one(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert {name: one[1] for name, one in index.items() if isinstance(one, list)} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3Model",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
    }
