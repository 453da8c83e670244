"""Headers of safetensors files."""

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.fuzz.budget import ANY_BYTES, fuzz, soup, unless_refused

from pixrl.hub_check import read_header

NAME = st.text(st.characters(exclude_categories=("Cs",)), max_size=8).filter(
    lambda name: name != "__metadata__"
)
VALUE = st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)
ENTRY = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), VALUE)
ODD = st.dictionaries(st.text(max_size=3), ENTRY | VALUE)
SOUP = soup(
    '{"a":',
    '{"dtype":"F32",',
    '"shape":[2],',
    '"data_offsets":[0,8]',
    "}",
    "[",
    "]",
    "9" * 5000,
    "1e999",
    '"',
    ",",
)


@fuzz
@given(st.dictionaries(NAME, st.lists(st.integers(0, 3), max_size=3), max_size=4))
def test_what_is_written_is_read(place: Path, shapes: dict[str, list[int]]) -> None:
    path = place / "a.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, {"format": "pt"})
    assert {name: list(found.shape) for name, found in read_header(path).items()} == shapes


@fuzz
@given(
    ANY_BYTES
    | SOUP.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | ODD.map(lambda header: json.dumps(header).encode()),
    st.binary(max_size=16),
    st.none() | st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_any_bytes_are_read_or_refused(place: Path, header: bytes, rest: bytes, length: int | None) -> None:
    path = place / "any.safetensors"
    size = len(header) if length is None else length
    for content in (header, size.to_bytes(8, "little") + header + rest):
        path.write_bytes(content)
        found: dict[str, Any] | None = unless_refused(lambda: read_header(path))
        assert found is None or all(isinstance(name, str) for name in found)


def test_deep_nesting_is_refused(place: Path) -> None:
    path = place / "deep.safetensors"
    header = b"[" * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert unless_refused(lambda: read_header(path)) is None
