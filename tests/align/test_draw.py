"""`pixrl draw` draws what the run's slot, the exported LoRA and the fused child draw; what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pixrl
from pixrl import api, models
from pixrl.errors import CheckpointError, InputError, PixrlError, RunError
from pixrl.models.slots import Slot
from pixrl.report.export import export
from pixrl.runs.folder import RunFolder
from pixrl.runs.measure import open_run, sample
from tests import tiny
from tests.align.parts import recipe
from tests.personalize.conftest import make_subject

OWL = "a red owl"
LEVEL = 1 / 255
"""Half a level is lost to rounding on each side."""


def pixels(pictures: Any) -> Tensor:
    return (
        torch.stack([torch.from_numpy(np.asarray(one).copy()) for one in pictures]).permute(0, 3, 1, 2) / 255
    )


def seeds_of(folder: Path) -> list[int]:
    return [json.loads(line)["seed"] for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(sd3_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a large learning rate, so that the slots differ from the base and from each other."""
    made = recipe(sd3_folder, prompt_file, steps=2, optimizer={"lr": 0.05, "ema": 0.5})
    return pixrl.align(made, out=tmp_path_factory.mktemp("runs") / "bright").run


@pytest.fixture(scope="module")
def about_rex(tmp_path_factory: pytest.TempPathFactory, prompt_file: Path) -> Path:
    place = tmp_path_factory.mktemp("flux")
    subjects = place / "subjects"
    make_subject(subjects / "rex", word="dog", seed=1)
    make_subject(subjects / "tom", word="cat", seed=2)
    made = recipe(
        tiny.flux(place / "flux", guidance_embeds=True),
        prompt_file,
        steps=1,
        prompts={"source": str(subjects), "per_step": 1},
        evaluation={"prompts": 1},
    )
    return pixrl.personalize(made, out=place / "run").run


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, since its pictures are drawn in batches and a child again is drawn alone."""
    place = tmp_path_factory.mktemp("fusion") / "run"
    return pixrl.fuse(
        ["owl", "snail"],
        budget=6,
        batch=3,
        exemplars=1,
        sampler="random",
        resolution="64x48",
        dtype="float32",
        out=place,
    ).run


@pytest.mark.parametrize("solver", ["dpm", "euler"])
def test_a_run_is_drawn_as_its_evaluation_draws(
    run: Path, tmp_path: Path, solver: str, prompt_file: Path, sd3_folder: Path
) -> None:
    if solver == "euler":
        made = recipe(
            sd3_folder,
            prompt_file,
            steps=1,
            optimizer={"lr": 0.05},
            sampling={"steps": 3},
            evaluation={"prompts": 2, "steps": 2},
        )
        run = pixrl.align(made, out=tmp_path / "run").run
    drawn = pixels(pixrl.draw(run, OWL, n=2, out=tmp_path / "out"))
    shop = open_run(run)
    steps = shop.config.evaluation.steps or shop.config.sampling.steps
    shop.policy.settings = type(shop.policy.settings)(
        steps, shop.policy.settings.guidance, shop.policy.settings.resolution
    )
    of_slot = {}
    for slot in (Slot.CURRENT, Slot.EMA, Slot.REFERENCE):
        with shop.policy.slot(slot):
            row = shop.policy.encode([OWL] * 2)
            of_slot[slot] = sample(shop.policy, row, seeds_of(tmp_path / "out"), solver=solver)
    expected = of_slot[Slot.CURRENT if shop.config.optimizer.ema is None else Slot.EMA]
    assert (drawn - expected).abs().max() <= LEVEL
    assert (drawn - of_slot[Slot.REFERENCE]).abs().max() > 4 * LEVEL


def test_more_pictures_begin_with_the_same_and_other_seeds_give_others(run: Path, tmp_path: Path) -> None:
    few, many, other = (
        pixels(pixrl.draw(run, OWL, n=n, seed=seed, out=tmp_path / f"{n}-{seed}"))
        for n, seed in ((1, 0), (3, 0), (1, 1))
    )
    assert torch.equal(few, many[:1])
    assert not torch.equal(few, other) and not torch.equal(many[0], many[1])
    row = json.loads((tmp_path / "3-0/manifest.jsonl").read_text().splitlines()[2])
    assert (row["file"], row["prompt"], row["slot"], row["step"]) == ("0002.png", OWL, "ema", 2)


def test_a_smaller_size(run: Path, tmp_path: Path) -> None:
    side = models.load(RunFolder.open(run).recipe()["model"], device="cpu").settings.resolution // 2
    assert pixrl.draw(run, OWL, n=1, size=side, out=tmp_path / "out")[0].size == (side, side)
    wide = pixrl.draw(run, OWL, n=1, size=f"{2 * side}x{side}", out=tmp_path / "wide")
    assert wide[0].size == (2 * side, side)
    row = json.loads((tmp_path / "wide/manifest.jsonl").read_text())
    assert row["size"] == f"{2 * side}x{side}"


def test_an_exported_lora_and_a_plain_model(run: Path, sd3_folder: Path, tmp_path: Path) -> None:
    """With the model's own solver, which a LoRA says nothing of."""
    done = export(run, out=tmp_path / "lora")
    drawn = {
        name: pixels(pixrl.draw(what, OWL, n=2, model=model, device="cpu", out=tmp_path / name))
        for name, what, model in (
            ("file", done.file, str(sd3_folder)),
            ("folder", tmp_path / "lora", str(sd3_folder)),
            ("base", sd3_folder, None),
        )
    }
    merged = models.load(sd3_folder, device="cpu", lora=done.file)
    row = merged.encode(
        [OWL]
    )  # one by one, as they are drawn: in bfloat16 a row's rounding depends on the batch
    expected = torch.cat([merged.sample(row, [seed]) for seed in seeds_of(tmp_path / "file")])
    assert (drawn["file"] - expected).abs().max() <= LEVEL
    assert torch.equal(drawn["file"], drawn["folder"])
    assert (drawn["file"] - drawn["base"]).abs().max() > 4 * LEVEL
    with pytest.raises(InputError, match=r"holds a LoRA.*--model REF"):
        pixrl.draw(tmp_path / "lora", OWL, out=tmp_path / "none")


