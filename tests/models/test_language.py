"""What is true of every model that reads prompts with a language model: rows, frames, LoRA files of others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests import tiny_language
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl import models
from pixrl.models.language import LanguagePolicy
from pixrl.models.lora.export import to_diffusers
from pixrl.models.lora.files import open_lora

OWL, LONG = "a red owl", "two blue snails on a table"


@dataclass(frozen=True)
class Kind:
    """A tiny model, and what is known of it."""

    make: Callable[[Path], Path]
    layers: dict[str, tuple[int, int]]
    """Two layers that a LoRA may change, with their inputs and outputs."""
    rows: Callable[[Any, list[str], int], list[Tensor]] | None = None
    """The features of prompts by the pipeline's own code, each without padding; of pipeline, prompts and length. None:
    the pipeline takes padding too."""


def z_image_rows(pipeline: Any, prompts: list[str], length: int) -> list[Tensor]:
    return list(pipeline.encode_prompt(prompts, max_sequence_length=length)[0])


def qwen_image_rows(pipeline: Any, prompts: list[str], length: int) -> list[Tensor]:
    tokens, mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
    return [row[own.bool()] for row, own in zip(tokens, mask, strict=True)]


KINDS = {
    "flux2-klein": Kind(
        tiny_language.flux2_klein,
        {"transformer_blocks.0.attn.to_q": (32, 32), "single_transformer_blocks.0.attn.to_out": (128, 32)},
    ),
    "z-image": Kind(
        tiny_language.z_image,
        {"layers.0.attention.to_q": (32, 32), "noise_refiner.0.attention.to_out.0": (32, 32)},
        z_image_rows,
    ),
    "qwen-image": Kind(
        tiny_language.qwen_image,
        {"transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.1.img_mlp.net.2": (128, 32)},
        qwen_image_rows,
    ),
}


masked = pytest.mark.parametrize("kind", [name for name, one in KINDS.items() if one.rows], indirect=True)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[kind].make(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture
def policy(folder: Path) -> LanguagePolicy:
    return load(folder)


def load(folder: Path, lora: Path | None = None) -> LanguagePolicy:
    found = models.load(folder, device="cpu", dtype="float32", lora=lora)
    assert isinstance(found, LanguagePolicy)
    return found


@masked
def test_rows_are_the_pipelines(kind: str, policy: LanguagePolicy) -> None:
    """A letter is a token, so that the longer prompt has as many more rows; behind them are zeros."""
    found = policy.encode([OWL, LONG])
    rows = KINDS[kind].rows
    assert rows is not None
    assert found.mask_BL is not None and found.tokens_BLD.shape == (2, *policy.blank().tokens_BLD.shape[1:])
    for row, mask, theirs in zip(
        found.tokens_BLD,
        found.mask_BL,
        rows(policy.pipeline, [OWL, LONG], policy.text_length),
        strict=True,
    ):
        assert agree(row[mask], theirs, MODEL)
        assert mask[: len(theirs)].all() and not row[len(theirs) :].any()
    assert found.mask_BL.sum(dim=1).diff().item() == len(LONG) - len(OWL)


@masked
def test_neither_padding_nor_longer_prompts_beside_it_change_a_row(policy: LanguagePolicy) -> None:
    both = policy.encode([OWL, LONG])
    assert both.mask_BL is not None
    noise, t_B = policy.initial_noise([1, 2]), torch.full((2,), 0.6)
    with torch.no_grad():
        together = policy.velocity(noise, t_B, both)
        alone = policy.velocity(noise[:1], t_B[:1], both[:1])
        wild = both.tokens_BLD.masked_fill(~both.mask_BL[:, :, None], 7.0)
        unmasked = policy.velocity(noise, t_B, replace(both, mask_BL=None))
        assert agree(policy.velocity(noise, t_B, replace(both, tokens_BLD=wild)), together, MODEL)
    assert agree(together[:1], alone, MODEL)
    assert not agree(unmasked, together, MODEL), "padding that counts as a prompt's changes the picture"


def test_a_lora_of_others_is_merged(kind: str, folder: Path, tmp_path: Path) -> None:
    """In diffusers' names, and in those that ai-toolkit writes, with an alpha."""
    draw = torch.Generator().manual_seed(0)
    lora = {
        name: (torch.randn(2, into, generator=draw), torch.randn(out, 2, generator=draw))
        for name, (into, out) in KINDS[kind].layers.items()
    }
    plain, theirs = tmp_path / "plain.safetensors", tmp_path / "theirs.safetensors"
    save_file({name: x.contiguous() for name, x in to_diffusers(lora, kind).items()}, plain)
    other: dict[str, Tensor] = {}
    for name, (down, up) in lora.items():
        other |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    save_file(other, theirs)
    before = load(folder).denoiser.state_dict()
    for file in (plain, theirs):
        assert open_lora(file, kind).lora.keys() == lora.keys()
        for name, x in load(folder, file).denoiser.state_dict().items():
            down, up = lora.get(name.removesuffix(".weight"), (None, None))
            change = torch.zeros(()) if down is None or up is None else up @ down
            assert agree(x, before[name] + change, 8), name


def test_what_a_prompt_says_is_read_where_the_rest_of_the_frame_begins(policy: LanguagePolicy) -> None:
    """Not at the last token, which says the same of every prompt."""
    (encoder,) = policy.text_encoders()
    _, after = encoder.frame
    for prompt in (OWL, LONG):
        text = encoder.read(prompt)
        rest = encoder.tokenizer(after, add_special_tokens=False)["input_ids"]
        assert text.ids_L[text.end : text.end + len(rest)].tolist() == rest and len(rest) > 1
        states = encoder._states(text.ids_L[None], text.embeddings_LD[None])
        features = encoder.features(text.ids_L[None], text.embeddings_LD[None])
        assert torch.equal(features.pooled_KE[0], states[0, text.end])
