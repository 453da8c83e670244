"""The prompt cache, and the algebra of conditionings."""

import pytest
import torch
from tests.tolerance import agree

from pixrl.errors import ShapeError
from pixrl.models.base import Conditioning
from pixrl.models.text import PromptCache


def row(prompt: str) -> Conditioning:
    torch.manual_seed(len(prompt))
    return Conditioning(torch.randn(1, 3, 4), torch.randn(1, 2))


def test_rows_come_in_order_and_equal_prompts_are_equal() -> None:
    cache = PromptCache(row)
    rows = cache.rows(["a", "bb", "a"])
    assert torch.equal(rows.tokens_BLD[0], rows.tokens_BLD[2])
    assert torch.equal(rows.tokens_BLD[1], row("bb").tokens_BLD[0])
    assert len(cache) == 2


def test_the_least_recently_used_row_leaves_first() -> None:
    encoded: list[str] = []

    def encode(prompt: str) -> Conditioning:
        encoded.append(prompt)
        return row(prompt)

    cache = PromptCache(encode, limit_bytes=2 * 4 * (3 * 4 + 2))
    cache.rows(["a", "bb"])
    cache.rows(["a"])
    cache.rows(["ccc"])
    assert len(cache) == 2
    cache.rows(["a"])
    assert encoded == ["a", "bb", "ccc"]
    cache.rows(["bb"])
    assert encoded == ["a", "bb", "ccc", "bb"]


def test_one_call_may_hold_more_than_the_limit() -> None:
    cache = PromptCache(row, limit_bytes=1)
    assert len(cache.rows(["a", "bb", "ccc"])) == 3
    assert len(cache) == 1


def test_clear_forgets() -> None:
    cache = PromptCache(row)
    cache.rows(["a"])
    cache.clear()
    assert len(cache) == 0


def test_mix_by_weights_and_by_columns() -> None:
    both = PromptCache(row).rows(["a", "bb"])
    tokens, pooled = both.tokens_BLD, both.pooled_BE
    assert pooled is not None
    flat = both.mix(torch.tensor([0.25, 0.75]))
    assert agree(flat.tokens_BLD[0], 0.25 * tokens[0] + 0.75 * tokens[1], 4)
    columns = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    mixed = both.mix(columns)
    assert torch.equal(mixed.tokens_BLD[0, :, 0], tokens[0, :, 0])
    assert torch.equal(mixed.tokens_BLD[0, :, 1], tokens[1, :, 1])
    assert mixed.pooled_BE is not None
    assert agree(mixed.pooled_BE[0], pooled.mean(dim=0), 4)
    with pytest.raises(ShapeError, match="2 conditionings"):
        both.mix(torch.ones(3))


def test_lerp_ends_at_both_conditionings() -> None:
    both = PromptCache(row).rows(["a", "bb"])
    turned = both[[1, 0]]
    half = both.lerp(turned, torch.tensor([0.0, 1.0]))
    assert torch.equal(half.tokens_BLD[0], both.tokens_BLD[0])
    assert torch.equal(half.tokens_BLD[1], turned.tokens_BLD[1])
    assert agree(both.lerp(turned, 0.5).tokens_BLD[0], both.tokens_BLD.mean(dim=0), 4)


def test_cat_and_rows_are_inverse() -> None:
    both = PromptCache(row).rows(["a", "bb"])
    again = Conditioning.cat([both[:1], both[1:]])
    assert torch.equal(again.tokens_BLD, both.tokens_BLD)
