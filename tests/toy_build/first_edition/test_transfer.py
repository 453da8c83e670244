"""`flux` takes over from `sd3` what has the same meaning in both."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from pixrl.models.flux import pack_latents, unpack_latents
from toy_build.first_edition import flux, sd3
from toy_build.first_edition.transfer import Texts, start_from

WORDS, CAPTIONS = 400, 300


@pytest.fixture(scope="module")
def pair() -> tuple[FluxTransformer2DModel, SD3Transformer2DModel, Texts, Texts]:
    """Both transformers after the transfer, and text features of which SD3's are a linear map of FLUX's."""
    torch.manual_seed(0)
    old, new = sd3.new_transformer().eval(), flux.new_transformer().eval()
    words, pooled = torch.randn(WORDS, 128), torch.randn(CAPTIONS, 64)
    seen = Texts(words, pooled)
    known = Texts(words @ torch.randn(128, 192) + 0.3, pooled @ torch.randn(64, 256) - 0.2)
    start_from(new, old, seen, known)
    return new, old, seen, known


def test_words_and_pooled_features_mean_the_same(pair) -> None:  # type: ignore[no-untyped-def]
    new, old, seen, known = pair
    close(new.context_embedder(seen.words_MD), old.context_embedder(known.words_MD))
    ours, theirs = new.time_text_embed.text_embedder, old.time_text_embed.text_embedder
    close(ours(seen.pooled_BE), theirs(known.pooled_BE))


def test_a_patch_becomes_the_same_token_and_back(pair) -> None:  # type: ignore[no-untyped-def]
    new, old, _, _ = pair
    latents = torch.randn(2, 8, 16, 16)
    close(new.x_embedder(pack_latents(latents)), old.pos_embed.proj(latents).flatten(2).transpose(1, 2))
    tokens = torch.randn(2, 64, 128)
    theirs = old.proj_out(tokens).reshape(2, 8, 8, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 16, 16)
    close(unpack_latents(new.proj_out(tokens), (8, 8)), theirs)


def test_the_first_blocks_compute_what_sd3s_do_where_nothing_is_rotated(pair) -> None:  # type: ignore[no-untyped-def]
    new, old, _, _ = pair
    image, text, temb = torch.randn(2, 64, 128), torch.randn(2, 20, 128), torch.randn(2, 128)
    still = torch.ones(84, 32), torch.zeros(84, 32)
    for ours, theirs in zip(new.transformer_blocks, old.transformer_blocks, strict=False):
        one = ours(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=still)
        other = theirs(hidden_states=image, encoder_hidden_states=text, temb=temb)
        close(one[0], other[0])
        close(one[1], other[1])


def test_single_blocks_hold_attention_and_mlp_of_the_later_ones(pair) -> None:  # type: ignore[no-untyped-def]
    new, old, _, _ = pair
    for ours, theirs in zip(new.single_transformer_blocks, old.transformer_blocks[2:], strict=True):
        x, wide = torch.randn(3, 128), torch.randn(3, 512)
        close(ours.attn.to_q(x), theirs.attn.to_q(x))
        close(ours.proj_mlp(x), theirs.ff.net[0].proj(x))
        close(ours.proj_out(torch.cat((x, wide), 1)), theirs.attn.to_out[0](x) + theirs.ff.net[2](wide))


def test_the_guidance_embedding_starts_silent(pair) -> None:  # type: ignore[no-untyped-def]
    new = pair[0]
    assert not new.time_text_embed.guidance_embedder(torch.randn(2, 256)).any()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
