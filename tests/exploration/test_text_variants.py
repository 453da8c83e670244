"""Features from changed embeddings are those that the real encoders give, in the layout of `encode`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl.errors import InputError, ShapeError
from pixrl.models.base import Conditioning
from pixrl.models.language import LanguagePolicy
from pixrl.models.sd3 import SD3Policy
from pixrl.models.sdxl import SDXLPolicy
from pixrl.models.text import ClipEncoder, PerturbableText, PromptText, TextEncoder

PROMPT = "BOWFLY"
"""Every letter once, and none that stands in a chat's frame: rows of a table tell its tokens apart."""
ALL = ["sd3", "sd3_t5", "flux", "sdxl", "flux2_klein", "z_image", "qwen_image"]
ONES = torch.ones(1)


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> PerturbableText:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, PerturbableText)
    return found


def same(a: Conditioning, b: Conditioning) -> bool:
    if a.pooled_BE is None or b.pooled_BE is None:
        return a.pooled_BE is b.pooled_BE and agree(a.tokens_BLD, b.tokens_BLD, MODEL)
    return agree(a.tokens_BLD, b.tokens_BLD, MODEL) and agree(a.pooled_BE, b.pooled_BE, MODEL)


@contextmanager
def edited_table(encoder: TextEncoder, text: PromptText, delta_LD: Tensor) -> Iterator[None]:
    """The same perturbation made the other way: by editing the rows of the embedding table."""
    table = encoder.model.get_input_embeddings().weight
    before = table.detach().clone()
    content = text.content_L
    assert len(text.ids_L[content].unique()) == int(content.sum()), (
        "a token twice: rows can't tell them apart"
    )
    with torch.no_grad():
        table[text.ids_L[content]] += delta_LD[content]
    yield
    with torch.no_grad():
        table.copy_(before)


@pytest.mark.parametrize("policy", ALL, indirect=True)
def test_unperturbed_features_are_those_of_encode(policy: SD3Policy) -> None:
    plain = policy.encode([PROMPT])
    written = plain
    for encoder in policy.text_encoders():
        text = encoder.read(PROMPT)
        features = encoder.features(text.ids_L[None], text.embeddings_LD[None])
        if isinstance(encoder, ClipEncoder):
            alone = encoder.blend(plain._map(torch.zeros_like), features, ONES)
            assert alone.pooled_BE is not None
            assert alone.pooled_BE.any() == (encoder.pooled_columns is not None)
        written = encoder.blend(written, features, ONES)
    assert same(written, plain)


@pytest.mark.parametrize("policy", ALL, indirect=True)
def test_all_parts_together_fill_the_clip_rows(policy: SD3Policy) -> None:
    """Every non-zero entry of the CLIP rows and of the pooled features belongs to exactly one encoder."""
    plain = policy.encode([PROMPT])
    written = plain._map(torch.zeros_like)
    for encoder in policy.text_encoders():
        text = encoder.read(PROMPT)
        written = encoder.blend(written, encoder.features(text.ids_L[None], text.embeddings_LD[None]), ONES)
    assert same(replace(written, tokens_BLD=plain.tokens_BLD), plain)
    if isinstance(policy, SD3Policy):
        rows = policy.pipeline.tokenizer_max_length
        assert agree(written.tokens_BLD[:, :rows], plain.tokens_BLD[:, :rows], MODEL)
        assert not written.tokens_BLD[:, rows:].any()
    elif isinstance(policy, SDXLPolicy | LanguagePolicy):
        assert agree(written.tokens_BLD, plain.tokens_BLD, MODEL)
    else:
        assert not written.tokens_BLD.any()


@pytest.mark.parametrize("policy", ALL, indirect=True)
def test_perturbed_features_are_the_pipelines_own(policy: SD3Policy) -> None:
    for encoder in policy.text_encoders():
        text = encoder.read(PROMPT)
        delta = 0.05 * torch.randn(text.embeddings_LD.shape, generator=torch.Generator().manual_seed(3))
        delta[~text.content_L] = 0
        features = encoder.features(text.ids_L[None], (text.embeddings_LD + delta)[None])
        ours = encoder.blend(policy.encode([PROMPT]), features, ONES)
        with edited_table(encoder, text, delta), torch.no_grad():
            theirs = policy._encode_one(PROMPT)
        assert same(ours, theirs)
        assert not same(ours, policy.encode([PROMPT]))


def test_only_the_encoders_own_part_changes(sd3_t5: SD3Policy) -> None:
    plain = sd3_t5.encode([PROMPT])
    assert plain.pooled_BE is not None
    assert plain.tokens_BLD.shape == (1, 32 + 24, 48)
    for encoder, columns, pooled in zip(
        sd3_t5.text_encoders(), (slice(0, 16), slice(16, 40)), (slice(0, 16), slice(16, 40)), strict=True
    ):
        text = encoder.read(PROMPT)
        # not a constant: the first normalization would take it out again
        delta_LD = torch.randn(text.embeddings_LD.shape, generator=torch.Generator().manual_seed(0))
        features = encoder.features(text.ids_L[None], (text.embeddings_LD + delta_LD)[None])
        changed = encoder.blend(plain, features, ONES)
        assert changed.pooled_BE is not None
        moved = changed.tokens_BLD != plain.tokens_BLD
        assert moved[:, :32, columns].all()
        moved[:, :32, columns] = False
        assert not moved.any()
        moved_pooled = changed.pooled_BE != plain.pooled_BE
        assert moved_pooled[:, pooled].all()
        moved_pooled[:, pooled] = False
        assert not moved_pooled.any()


