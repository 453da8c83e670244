"""A tiny random FLUX that takes references, and subjects in folders."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from pixrl import models
from pixrl.models.flux import FluxPolicy
from tests import tiny

STUDIED = (
    "customized-grpo",
    "naive-grpo",
    "naive-grpo-1.5",
    "sft",
    "rpo",
    "customized-nft",
    "naive-nft",
    "naive-nft-1.5",
    "e2po-sars",
)
"""The toy recipes that the studies compare."""


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.flux(tmp_path_factory.mktemp("tiny") / "flux", guidance_embeds=True)


@pytest.fixture
def bare(flux_folder: Path) -> FluxPolicy:
    """Without LoRA slots."""
    found = models.load(flux_folder, device="cpu", dtype="float32")
    assert isinstance(found, FluxPolicy)
    return found


@pytest.fixture
def policy(bare: FluxPolicy) -> FluxPolicy:
    bare.attach_lora(rank=4, alpha=8)
    return bare


def make_subject(folder: Path, *, pictures: int = 2, word: str = "dog", seed: int = 0) -> Path:
    """A subject's folder with random pictures of different sizes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for number in range(pictures):
        height, width = 40 + 8 * number, 48
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02d}.png")
    (folder / "class.txt").write_text(f"{word}\n")
    (folder / "prompts.txt").write_text(f"a {word} in snow\na red {word}\nan old {word}\n")
    return folder


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two subjects."""
    folder = tmp_path_factory.mktemp("subjects") / "all"
    make_subject(folder / "rex", word="dog", seed=1)
    make_subject(folder / "tom", word="cat", seed=2)
    return folder
