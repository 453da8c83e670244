"""Messages between a run and a reward server."""

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANY_BYTES, ANYTHING, LINE, fuzz, soup, unless_refused

from pixrl.rewards import wire
from pixrl.types import RewardBatch, Scores

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | LINE
)
TREE = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LINE, inner, max_size=3), max_leaves=6
)
METADATA = st.dictionaries(LINE, TREE, max_size=3)
ODD = st.dictionaries(
    ANYTHING, ANYTHING | st.floats() | st.binary() | st.sets(st.integers()) | TREE, max_size=3
)
SOUP = soup(
    '{"protocol":1,',
    '"reward":"r",',
    '"prompts":["a"],',
    '"images":[0],',
    '"metadata":[],',
    '"pictures":{"png":["',
    "aGk=",
    '"]}}',
    '{"$picture":',
    '{"$pictures":[',
    "0",
    "]",
    "}",
    "null",
    "1e999",
    "-1",
    "9" * 5000,
    '"scores":[',
    '"reasons":[',
    "\\ud83d",
)


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return bool(one == other)


@fuzz
@given(st.lists(st.tuples(LINE, METADATA), min_size=1, max_size=3), st.booleans())
def test_what_is_sent_is_read(samples: list[tuple[str, dict[str, Any]]], exact: bool) -> None:
    images = torch.rand(len(samples), 3, 8, 8).mul(255).round() / 255
    batch = RewardBatch(images, [prompt for prompt, _ in samples], [metadata for _, metadata in samples])
    name, found = wire.read_request(wire.request("r", batch, exact=exact))
    assert (name, list(found.prompts)) == ("r", list(batch.prompts))
    assert torch.equal(found.images_BCHW, images)
    assert all(
        is_same(dict(one), dict(other)) for one, other in zip(found.metadata, batch.metadata, strict=True)
    )


@fuzz
@given(ANYTHING, ODD)
def test_anything_is_sent_or_refused(prompt: str, metadata: dict[str, Any]) -> None:
    def sent() -> bytes:
        return wire.request("r", RewardBatch(torch.zeros(1, 3, 8, 8), [prompt], [metadata]), exact=True)

    body = unless_refused(sent)
    assert body is None or unless_refused(lambda: wire.read_request(body)) is not None


@fuzz
@given(st.lists(st.floats(width=32), min_size=1, max_size=4))
def test_scores_that_are_answered_are_read(values: list[float]) -> None:
    reasons = tuple(None if math.isfinite(x) else "why" for x in values)
    given_ = Scores(torch.tensor(values), reasons, provenance={"model": "m"})
    found = unless_refused(lambda: wire.read_answer(wire.answer(given_), len(values)))
    if found is not None:
        assert torch.equal(found.values_B, given_.values_B.float()) or not all(map(math.isfinite, values))


@fuzz
@given(ANY_BYTES | SOUP.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    unless_refused(lambda: wire.read_request(body))
    unless_refused(lambda: wire.read_answer(body, 1))
    unless_refused(lambda: wire.read_description(body))