def test_a_subject_is_shown_to_the_model(about_rex: Path, tmp_path: Path) -> None:
    rex, tom = (
        pixels(pixrl.draw(about_rex, "a dog in snow", n=1, subject=name, out=tmp_path / name))
        for name in ("rex", "tom")
    )
    assert not torch.equal(rex, tom)
    with pytest.raises(InputError, match=r"several subjects\. Give one: --subject rex \| tom"):
        pixrl.draw(about_rex, "a dog", out=tmp_path / "none")
    with pytest.raises(InputError, match=r"no subject 'rax'.*'rex'"):
        pixrl.draw(about_rex, "a dog", subject="rax", out=tmp_path / "none")


def test_a_child_again_and_with_other_noises(fusion: Path, tmp_path: Path) -> None:
    """Child 4 lies in the second step, whose coefficients are in a file of their own."""
    drawn = pixels(pixrl.draw(fusion, child=4, n=3, out=tmp_path / "again"))
    folder = RunFolder.open(fusion)
    row = folder.manifest()[4]
    assert seeds_of(tmp_path / "again")[0] == row.seed and len(set(seeds_of(tmp_path / "again"))) == 3
    own = pixels(api.Pictures([fusion / str(row.file)]))
    assert (drawn[:1] - own).abs().max() <= LEVEL and own.shape[2:] == (48, 64)
    high = pixrl.draw(fusion, child=4, n=1, size="48x64", out=tmp_path / "high")
    assert high[0].size == (48, 64)
    assert (drawn[1:] - own).abs().max() > 20 * LEVEL
    with pytest.raises(InputError, match=r"without a prompt"):
        pixrl.draw(fusion, OWL, child=1, out=tmp_path / "none")
    for child in (None, 6, -1):
        with pytest.raises(InputError, match=r"has 6, numbered from 0"):
            pixrl.draw(fusion, child=child, out=tmp_path / "none")


def damaged(run: Path, place: Path, pattern: str) -> Path:
    shutil.copytree(run, place)
    for file in place.glob(pattern):
        file.write_bytes(b"no tensors")
    return place


def test_damaged_weights_are_refused(run: Path, fusion: Path, tmp_path: Path) -> None:
    broken = damaged(run, tmp_path / "a", "checkpoints/*/tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"does not match its checksum"):
        pixrl.draw(broken, OWL, out=tmp_path / "none")
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(RunError, match=r"no checkpoint yet. Type: pixrl resume"):
        pixrl.draw(broken, OWL, out=tmp_path / "none")
    lost = damaged(fusion, tmp_path / "b", "rollouts/coefficients/*")
    with pytest.raises(CheckpointError, match=r"missing or damaged. Type: pixrl check"):
        pixrl.draw(lost, child=0, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"nothing is overwritten. Give another --out"):
        pixrl.draw(run, OWL, out=tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": " "}, "no prompt"),
        ({"n": 0}, "at least 1"),
        ({"size": 33}, "multiple of"),
        ({"child": 1}, "--child is for fusions"),
        ({"subject": "rex"}, "--subject is for personalizations"),
        ({"model": "toy:sd3"}, "leave --model out"),
    ],
)
def test_what_does_not_fit_a_run(run: Path, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(PixrlError, match=said):
        pixrl.draw(run, **{"prompt": OWL, "out": tmp_path / "none", **given})
    assert not (tmp_path / "none").exists()
