"""Diffusion-DPO from pairs on disk: the file, whole runs, and what can be wrong. Its oracle is in tests/reference."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from torch import Tensor

import pixrl
from pixrl.algorithms.dpo import DPOSettings
from pixrl.algorithms.exploration import Group
from pixrl.data.preferences import load_pairs
from pixrl.errors import ConfigError, InputError
from pixrl.jobs import align as align_job
from pixrl.models.latents import decode_latents, encode_latents
from pixrl.models.sd3 import SD3Policy
from pixrl.runs.config import AlignConfig
from pixrl.runs.data import checksum
from tests.align.parts import ODE, aligner, final, recipe, same, scored
from tests.tolerance import agree, rounding

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
PAIRS = [("a red owl", "red", "blue"), ("a cat", "green", "blue"), ("a fish", "red", "green")]


def write_pairs(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A file of pairs, and the pictures that it names, in a folder beside it."""
    (folder / "votes").mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 32), colour).save(folder / "votes" / f"{name}.png")
    rows = rows or [
        {"prompt": text, "winner": f"votes/{won}.png", "loser": f"votes/{lost}.png", "seed": number}
        for number, (text, won, lost) in enumerate(PAIRS)
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_file_of_pairs(tmp_path: Path) -> None:
    found = load_pairs(write_pairs(tmp_path))
    assert [one.text for one in found] == [text for text, _, _ in PAIRS]
    for number, (one, (_, won, lost)) in enumerate(zip(found, PAIRS, strict=True)):
        assert one.metadata["seed"] == number and "winner" in one.metadata
        for side, colour in (("winner", won), ("loser", lost)):
            picture = one.metadata[side]
            assert isinstance(picture, Tensor) and picture.shape == (3, 32, 40)
            assert picture[:, 0, 0].tolist() == pytest.approx([x / 255 for x in COLOURS[colour]])


def test_a_changed_picture_changes_the_checksum(tmp_path: Path) -> None:
    file = write_pairs(tmp_path)
    before = checksum(load_pairs(file))
    assert checksum(load_pairs(file)) == before
    Image.new("RGB", (40, 32), (1, 2, 3)).save(tmp_path / "votes" / "red.png")
    assert checksum(load_pairs(file)) != before


ROW = {"prompt": "a cat", "winner": "votes/red.png", "loser": "votes/blue.png"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a cat", "winner": "votes/red.png"},
            "the pair of 'a cat' names no loser. A line is like",
        ),
        ({**ROW, "winner": 3}, "names no winner"),
        ({**ROW, "loser": "votes/none.png"}, "no picture .*none.png"),
        ({**ROW, "loser": "pairs.jsonl"}, "cannot be read as a picture"),
        ({**ROW, "loser": "votes/red.png"}, "the same picture .* neither can be preferred"),
        ({"winner": "votes/red.png", "loser": "votes/blue.png"}, 'no text under "prompt"'),
    ],
)
def test_bad_pairs(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_pairs(write_pairs(tmp_path, [ROW, row]))


def test_what_is_no_file_of_pairs(tmp_path: Path, sd3_folder: Path) -> None:
    for source in ("toy:geneval", str(tmp_path)):
        with pytest.raises(
            InputError, match=r"holds no pairs of pictures.*--set prompts\.source=pairs\.jsonl"
        ):
            load_pairs(source)
    wanted = run_recipe(sd3_folder, write_pairs(tmp_path))
    with pytest.raises(
        ConfigError, match="learns from pairs of pictures, which subjects have not: pixrl align"
    ):
        pixrl.personalize(
            {**wanted, "kind": "personalize", "prompts": {"source": "toy:subjects"}}, out=tmp_path / "x"
        )
    # every picture is opened before anything is drawn
    Image.new("RGB", (8, 8)).save(tmp_path / "votes" / "green.png")
    with pytest.raises(InputError, match=r"green\.png is 8x8"):
        pixrl.align(wanted, out=tmp_path / "run")


def run_recipe(model: Path, file: Path, **changes: Any) -> dict[str, Any]:
    loss = {"kind": "dpo", "beta": 200.0, "timesteps": 2}
    exploration = {"kind": "noise", "noises": 4}
    return recipe(model, file, **{"loss": loss, "exploration": exploration, **changes})


def test_a_run_resumes_exactly(tmp_path: Path, sd3_folder: Path) -> None:
    file = write_pairs(tmp_path)
    whole = pixrl.align(run_recipe(sd3_folder, file), out=tmp_path / "whole")
    assert [row["step"] for row in whole.metrics] == [0, 1, 2]
    for row in whole.metrics:
        assert math.isfinite(row["loss"]) and 0 <= row["pair_accuracy"] <= 1 and row["failed_share"] == 0
    first = whole.metrics[0]
    assert first["loss"] == pytest.approx(
        math.log(2), rel=rounding(torch.float32, 64)
    )  # nothing is learned yet
    config = AlignConfig.model_validate(run_recipe(sd3_folder, file, steps=1))
    align_job.start(config, tmp_path / "cut")
    align_job.go_on(tmp_path / "cut", overrides=["steps=3"])
    assert same(final(tmp_path / "whole"), final(tmp_path / "cut"))
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "pairs on disk, beta 200" in page and "pairs&#39; own" in page


def test_training_tells_winners_from_losers(policy: SD3Policy) -> None:
    """After some steps on red against blue, the winner gained over the frozen model and more than the loser."""
    red, blue = (
        torch.tensor(colour).view(3, 1, 1).expand(3, 32, 32) / 255
        for colour in ((220, 30, 30), (30, 30, 220))
    )
    group = Group(0, 0, 0, "a red owl", {"winner": red, "loser": blue})
    found = aligner(policy, sampling=ODE, loss=DPOSettings(beta=500.0, timesteps=2), noises=4, lr=3e-3)
    log = []
    for step in range(12):
        rollouts = found.collect([group], step)
        assert torch.equal(rollouts.images_BCHW[0], rollouts.images_BCHW[2])
        log.append(found.update(rollouts, scored(torch.zeros(4)), {"r": 1.0}))
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and log[-1]["pair_accuracy"] == 1


def test_pictures_become_the_vaes_latents(policy: SD3Policy) -> None:
    images = torch.rand(2, 3, policy.settings.resolution, policy.settings.resolution)
    vae = policy.pipeline.vae
    with torch.no_grad():
        mean = vae.encode(images * 2 - 1).latent_dist.mean
    expected = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert agree(policy.encode_images(images), expected, 64)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 1.5, "shift_factor": 0.25, "latents_mean": None, "latents_std": None},
        {
            "scaling_factor": 0.5,
            "shift_factor": None,
            "latents_mean": [0.1, -0.2, 0.3],
            "latents_std": [2.0, 0.5, 1.0],
        },
    ],
)
def test_encoding_undoes_decoding(config: dict[str, Any]) -> None:
    """A VAE whose latents are the pixels shows that scale, shift, means and deviations are undone exactly."""

    def encode(pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels))

    vae = SimpleNamespace(
        config=FrozenDict(config),  # as diffusers has it: a mapping, whose keys are attributes too
        dtype=torch.float32,
        encode=encode,
        decode=lambda x, return_dict: (x,),
    )
    images = torch.rand(2, 3, 4, 4)
    latents = encode_latents(vae, images)
    assert not torch.allclose(latents, images * 2 - 1)
    assert agree(decode_latents(vae, latents), images, 64)
