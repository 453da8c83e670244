"""Tiny checkpoints whose text encoders react to their input, made once a session."""

from pathlib import Path

import pytest
from tests import tiny, tiny_language

from pixrl import models
from pixrl.models.flux import FluxPolicy
from pixrl.models.flux2 import Flux2KleinPolicy
from pixrl.models.qwen_image import QwenImagePolicy
from pixrl.models.sd3 import SD3Policy
from pixrl.models.sdxl import SDXLPolicy
from pixrl.models.z_image import ZImagePolicy


def _sd3(folder: Path, **settings: object) -> SD3Policy:
    policy = models.load(tiny.sd3(folder, **settings), device="cpu", dtype="float32")  # type: ignore[arg-type]
    assert isinstance(policy, SD3Policy)
    return policy


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> SD3Policy:
    """As toy:sd3: two CLIPs, no T5, no T5 rows."""
    return _sd3(tmp_path_factory.mktemp("tiny") / "sd3", card=tiny.SD3_CARD)


@pytest.fixture(scope="session")
def sd3_t5(tmp_path_factory: pytest.TempPathFactory) -> SD3Policy:
    """As published: two CLIPs of different width, T5 wider than both."""
    card = tiny.SD3_CARD | {"max_sequence_length": 24}
    return _sd3(tmp_path_factory.mktemp("tiny") / "sd3-t5", card=card, with_t5=True)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> SDXLPolicy:
    """Two CLIPs of different width, of which the second gives the pooled features."""
    policy = models.load(
        tiny.sdxl_base(tmp_path_factory.mktemp("tiny") / "sdxl"), device="cpu", dtype="float32"
    )
    assert isinstance(policy, SDXLPolicy)
    return policy


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> FluxPolicy:
    policy = models.load(tiny.flux(tmp_path_factory.mktemp("tiny") / "flux"), device="cpu", dtype="float32")
    assert isinstance(policy, FluxPolicy)
    return policy


@pytest.fixture(scope="session")
def flux2_klein(tmp_path_factory: pytest.TempPathFactory) -> Flux2KleinPolicy:
    """A language model of which three hidden states are taken side by side, padding and all."""
    policy = models.load(
        tiny_language.flux2_klein(tmp_path_factory.mktemp("tiny") / "k"), device="cpu", dtype="float32"
    )
    assert isinstance(policy, Flux2KleinPolicy)
    return policy


@pytest.fixture(scope="session")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> ZImagePolicy:
    """A language model in place of CLIP."""
    policy = models.load(
        tiny_language.z_image(tmp_path_factory.mktemp("tiny") / "z"), device="cpu", dtype="float32"
    )
    assert isinstance(policy, ZImagePolicy)
    return policy


@pytest.fixture(scope="session")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> QwenImagePolicy:
    """A language model within a longer frame, whose first tokens are left out."""
    policy = models.load(
        tiny_language.qwen_image(tmp_path_factory.mktemp("tiny") / "q"), device="cpu", dtype="float32"
    )
    assert isinstance(policy, QwenImagePolicy)
    return policy
