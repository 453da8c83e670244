"""Position ids and packing of FLUX with references."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from pixrl.errors import InputError, ShapeError
from pixrl.models.flux import pack_latents, position_ids, unpack_latents


def test_uno_ids_form_a_diagonal_staircase() -> None:
    target, (first, second) = position_ids((2, 3), [(1, 2), (2, 2)], "uno")
    assert target.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert first.tolist() == [[0, 2, 3], [0, 2, 4]]
    assert second.tolist() == [[0, 3, 5], [0, 3, 6], [0, 4, 5], [0, 4, 6]]
    assert target.dtype == first.dtype == torch.float32


def test_kontext_ids_lie_on_a_plane_of_their_own() -> None:
    _, references = position_ids((4, 4), [(1, 2), (1, 2)], "kontext")
    for ids in references:
        assert ids.tolist() == [[1, 0, 0], [1, 0, 1]]


def test_no_two_uno_tokens_share_an_id() -> None:
    target, references = position_ids((5, 3), [(2, 7), (4, 4), (1, 1)], "uno")
    rows = torch.cat([target, *references])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_target_ids_are_those_of_the_published_pipeline() -> None:
    target, _ = position_ids((6, 4), [], "uno")
    assert torch.equal(target, FluxPipeline._prepare_latent_image_ids(1, 6, 4, "cpu", torch.float32))


def test_packing_is_the_published_one_and_inverts() -> None:
    latents = torch.randn(2, 3, 6, 4)
    tokens = pack_latents(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, 6, 4))
    assert torch.equal(unpack_latents(tokens, (3, 2)), latents)


def test_bad_input_says_what_is_allowed() -> None:
    with pytest.raises(InputError, match="Did you mean 'uno'"):
        position_ids((2, 2), [], "unno")
    with pytest.raises(InputError, match="positive"):
        position_ids((2, 0), [], "uno")
    with pytest.raises(ShapeError, match="even H and W"):
        pack_latents(torch.zeros(1, 4, 3, 4))
    with pytest.raises(ShapeError, match="2 x 2 tokens"):
        unpack_latents(torch.zeros(1, 5, 8), (2, 2))


@pytest.mark.parametrize("preset", ["uno", "kontext"])
def test_references_may_be_any_iterable(preset: str) -> None:
    sizes = [(1, 2), (2, 2)]
    target, expected = position_ids((2, 3), sizes, preset)
    others: list[Any] = [
        tuple(sizes),
        iter(sizes),
        (size for size in sizes),
        torch.tensor(sizes),
        [(1.0, 2.0), [2, 2]],
    ]
    for given in others:
        own, found = position_ids((2, 3), given, preset)
        assert torch.equal(own, target)
        assert len(found) == 2
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("target", "references", "preset", "message"),
    [
        ((2, 2), [], None, "Unknown preset None.* Use uno, kontext"),
        ((2, 2), [], ["uno"], "Unknown preset"),
        ((2, 2), (1, 1), "uno", r"two whole numbers, \(rows, columns\), got 1.*\[\(32, 32\)\]"),
        ((2, 2), 4, "uno", "references must be a list of sizes.*got 4"),
        ((2, 2), None, "uno", "references must be a list of sizes.*got None"),
        (2, [(1, 1)], "uno", "two whole numbers.*got 2"),
        ((2, 2), [(1, 1, 1)], "kontext", "two whole numbers"),
        ((2, 2), [(1.5, 2)], "uno", r"two whole numbers.*got \(1\.5, 2\)"),
        ((2, 2), [(float("nan"), 2)], "uno", "two whole numbers"),
        ((2, 2), ["12"], "uno", "two whole numbers"),
        ((2, 2), [(-1, 2)], "kontext", "must be positive"),
    ],
)
def test_sizes_and_presets_that_are_none(
    target: Any, references: Sequence[Any], preset: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        position_ids(target, references, preset)
