"""The Qwen-Image-Edit adapter equals diffusers' pipeline: rows read with pictures, latents, what is drawn.

The pipeline is given the real Qwen2VLProcessor, without its part for videos, which needs torchvision.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as published_code
from PIL import Image
from tests import tiny_language
from tests.tolerance import MODEL, PICTURE, agree
from torch import Tensor
from transformers import Qwen2VLProcessor

from pixrl import models
from pixrl.algorithms.exploration import SHOWN, Group, Variants, shown_to
from pixrl.errors import CheckpointError, InputError, ShapeError
from pixrl.models.base import Conditioning
from pixrl.models.flux import pack_latents, unpack_latents
from pixrl.models.qwen_edit import QwenImageEditPolicy
from pixrl.models.text import PerturbableText

OWL, CATS = "a red owl", "two cats on a table"
SIDE = 64
"""Of references; they are read at half of it."""


class PictureProcessor(Qwen2VLProcessor):
    """Qwen2VLProcessor without its part for videos."""

    def __init__(self, image_processor: object, tokenizer: object) -> None:
        super().__init__(image_processor, tokenizer, None, None)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


@pytest.fixture(scope="module", params=[True, False], ids=["2511", "2509"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.qwen_edit(tmp_path_factory.mktemp("edit") / "plus", zero_cond_t=request.param)


@pytest.fixture
def policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> QwenImageEditPolicy:
    monkeypatch.setattr(published_code, "CONDITION_IMAGE_SIZE", (SIDE // 2) ** 2)
    monkeypatch.setattr(published_code, "VAE_IMAGE_SIZE", SIDE**2)
    return load(folder)


def load(folder: Path) -> QwenImageEditPolicy:
    found = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(found, QwenImageEditPolicy)
    return found


def pictures(count: int, seed: int = 0) -> Tensor:
    """Pictures in 8 bits, as the pipeline takes them."""
    drawn = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return (drawn * 255).round() / 255


def pils(policy: QwenImageEditPolicy, images: Tensor) -> list[Image.Image]:
    processor = policy.pipeline.image_processor
    found: list[Image.Image] = processor.numpy_to_pil(processor.pt_to_numpy(images))
    return found


def pipeline(policy: QwenImageEditPolicy) -> QwenImageEditPlusPipeline:
    parts = policy.pipeline.components | {
        "processor": PictureProcessor(policy._patches, policy.pipeline.tokenizer)
    }
    found = QwenImageEditPlusPipeline(**parts)
    found.set_progress_bar_config(disable=True)
    return found


def published(
    policy: QwenImageEditPolicy,
    prompt: str,
    seed: int,
    references: Tensor,
    guidance: float,
    output: str = "latent",
) -> Tensor:
    """What the pipeline draws of one prompt with references [n, 3, H, W]."""
    found: Tensor = pipeline(policy)(
        image=pils(policy, references),
        prompt=prompt,
        negative_prompt=" " if guidance > 1 else None,
        true_cfg_scale=guidance,
        latents=pack_latents(policy.initial_noise([seed])),
        num_inference_steps=policy.settings.steps,
        height=32,
        width=32,
        output_type=output,
    ).images
    return found


def both(policy: QwenImageEditPolicy, count: int) -> Conditioning:
    """Two prompts with so many references each, all of them different."""
    references = [pictures(2, seed) for seed in range(count)]
    return policy.show(policy.encode([OWL, CATS]), references, [OWL, CATS])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_latents_equal_the_published_pipeline(
    policy: QwenImageEditPolicy, guidance: float, count: int
) -> None:
    """Of two prompts with their own references in one batch; the pipeline draws one at a time."""
    policy.settings = replace(policy.settings, guidance=guidance)
    with torch.no_grad():
        ours = policy._integrate(both(policy, count), [1, 2])
    for row, prompt in enumerate((OWL, CATS)):
        own = torch.stack([pictures(2, seed)[row] for seed in range(count)])
        theirs = unpack_latents(published(policy, prompt, row + 1, own, guidance), (4, 4))
        assert agree(ours[[row]], theirs, PICTURE)


def test_pictures_equal_the_published_pipeline(policy: QwenImageEditPolicy) -> None:
    theirs = published(policy, OWL, 1, pictures(2)[:1], 0.0, "pt")
    assert agree(policy.sample(both(policy, 1)[:1], [1]), theirs, PICTURE)


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_references_of_two_sizes_in_one_batch_are_each_shown_as_they_are(
    policy: QwenImageEditPolicy, guidance: float
) -> None:
    """The larger fills up the smaller with zeros in the batch, which the transformer must not take for its tokens."""
    policy.settings = replace(policy.settings, guidance=guidance)
    large, small = pictures(1), pictures(1, seed=5)[:, :, : SIDE // 2, : SIDE // 2]
    given = [(OWL, [large]), (CATS, [small])]
    rows = [policy.show(policy.encode([prompt]), shown, [prompt]) for prompt, shown in given]
    together = Conditioning.cat(rows)
    assert together.sizes_BN2 is not None
    x_t, t_B = policy.initial_noise([1, 2]), torch.tensor([0.75, 0.5])
    with torch.no_grad():
        found = policy.velocity(x_t, t_B, together)
        for row, own in enumerate(rows):
            alone = policy.velocity(x_t[[row]], t_B[[row]], own)
            assert agree(found[[row]], alone, MODEL)
            swapped = replace(own, references=rows[1 - row].references)
            assert not agree(found[[row]], policy.velocity(x_t[[row]], t_B[[row]], swapped), MODEL)


def test_rows_are_the_pipelines(policy: QwenImageEditPolicy) -> None:
    shown = both(policy, 2)
    assert shown.mask_BL is not None and shown.away is not None and shown.away.mask_BL is not None
    for row, prompt in enumerate((OWL, CATS)):
        own = [
            pils(policy, pictures(2, seed))[row].resize((32, 32), Image.Resampling.LANCZOS) for seed in (0, 1)
        ]
        for text, found in ((prompt, shown), (" ", shown.away)):
            theirs, _ = pipeline(policy).encode_prompt([text], image=own)
            assert found.mask_BL is not None
            assert agree(found.tokens_BLD[row][found.mask_BL[row]], theirs[0], MODEL)


def test_latents_of_references_are_the_pipelines(policy: QwenImageEditPolicy) -> None:
    images = pictures(2)
    found = policy.encode_images(images)
    with torch.no_grad():
        theirs = pipeline(policy)._encode_vae_image(images[:, :, None] * 2 - 1, None)
    assert agree(found, theirs.squeeze(2), MODEL)
    assert torch.equal(both(policy, 1).references[0], found)


def test_a_prompt_is_read_once_with_the_same_pictures(
    policy: QwenImageEditPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = both(policy, 1)
    monkeypatch.setattr(policy.pipeline.text_encoder, "forward", None)
    again = both(policy, 1)
    assert torch.equal(first.tokens_BLD, again.tokens_BLD)
    with pytest.raises(TypeError):
        policy.show(policy._cache.rows([OWL]), [pictures(1, seed=5)], [OWL])


def test_rows_move_with_what_guidance_leads_away_from(policy: QwenImageEditPolicy) -> None:
    shown = both(policy, 1)
    assert shown.away is not None
    turned = shown[[1, 0]]
    joined = Conditioning.cat([shown[1:], shown[:1]])
    for found in (turned, joined):
        assert found.away is not None
        assert torch.equal(found.away.tokens_BLD, shown.away.tokens_BLD[[1, 0]])
    mixed = shown.mix(torch.tensor([0.0, 1.0])).away
    assert mixed is not None and torch.equal(mixed.tokens_BLD[0], shown.away.tokens_BLD[1])
    moved = shown.lerp(turned, 1.0).away
    assert moved is not None and torch.equal(moved.tokens_BLD, shown.away.tokens_BLD[[1, 0]])
    assert shown.to(dtype=torch.bfloat16).away.tokens_BLD.dtype is torch.bfloat16  # type: ignore[union-attr]


def test_it_can_be_trained_after_it_has_drawn(policy: QwenImageEditPolicy) -> None:
    slots = policy.attach_lora(rank=2, alpha=4)
    shown = both(policy, 1)
    policy.settings = replace(policy.settings, guidance=2.0)
    policy.sample(shown, [1, 2])
    x = policy.initial_noise([1, 2])
    policy.velocity(x, torch.full((2,), 0.5), shown).square().mean().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in slots.parameters()) == 14


def test_a_groups_references_are_read_with_its_prompt(policy: QwenImageEditPolicy) -> None:
    policy.place(side=SIDE)
    groups = [
        Group(0, 0, 0, OWL, {SHOWN: (pictures(1)[0],)}),
        Group(1, 0, 1, CATS, {SHOWN: (pictures(2)[1],)}),
    ]
    found = shown_to(policy, Variants(policy.encode([OWL, CATS])), groups).anchor
    expected = both(policy, 1)
    assert torch.equal(found.tokens_BLD[1], expected.tokens_BLD[1]) and found.away is not None


def test_what_it_cannot_do_is_refused(policy: QwenImageEditPolicy, folder: Path, tmp_path: Path) -> None:
    assert not isinstance(policy, PerturbableText), "variants of prompts would not see the pictures"
    with pytest.raises(ShapeError, match="1 reference pictures for 2 prompts"):
        policy.show(policy.encode([OWL, CATS]), [pictures(1)], [OWL, CATS])
    with pytest.raises(InputError, match="multiple of 8 pixels, got 30"):
        policy.place(side=30)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"processor/preprocessor_config.json is missing"):
        load(other)


def test_the_layout_is_the_published_one(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert {name: one[1] for name, one in index.items() if isinstance(one, list)} == {
        "processor": "Qwen2VLProcessor",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }
