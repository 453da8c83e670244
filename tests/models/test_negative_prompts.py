"""Negative prompts: what guidance leads away from is that of the pipelines of diffusers, and is refused elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.models.test_shapes import FAMILIES, OWL, drawn, published
from tests.tolerance import MODEL, PICTURE, agree

from pixrl import models
from pixrl.errors import InputError, UnknownWordError
from pixrl.models.pipeline import FlowPipelinePolicy

GUIDED = sorted(name for name in FAMILIES if name != "flux")
AWAY = "a blurry photo, dark"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.make(root / name) for name, family in FAMILIES.items()}


def load(folder: Path, guidance: float | None, negative_prompt: str | None) -> FlowPipelinePolicy:
    found = models.load(
        folder, device="cpu", dtype="float32", guidance=guidance, negative_prompt=negative_prompt
    )
    assert isinstance(found, FlowPipelinePolicy)
    return found


@pytest.mark.parametrize("negative", [AWAY, ""])
@pytest.mark.parametrize("name", GUIDED)
def test_pictures_equal_the_published_pipeline(folders: dict[str, Path], name: str, negative: str) -> None:
    """Of two prompts in a batch. An empty one is not none: SDXL encodes it, and takes zeros where there is none."""
    family = FAMILIES[name]
    policy = load(folders[name], family.guidance, negative)
    given: dict[str, object]
    given = {"negative_prompt": [negative] * 2}
    if name == "flux2-klein":  # whose pipeline takes features alone
        given = {"negative_prompt_embeds": policy.encode([negative] * 2).tokens_BLD}
    theirs, ours = published(policy, family, 32, 32, **given), drawn(policy, family)
    policy.settings = replace(policy.settings, negative_prompt=None)
    without = drawn(policy, family)
    assert agree(ours, theirs, PICTURE)
    if negative or name in ("sdxl", "qwen-image"):
        assert not agree(ours, without, PICTURE), "it changes the picture"


@pytest.mark.parametrize("name", ["sd3", "sdxl", "z-image"])
def test_training_leads_away_from_it_too(folders: dict[str, Path], name: str) -> None:
    """The velocity that losses take is u + scale (c - u), with the negative prompt's own velocity for u."""
    policy = load(folders[name], 3.0, AWAY)
    prompt, away = policy.encode([OWL]), policy.encode([AWAY])
    x, t_B, scale = policy.initial_noise([1]), torch.tensor([0.6]), policy.guidance_scale
    with torch.no_grad():
        guided = policy.velocity(x, t_B, prompt)
        policy.settings = replace(policy.settings, guidance=0.0, negative_prompt=None)
        u, c = (policy.velocity(x, t_B, row) for row in (away, prompt))
    expected = u + scale * (c - u)
    assert agree(guided, expected, MODEL, scale=scale * max(u.abs().max().item(), c.abs().max().item()))
    assert not agree(guided, c, MODEL)


def test_it_is_kept_when_the_text_encoders_are_dropped(folders: dict[str, Path]) -> None:
    policy = load(folders["sd3"], 5.0, AWAY)
    before = policy.sample(policy.encode([OWL]), [1])
    policy.drop_text([OWL])
    assert torch.equal(policy.sample(policy.encode([OWL]), [1]), before)


@pytest.mark.parametrize(
    ("name", "guidance", "said"),
    [
        ("flux", 3.5, "FluxPolicy draws without a second pass"),
        ("sd3", 0.0, r"at guidance 0: only guidance above 1 .*such as guidance=4"),
        ("sd3", None, r"at guidance 0: only guidance above 1"),
        ("sdxl", 1.0, r"at guidance 1: only guidance above 1"),
        ("z-image", 0.0, r"at guidance 0: only guidance above 0 .*such as guidance=3"),
        ("qwen-image", 1.0, r"at guidance 1: only guidance above 1"),
    ],
)
def test_it_is_refused_where_nothing_reads_it(
    folders: dict[str, Path], name: str, guidance: float | None, said: str
) -> None:
    with pytest.raises(InputError, match=rf"negative_prompt has no effect on .*{said}"):
        load(folders[name], guidance, AWAY)


def test_a_small_guidance_of_z_image_reads_it(folders: dict[str, Path]) -> None:
    assert load(folders["z-image"], 0.5, AWAY).guidance_scale == 1.5


def test_its_words_are_the_models(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path, card=tiny.SD3_CARD | {"vocabulary": ["owl", "red", "dark"]})
    assert load(folder, 4.0, "dark red").unwanted == "dark red"
    with pytest.raises(UnknownWordError, match="blurry"):
        load(folder, 4.0, "blurry")


def test_an_adapter_that_does_not_say_that_it_reads_one_is_not_given_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from pixrl.models.base import Renderer\n\n"
        "class Mine(Renderer):\n"
        "    def __init__(self, checkpoint, **_): ...\n"
        "    def encode(self, prompts): ...\n"
        "    def sample(self, conditioning, seeds): ...\n"
        "    def fingerprint(self): ...\n"
    )
    with pytest.raises(InputError, match=r"negative_prompt has no effect on .*its adapter Mine draws"):
        models.load(folders["sd3"], kind=f"{file}:Mine", negative_prompt=AWAY)
