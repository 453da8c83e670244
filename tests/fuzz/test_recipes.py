"""Recipes in YAML, and values after --set."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANY_BYTES, ANYTHING, fuzz, soup, unless_refused

from pixrl import config
from pixrl.fusion.config import FuseConfig
from pixrl.runs.config import AlignConfig

REWARDS: dict[str, Any] = {"rewards": [{"name": "geneval"}]}
NAMES = (
    "kind", "model", "seed", "steps", "prompts", "prompts.source", "prompts.per_step", "rewards", "loss", "loss.kind",
    "lora.rank", "lora.targets", "optimizer.lr", "sampling", "resolution", "advantage.synergy", "output.features",
)  # fmt: skip
VALUES = (
    "2024-13-45", "0x_", "0b", "1_000", "9" * 5000, "1e999", ".inf", ".nan", "-1", "true", "~", "[", "]", "{", "}",
    "&a", "*a", "<<: ", "!!binary x", "!!python/name:os.system", "? ", "| ", "> ", "'", '"', "\\x00", "\\ud83d", "%",
    "---\n", "...", "\t", ": ", "- ", ", ", "\n", "  ",
)  # fmt: skip
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | ANYTHING | st.sampled_from(VALUES)
TREE = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(ANYTHING | st.sampled_from(NAMES), inner, max_size=3)
    ),
)


@fuzz
@given(
    st.integers(0, 2**31),
    st.floats(1e-8, 1.0),
    st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1),
)
def test_what_is_written_is_read(place: Path, seed: int, rate: float, model: str) -> None:
    given_ = config.load(AlignConfig, REWARDS, values={"seed": seed, "optimizer.lr": rate, "model": model})
    path = place / "r.yaml"
    path.write_text(f"kind: align\n{config.dump(given_)}", encoding="utf-8")
    assert config.load(AlignConfig, path) == given_


@fuzz
@given(
    ANY_BYTES
    | soup(*VALUES, *(f"{name}: " for name in NAMES)).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes_are_read_or_refused(place: Path, content: bytes) -> None:
    path = place / "any.yaml"
    path.write_bytes(content)
    for kind in (AlignConfig, FuseConfig):
        found = unless_refused(lambda kind=kind: config.load(kind, path))
        assert found is None or yaml.safe_load(config.dump(found))


@fuzz
@given(st.dictionaries(st.sampled_from(NAMES) | ANYTHING, TREE, max_size=4))
def test_any_settings_of_python_are_read_or_refused(settings: dict[str, Any]) -> None:
    found = unless_refused(lambda: config.load(AlignConfig, {**REWARDS, **settings}))
    assert found is None or yaml.safe_load(config.dump(found))


@fuzz
@given(st.sampled_from(NAMES) | ANYTHING, ANYTHING | soup(*VALUES, most=6))
def test_any_value_after_set_is_read_or_refused(name: str, value: str) -> None:
    found = unless_refused(lambda: config.load(AlignConfig, REWARDS, [f"{name}={value}"]))
    assert found is None or yaml.safe_load(config.dump(found))