@pytest.mark.parametrize("policy", ALL, indirect=True)
def test_variants_in_one_batch_equal_variants_alone(policy: SD3Policy) -> None:
    encoder = policy.text_encoders()[0]
    text = encoder.read(PROMPT)
    shape = (5, *text.embeddings_LD.shape)
    embeddings = text.embeddings_LD + 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    together = encoder.features(text.ids_L.expand(5, -1), embeddings)
    for k in range(5):
        alone = encoder.features(text.ids_L[None], embeddings[[k]])
        assert agree(together.pooled_KE[[k]], alone.pooled_KE, MODEL)
        if alone.tokens_KLD is not None and together.tokens_KLD is not None:
            assert agree(together.tokens_KLD[[k]], alone.tokens_KLD, MODEL)


@pytest.mark.parametrize("policy", ALL, indirect=True)
def test_tokens_after_the_end_do_not_reach_the_pooled_features(policy: SD3Policy) -> None:
    encoder = policy.text_encoders()[0]
    text = encoder.read(PROMPT)
    cut = text.end + 1
    short = encoder.pooled(text.ids_L[None, :cut], text.embeddings_LD[None, :cut])
    assert agree(short, encoder.pooled(text.ids_L[None], text.embeddings_LD[None]), MODEL)


@pytest.mark.parametrize("policy", ALL, indirect=True)
def test_gradients_reach_every_content_token(policy: SD3Policy) -> None:
    encoder = policy.text_encoders()[0]
    text = encoder.read(PROMPT)
    embeddings = text.embeddings_LD[None].clone().requires_grad_()
    features = encoder.features(text.ids_L[None], embeddings)
    (pooled_gradient,) = torch.autograd.grad(features.pooled_KE.square().sum(), embeddings, retain_graph=True)
    assert (pooled_gradient[0, text.content_L].norm(dim=1) > 0).all()
    assert not pooled_gradient[0, text.end + 1 :].any()
    if features.tokens_KLD is not None:
        (token_gradient,) = torch.autograd.grad(features.tokens_KLD.square().sum(), embeddings)
        assert (token_gradient[0, text.content_L].norm(dim=1) > 0).all()


def test_blend_is_exact_at_both_ends_and_linear_between(sd3: SD3Policy) -> None:
    encoder = sd3.text_encoders()[0]
    plain = sd3.encode([PROMPT] * 3)
    text = encoder.read(PROMPT)
    features = encoder.features(text.ids_L.expand(3, -1), text.embeddings_LD.expand(3, -1, -1) + 0.1)
    mixed = encoder.blend(plain, features, torch.tensor([0.0, 0.25, 1.0]))
    assert features.tokens_KLD is not None and mixed.pooled_BE is not None and plain.pooled_BE is not None
    own, other = plain.tokens_BLD[..., :16], features.tokens_KLD
    assert torch.equal(mixed.tokens_BLD[0], plain.tokens_BLD[0])
    assert torch.equal(mixed.pooled_BE[0], plain.pooled_BE[0])
    assert agree(mixed.tokens_BLD[1, :, :16], 0.75 * own[1] + 0.25 * other[1], 8)
    assert torch.equal(mixed.tokens_BLD[2, :, :16], other[2])
    assert torch.equal(mixed.pooled_BE[2, :16], features.pooled_KE[2])


def test_encoding_is_as_before_even_after_an_error(sd3: SD3Policy) -> None:
    encoder = sd3.text_encoders()[0]
    text = encoder.read(PROMPT)
    before = sd3._encode_one("a cat").tokens_BLD
    with pytest.raises(IndexError):
        encoder.model.text_model.encoder.register_forward_pre_hook(
            handle := _Raise()
        )  # an encoder that breaks in the middle
        encoder.features(text.ids_L[None], text.embeddings_LD[None])
    handle.armed = False
    assert torch.equal(sd3._encode_one("a cat").tokens_BLD, before)


class _Raise:
    armed = True

    def __call__(self, *_: object) -> None:
        if self.armed:
            raise IndexError


def test_content_is_what_stands_between_start_and_first_end(sd3: SD3Policy) -> None:
    encoder = sd3.text_encoders()[0]
    text = encoder.read("owl")
    assert text.end == 4
    assert text.content_L.tolist() == [False, True, True, True, *[False] * 28]
    long = encoder.read("owl " * 40)
    assert long.end == 31
    assert int(long.content_L.sum()) == 30


def test_a_padding_token_that_is_also_a_word_counts_as_a_word(sd3_t5: SD3Policy) -> None:
    """CLIP-G pads with '!'."""
    encoder = sd3_t5.text_encoders()[1]
    ours, encoder.tokenizer.pad_token = encoder.tokenizer.pad_token, "!"
    text = encoder.read("a!b")
    encoder.tokenizer.pad_token = ours
    assert (text.ids_L == text.ids_L[2]).sum() > 20 or (text.ids_L == text.ids_L[-1]).sum() > 20
    assert text.content_L.nonzero().flatten().tolist() == list(range(1, text.end))


def test_wrong_input(sd3: SD3Policy) -> None:
    encoder = sd3.text_encoders()[0]
    text = encoder.read(PROMPT)
    with pytest.raises(InputError, match=r"'' has no content token that clip_l could perturb"):
        encoder.read("")
    for wrong in (text.embeddings_LD, text.embeddings_LD[None, :5], text.embeddings_LD[None, :, :5]):
        with pytest.raises(ShapeError, match=r"clip_l takes embeddings \[1, 32, 16\]"):
            encoder.features(text.ids_L[None], wrong)
    features = encoder.features(text.ids_L[None], text.embeddings_LD[None])
    with pytest.raises(ShapeError, match="2 conditionings, 1 rows of features"):
        encoder.blend(sd3.encode([PROMPT] * 2), features, ONES)
    with pytest.raises(ShapeError, match="pooled"):
        encoder.blend(Conditioning(sd3.encode([PROMPT]).tokens_BLD), features, ONES)
